"""The training loop and its parts, against formulas."""

import contextlib
import multiprocessing
import re
import signal
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.multiprocessing.reductions import StorageWeakRef

from modules.memory.meter import MemoryMeter
from modules.training import setup as training_setup
from modules.training.denoiser import Denoiser
from modules.training.loop import Trainer
from modules.training.optimizers import OptimizerOptions
from modules.training.options import DistributedOptions, LogOptions, LoraPrecisionOptions
from modules.training.state import Progress, load_state, save_state
from modules.training.step_plan import (
    StepPlan,
    batch_loader,
    draw_noise,
    generator_for,
    read_batches,
    seed_for,
    step_generators,
)
from modules.training.timesteps import TimestepOptions, sample_sigmas
from tests.training_world import assert_same, log_of, train, write_world
from utils.errors import UserError

SCALE = 0.476986


@dataclass
class Batch:
    latents: torch.Tensor
    text_states: torch.Tensor = field(default_factory=lambda: torch.zeros(2, 256, 4))
    text_mask: torch.Tensor = field(default_factory=lambda: torch.ones(2, 256))
    text_states_2: torch.Tensor = field(default_factory=lambda: torch.zeros(2, 8))


class Recorder(torch.nn.Module):
    """A DiT that notes what it is called with."""

    def __init__(self, channels: int = 16, guidance: bool = True):
        super().__init__()
        self.config = SimpleNamespace(in_channels=channels, guidance_embed=guidance)
        self.calls = []

    def forward(self, x, timestep, text_states, text_mask, text_states_2, guidance=None):
        self.calls.append((x, timestep, guidance))
        return x[:, :16]


def test_the_model_sees_timestep_and_guidance_times_1000():
    dit = Recorder()
    model = Denoiser(dit, guidance=6.0, device=torch.device("cpu"))
    x, sigma = torch.randn(2, 16, 3, 4, 4), torch.tensor([0.25, 0.5])
    model.velocity(x, sigma, Batch(x))
    ((seen, timestep, guidance),) = dit.calls
    assert torch.equal(seen, x)
    assert timestep.tolist() == [250.0, 500.0] and guidance.tolist() == [6000.0, 6000.0]


def test_a_model_without_guidance_is_given_none():
    dit = Recorder(guidance=False)
    x = torch.randn(2, 16, 3, 4, 4)
    Denoiser(dit, 6.0, torch.device("cpu")).velocity(x, torch.rand(2), Batch(x))
    assert dit.calls[0][2] is None


def test_image_to_video_models_see_the_first_frame_beside_the_noisy_latents():
    dit = Recorder(channels=32)
    x, batch = torch.randn(2, 16, 3, 4, 4), Batch(torch.randn(2, 16, 3, 4, 4))
    Denoiser(dit, 1.0, torch.device("cpu")).velocity(x, torch.rand(2), batch)
    seen = dit.calls[0][0]
    assert torch.equal(seen[:, :16], x)
    assert torch.equal(seen[:, 16:, 0], batch.latents[:, :, 0] * SCALE) and not seen[:, 16:, 1:].any()


def test_items_one_by_one_are_the_batch():
    dit = Recorder()
    model = Denoiser(dit, 1.0, torch.device("cpu"), split_batches=True)
    x = torch.randn(2, 16, 3, 4, 4)
    assert torch.equal(model.velocity(x, torch.rand(2), Batch(x)), x) and len(dit.calls) == 2


