"""On which devices the tests run."""

import os
from types import SimpleNamespace

import pytest

from tests.conftest import pytest_configure


@pytest.mark.parametrize(("marks", "visible"), [("not slow", ""), ("slow", ""), ("gpu", "0")])
def test_only_gpu_tests_see_a_gpu(monkeypatch: pytest.MonkeyPatch, marks: str, visible: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    pytest_configure(SimpleNamespace(option=SimpleNamespace(markexpr=marks)))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


def test_these_tests_see_none() -> None:
    """In the workers of `pytest -n 2` too."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
