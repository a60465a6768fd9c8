"""What every test may use: the root on the path, and one small model set per session."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Small tensors gain nothing from threads, and waiting threads of parallel tests slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure(config: pytest.Config) -> None:
    """Every machine tests on the CPU, unless `-m gpu` was given; workers and subprocesses inherit that.

    CUDA looks for the variable when it is first used, not when torch is imported.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory):
    """The small model set of `examples.tiny_models` in a folder of this session."""
    from examples.tiny_models import write_tiny_models

    return write_tiny_models(tmp_path_factory.mktemp("models"))