@pytest.mark.parametrize("scheme", ["none", "cosmap"])
def test_the_logged_loss_is_the_objective_computed_by_hand(tiny_models, tmp_path, monkeypatch, scheme):
    """x_t = (1 - s) x0 + s noise, target = noise - x0, loss = weight x mean (v - target)^2, in numpy."""
    world = write_world(tmp_path / "world", items=3)
    seen = []
    original = Denoiser.velocity

    def velocity(self, x_t, sigma, batch):
        result = original(self, x_t, sigma, batch)
        seen.append((batch, x_t.numpy(), sigma.item(), result.detach().numpy()))
        return result

    monkeypatch.setattr(Denoiser, "velocity", velocity)
    words = ["--weighting_scheme", scheme, "--timestep_sampling", "sigmoid", "--max_train_steps", 3]
    train(world, tiny_models.dit, tmp_path / "out", *words)
    options = TimestepOptions(timestep_sampling="sigmoid", weighting_scheme=scheme)
    for step, (batch, x_t, sigma, v) in enumerate(seen[1:]):  # the first call tries the largest batch
        (generator,) = step_generators(7, step, [0])
        assert sample_sigmas(options, [generator], [step], 7).item() == sigma
        x0 = batch.latents.numpy().astype(np.float64) * SCALE
        noise = draw_noise(batch.latents, [generator]).numpy().astype(np.float64)
        np.testing.assert_allclose(x_t, (1 - sigma) * x0 + sigma * noise, atol=1e-6)
        weight = {"none": 1.0, "cosmap": 2 / (np.pi * (1 - 2 * sigma + 2 * sigma**2))}[scheme]
        loss = weight * np.mean((v - (noise - x0)) ** 2)
        assert log_of(tmp_path / "out")[step]["loss"] == pytest.approx(loss, rel=1e-5)


def test_the_graph_of_a_batch_is_gone_before_the_next(tiny_models, tmp_path, monkeypatch):
    """Else the activations of two batches need memory at once."""
    original, alive = Denoiser.velocity, []

    def velocity(self, *arguments):
        assert all(storage.expired() for storage in alive)
        prediction = original(self, *arguments)
        alive.append(StorageWeakRef(prediction.untyped_storage()))
        return prediction

    monkeypatch.setattr(Denoiser, "velocity", velocity)
    words = ["--max_train_steps", 2, "--gradient_accumulation_steps", 2]
    train(write_world(tmp_path / "world", items=4), tiny_models.dit, tmp_path / "out", *words)
    assert len(alive) == 6  # the first two try the largest batch


def test_accumulation_is_rehearsed_with_gradients_beside_it_and_leaves_no_trace(tiny_models, tmp_path, monkeypatch):
    world, original, beside = write_world(tmp_path / "world", items=4), Trainer.rehearse, []

    def rehearse(run):
        velocity = Denoiser.velocity
        with monkeypatch.context() as patch:
            weights = run.trained.tensors.values()
            watched = lambda *given: (beside.append(any(w.grad is not None for w in weights)), velocity(*given))[1]  # noqa: E731
            patch.setattr(Denoiser, "velocity", watched)
            original(run)

    words = ["--max_train_steps", 2, "--gradient_accumulation_steps", 3, "--network_dropout", 0.5]
    monkeypatch.setattr(Trainer, "rehearse", rehearse)
    rehearsed = train(world, tiny_models.dit, tmp_path / "rehearsed", *words)
    assert beside == [False, True]
    monkeypatch.setattr(Trainer, "rehearse", lambda *_: None)
    assert_same(rehearsed, train(world, tiny_models.dit, tmp_path / "plain", *words))


def test_the_rehearsal_has_room_for_the_states_that_the_optimizer_has_not_made_yet():
    weight = torch.nn.Parameter(torch.zeros(300, 100))
    seen, said, optimizer = [], [], torch.optim.AdamW([weight])

    class Model:
        device = torch.device("cpu")

        def latents(self, batch):
            return batch.latents

        def velocity(self, x_t, sigma, batch):
            meter.drop_released()
            seen.append(meter.live)
            return x_t + weight.sum()

    batch = SimpleNamespace(latents=torch.zeros(1, 16, 1, 2, 2), bucket="16x16x1")
    run = SimpleNamespace(
        train_set=SimpleNamespace(largest_batch=lambda: batch),
        denoiser=Model(),
        trained=SimpleNamespace(tensors={"weight": weight}),
        optimizer=optimizer,
        options=SimpleNamespace(optimizer=OptimizerOptions()),
        plan=SimpleNamespace(accumulation=1),
        accelerator=SimpleNamespace(autocast=contextlib.nullcontext),
        log=SimpleNamespace(say=said.append),
    )
    with MemoryMeter() as meter:
        Trainer.rehearse(run)
    assert weight.grad is None and not optimizer.state
    assert said == ["trying the largest batch: 1 of bucket 16x16x1"]
    optimizer.state[weight]["exp_avg"] = torch.zeros(300, 100)
    with MemoryMeter() as meter:
        Trainer.rehearse(run)
    assert seen[0] - seen[1] == pytest.approx(8 * weight.numel(), rel=0.001)


