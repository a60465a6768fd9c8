"""What a test needs of the operating system."""

import os

import pytest

needs_posix = pytest.mark.skipif(os.name == "nt", reason="needs signals, process groups, limits or folders of POSIX")
