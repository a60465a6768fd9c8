"""Two processes make the steps of one, with every kind of dropout."""

import multiprocessing
import os
import socket

import pytest
import torch

from modules.training.loop import Trainer
from tests.platforms import needs_posix
from tests.training_world import assert_same_course, command, log_of, run_training, train, write_world
from utils.safetensors_utils import load_file

DROPOUT = ["--network_dropout", 0.3, "--network_args", "rank_dropout=0.3", "module_dropout=0.6"]


def _in_process(rank: int, port: int, words: list[str]) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
    run_training(words)


def run_in_two_processes(words: list[str]) -> None:
    """Forked, because starting Python and importing torch takes longer than the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_in_process, args=(rank, port, words)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]


@needs_posix
def test_two_processes_are_one_with_every_dropout(dit, tmp_path, monkeypatch):
    world = write_world(tmp_path / "world", items=4)
    words = ["--max_train_steps", 5, *DROPOUT]
    update, without = Trainer.update, []

    def noting(trainer, *given):
        without.append(sum(tensor.grad is None for tensor in trainer.trained.tensors.values()))
        update(trainer, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", noting)
        alone = train(world, dit, tmp_path / "alone", *words, "--gradient_accumulation_steps", 2)
    assert min(without[1:]) > 0  # modules that both batches of a step left out
    run_in_two_processes(command(world, dit, tmp_path / "shared", *words))
    torch.testing.assert_close(load_file(tmp_path / "shared" / "lora.safetensors"), alone, rtol=0, atol=1e-5)
    assert_same_course(tmp_path / "shared", tmp_path / "alone")
    # With other masks the gradient would be another one.
    assert log_of(tmp_path / "shared")[0]["gradient_norm"] == pytest.approx(0.137999, rel=1e-3)