def test_noise_is_standard_normal_and_belongs_to_its_key():
    latents = torch.zeros(2, 16, 4, 20, 20)
    noise = draw_noise(latents, step_generators(1, 2, [0, 1]))
    assert noise.mean().abs() < 0.02 and (noise.std() - 1).abs() < 0.02
    assert torch.equal(noise[1:], draw_noise(latents[1:], step_generators(1, 2, [1])))
    keys = [(a, b, c) for a in range(5) for b in range(5) for c in range(5)]
    assert len({seed_for(*key) for key in keys}) == 125
    assert generator_for(1, 2, 3).initial_seed() == generator_for(1, 2, 3).initial_seed()


class Numbers:
    """A dataset whose batch is its key."""

    def __len__(self):
        return 7

    def batch_of(self, epoch, index):
        return epoch, index


@pytest.mark.parametrize(
    ("processes", "accumulation", "workers"), [(1, 1, 0), (2, 1, 0), (1, 3, 0), (2, 2, 0), (2, 2, 2), (3, 4, 0)]
)
def test_every_batch_of_every_epoch_is_seen_once_by_one_process(processes, accumulation, workers):
    plan = StepPlan.create(7, accumulation, processes, max_steps=99, max_epochs=2)
    seen = []
    for rank in range(processes):
        mine = list(batch_loader(Numbers(), plan, rank, 0, workers))
        assert len(mine) == plan.total_steps * accumulation
        seen += [key for key in mine if key is not None]
    assert sorted(seen) == [(epoch, index) for epoch in range(2) for index in range(7)]


def test_a_run_that_starts_at_a_step_sees_what_was_left():
    plan = StepPlan.create(7, 2, 2, max_steps=9, max_epochs=None)
    whole = list(batch_loader(Numbers(), plan, 1, 0, 0))
    assert list(batch_loader(Numbers(), plan, 1, 5, 0)) == whole[10:]


def test_the_arithmetic_of_steps_and_epochs():
    plan = StepPlan.create(7, 2, 2, max_steps=1600, max_epochs=3)
    assert (plan.batches_per_step, plan.steps_per_epoch, plan.total_steps, plan.total_epochs) == (4, 2, 6, 3)
    assert [plan.epoch_of(step) for step in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [plan.ends_epoch(step) for step in range(4)] == [False, True, False, True]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"no zip file"])
def test_a_damaged_optimizer_state_is_one_line(tmp_path, content):
    folder, weight = tmp_path / "lora-state", {"weight": torch.zeros(2)}
    save_state(folder, Progress(seed=1), weight, {}, "")
    (folder / "optimizer.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"optimizer.pt: is damaged; resume from another state$"):
        load_state(folder, weight, {})


def test_a_state_may_be_overwritten_after_it_was_loaded(tmp_path):
    """Nothing of it stays mapped."""
    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    optimizers = [torch.optim.AdamW([weight], fused=fused) for fused in (True, None)]
    optimizers[0].step()
    save_state(tmp_path / "state", Progress(seed=1), {"weight": weight.detach()}, {"optimizer": optimizers[0]}, "")
    load_state(tmp_path / "state", {"weight": weight.detach()}, {"optimizer": optimizers[1]})
    file = tmp_path / "state" / "optimizer.pt"
    with open(file, "r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    saved, loaded = (next(iter(optimizer.state.values())) for optimizer in optimizers)
    assert all(torch.equal(saved[name], loaded[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    assert optimizers[1].param_groups[0]["fused"] is None


class AnonymousMemory:
    """An optimizer that only notes how many bytes of the process are no file while it is given its state."""

    def state_dict(self) -> dict:
        return {"moments": torch.ones(16 << 20)}

    def load_state_dict(self, state: dict) -> None:
        status = Path("/proc/self/status").read_text()
        self.bytes = int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) << 10


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_optimizer_state_is_never_in_memory_as_a_whole(tmp_path):
    optimizer = AnonymousMemory()
    save_state(tmp_path / "state", Progress(seed=1), {}, {"optimizer": optimizer}, "")
    optimizer.load_state_dict({})
    before = optimizer.bytes
    load_state(tmp_path / "state", {}, {"optimizer": optimizer})
    assert optimizer.bytes - before < 32 << 20  # of 64 MiB


def test_trained_tensors_are_written_one_by_one(tmp_path):
    trained = {str(index): torch.randn(4, 1000).T for index in range(8)}  # copied to be written, as those on a GPU are
    with MemoryMeter() as meter:
        save_state(tmp_path / "state", Progress(seed=1), trained, {}, "")
    assert meter.peak <= 2 * trained["0"].nbytes
    loaded = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
    load_state(tmp_path / "state", loaded, {})
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trained.items())


class Interrupted:
    """A dataset whose first batch is what a worker does with signals, and whose second is a mistake of the user."""

    def batch_of(self, epoch: int, index: int) -> set[signal.Handlers]:
        if index:
            raise UserError("item1: its cache is gone")
        return {signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def test_workers_ignore_signals_and_hand_a_mistake_over_in_one_line():
    batches = read_batches(batch_loader(Interrupted(), StepPlan(2, 1, 1, 2), rank=0, first_step=0, workers=1))
    assert next(batches) == {signal.SIG_IGN}
    with pytest.raises(UserError, match=r"^item1: its cache is gone$"):
        next(batches)


def test_workers_end_when_nothing_is_read_any_more():
    loader = batch_loader(Numbers(), StepPlan(7, 1, 1, 7), rank=0, first_step=0, workers=1)
    batches, others = read_batches(loader), set(multiprocessing.active_children())
    assert next(batches) == (0, 0)
    (worker,) = set(multiprocessing.active_children()) - others
    batches.close()
    assert worker.exitcode == 0


@pytest.mark.parametrize(("given", "minutes"), [({}, 24 * 60), ({"ddp_timeout": 3}, 3)])
def test_processes_wait_for_previews_and_uploads_of_the_main_one(monkeypatch, given, minutes):
    """NCCL's own limit is ten minutes."""
    taken = {}
    monkeypatch.setattr(training_setup, "Accelerator", lambda **words: taken.update(words) or Accelerator(cpu=True))
    options = SimpleNamespace(
        precision=LoraPrecisionOptions(), log=LogOptions(), distributed=DistributedOptions(**given)
    )
    training_setup.create_accelerator(options)
    assert [handler.timeout for handler in taken["kwargs_handlers"]] == [timedelta(minutes=minutes)]


def test_a_process_whose_first_step_has_no_batch_unscales_the_gradients_of_the_others(
    tiny_models, tmp_path, monkeypatch
):
    create, runs = training_setup.create_accelerator, []

    def with_scaler(*options):
        accelerator = create(*options)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator

    monkeypatch.setattr(training_setup, "create_accelerator", with_scaler)
    monkeypatch.setattr(Trainer, "train", lambda trainer: runs.append(trainer))
    train(write_world(tmp_path / "world", items=1), tiny_models.dit, tmp_path / "out")
    (run,) = runs
    for weight in run.trained.tensors.values():
        weight.grad = torch.ones_like(weight)
    run.accelerator.scaler.unscale_(run.optimizer)
    assert run.accelerator.scaler.get_scale() == 1 / weight.grad.flatten()[0].item() > 1
