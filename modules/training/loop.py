"""The training loop. Everything random in a step is a function of (seed, step, position in the global batch), so a
run can be stopped and continued anywhere, and shared by any number of processes, with the same result.
"""

import contextlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader

from modules.flow_matching import interpolate, velocity_target, weighted_mse
from modules.training.denoiser import Trained, TrainingModel
from modules.training.distributed import global_positions, sum_gradients, sum_over_processes
from modules.training.half_precision import try_optimizer
from modules.training.log import BANDS, FIRST_STEPS, MEDIAN_OF_STEPS, TrainingLog, band_name, band_of, smoothed
from modules.training.optimizers import averaged_weights
from modules.training.previews import Previewer
from modules.training.saver import CheckpointSaver
from modules.training.state import Progress
from modules.training.step_noise import draw_noise, seed_dropout, step_generators
from modules.training.step_plan import StepPlan, delivered
from modules.training.stop_requests import StopRequests
from modules.training.timesteps import loss_weight, sample_sigmas, sigma_at
from modules.training.trainer_options import TrainerOptions
from modules.training.training_options import ValidationOptions
from modules.training.validation import QUANTILES, validation_losses
from utils.errors import UserError

SPIKE = 4.0  # times the median of recent losses


@dataclass
class Trainer:
    """Everything that a run needs, built by the script."""

    options: TrainerOptions
    accelerator: Accelerator
    plan: StepPlan
    progress: Progress
    model: TrainingModel
    trained: Trained
    optimizer: torch.optim.Optimizer
    scheduler: Any
    loader: DataLoader
    log: TrainingLog
    saver: CheckpointSaver
    requests: StopRequests
    validation: Any = None
    previewer: Previewer | None = None


@dataclass
class StepResult:
    """What the samples of one step gave on this rank."""

    losses: list[Tensor] = field(default_factory=list)
    sigmas: list[Tensor] = field(default_factory=list)
    items: list[str] = field(default_factory=list)

    def add(self, losses: Tensor, sigma: Tensor, batch: Any) -> None:
        """losses and sigma (B,) of a batch."""
        self.losses.append(losses)
        self.sigmas.append(sigma)
        self.items += [f"{name} (bucket {batch.bucket})" for name in batch.names]

    def samples(self) -> list[tuple[str, float, float]]:
        """(item, sigma, loss) of each sample."""
        if not self.items:
            return []
        return list(zip(self.items, torch.cat(self.sigmas).tolist(), torch.cat(self.losses).tolist(), strict=True))


@dataclass(frozen=True)
class StepSummary:
    """What all ranks know of a step."""

    loss: float
    loss_by_band: dict[str, float]
    quit: bool
    save: bool


def train(trainer: Trainer) -> None:
    """Trains from `progress.step` to the end of the plan, or until somebody asks to stop.

    Raises:
        UserError: too many steps in a row were not finite, or a file could not be written.
    """
    plan, progress = trainer.plan, trainer.progress
    begin(trainer)
    summary = None
    with contextlib.closing(delivered(trainer.loader)) as batches:
        while progress.step < plan.total_steps and not (summary and summary.quit):
            micro_batches = [next(batches) for _ in range(plan.accumulation)]
            names = [batch.names if batch is not None else [] for batch in micro_batches]
            positions_of, samples = global_positions(trainer.accelerator, names)
            trainer.trained.start_step()
            result = StepResult()
            for batch, positions in zip(micro_batches, positions_of, strict=True):
                if batch is None:  # the epoch has no batch left for this rank
                    continue
                losses, sigma = train_batch(trainer, batch, positions, samples)
                result.add(losses, sigma, batch)
            summary = summarize(trainer, result, samples)
            update(trainer, result, summary)
            progress.step += 1
            progress.samples += samples
            after_step(trainer, summary)
    finish(trainer, stopped=progress.step < plan.total_steps)


def train_batch(trainer: Trainer, batch: Any, positions: Sequence[int], samples: int) -> tuple[Tensor, Tensor]:
    """Adds the gradients of a batch; its graph ends with this function, before the next batch needs the memory.

    Args:
        positions: where its items stand in the global batch.
        samples: how many items that has.

    Returns:
        The losses and the sigmas of the items, both (B,), outside of any graph.
    """
    options, accelerator, progress, model = trainer.options, trainer.accelerator, trainer.progress, trainer.model
    latents = model.latents(batch)  # B C f h w
    generators = step_generators(progress.seed, progress.step, positions)
    samples_so_far = [progress.samples + at for at in positions]
    sigma = sample_sigmas(options.timesteps, generators, samples_so_far, progress.seed)
    sigma, noise = sigma.to(latents.device), draw_noise(latents, generators)
    seed_dropout(progress.seed, progress.step, min(positions))
    with accelerator.autocast():
        prediction = model.velocity(interpolate(latents, noise, sigma), sigma, batch)
    weight = loss_weight(sigma, options.timesteps.weighting_scheme)
    losses = weighted_mse(prediction, velocity_target(latents, noise), weight)  # B
    accelerator.backward(losses.sum() / samples)
    return losses.detach(), sigma


def rehearse(trainer: Trainer, batch: Any) -> None:
    """Forward and backward on the largest batch, so that too little memory shows now and not in an hour.

    Every step but the first has the optimizer's states beside it; before there are any, as many bytes take their place.
    All accumulated batches but the first have the gradients beside them.
    """
    model, optimizer = trainer.model, trainer.optimizer
    trainer.log.say(f"trying the largest batch: {len(batch.latents)} of bucket {batch.bucket}")
    weights = list(trainer.trained.tensors.values())
    state_bytes = 0 if optimizer.state else try_optimizer(trainer.options.optimizer, weights[0].dtype, model.device)
    reserved = torch.empty(int(sum(map(torch.numel, weights)) * state_bytes), dtype=torch.uint8, device=model.device)
    latents = model.latents(batch)
    sigma = torch.full((len(latents),), 0.5, device=latents.device)
    for _ in range(min(trainer.plan.accumulation, 2)):
        with trainer.accelerator.autocast():
            prediction = model.velocity(latents, sigma, batch)
        weighted_mse(prediction, latents).sum().backward()
        del prediction
    optimizer.zero_grad(set_to_none=True)
    del reserved


def summarize(trainer: Trainer, result: StepResult, samples: int) -> StepSummary:
    """Adds up losses and requests of all ranks, so that all decide alike."""
    accelerator, requests = trainer.accelerator, trainer.requests
    if accelerator.is_main_process:
        requests.poll_files()
    loss, bands, counts = 0.0, [0.0] * BANDS, [0.0] * BANDS
    for _, sigma, value in result.samples():
        loss += value
        bands[band_of(sigma)] += value
        counts[band_of(sigma)] += 1
    own = torch.tensor([loss, requests.quit, requests.save, *bands, *counts], dtype=torch.float64)
    loss, quits, saves, *sums = sum_over_processes(accelerator, own.to(accelerator.device)).tolist()
    requests.save = False
    means = {band_name(i): sums[i] / sums[BANDS + i] for i in range(BANDS) if sums[BANDS + i]}
    return StepSummary(loss / samples, means, quits > 0, saves > 0)


def update(trainer: Trainer, result: StepResult, summary: StepSummary) -> None:
    """One optimizer step with the gradients of all ranks; none if loss or gradient is not finite."""
    accelerator, optimizer, progress = trainer.accelerator, trainer.optimizer, trainer.progress
    scaler = accelerator.scaler
    parameters = list(trainer.trained.tensors.values())
    sum_gradients(accelerator, parameters)
    if scaler is not None:
        scaler.unscale_(optimizer)
    limit = trainer.options.training.max_grad_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit).item()
    rates = trainer.scheduler.get_last_lr()
    if math.isfinite(summary.loss) and math.isfinite(norm):
        optimizer.step() if scaler is None else scaler.step(optimizer)
        trainer.trained.after_update()
        progress.nonfinite_in_a_row = 0
        note(trainer, result, summary, norm, rates)
    elif scaler is not None and math.isfinite(summary.loss) and scaler.get_scale() > 1:
        trainer.log.skipped_step()  # float16 gradients overflow until the scaler has found its scale
    else:
        report_nonfinite(trainer, result, summary, norm)
    if scaler is not None:
        scaler.update()
    trainer.scheduler.step()  # before the gradients go: Adafactor's schedule looks at them
    optimizer.zero_grad(set_to_none=True)


def note(trainer: Trainer, result: StepResult, summary: StepSummary, norm: float, rates: Sequence[float]) -> None:
    """Logs a good step, and what stands out in it."""
    progress, log = trainer.progress, trainer.log
    recent = progress.recent_losses
    spike = len(recent) >= FIRST_STEPS // 2 and summary.loss > SPIKE * statistics.median(recent)
    recent.append(summary.loss)
    del recent[:-MEDIAN_OF_STEPS]
    progress.smoothed_loss = smoothed(progress.smoothed_loss, summary.loss)
    for band, loss in summary.loss_by_band.items():
        progress.loss_by_band[band] = smoothed(progress.loss_by_band.get(band), loss)
    extra = {"spike": described(gather_object(result.samples()))} if spike else {}
    epoch = trainer.plan.epoch_of(progress.step) + 1
    log.step(progress.step + 1, epoch, summary.loss, summary.loss_by_band, norm, rates, **extra)
    start = statistics.mean(progress.first_losses)
    if progress.step + 1 == FIRST_STEPS and start > 1:
        log.say(
            f"hint: the mean loss of the first {FIRST_STEPS} steps is {start:.2f}, the released checkpoint gives less "
            "than 1: is --dit complete, with its fp8 scales, and are the caches made by its VAE and text encoders?"
        )


def described(samples: Sequence[tuple[str, float, float]]) -> list[str]:
    """Samples in words for the log."""
    return [f"{item} at timestep {1000 * sigma:.0f}: loss {loss:.4g}" for item, sigma, loss in samples]


def report_nonfinite(trainer: Trainer, result: StepResult, summary: StepSummary, norm: float) -> None:
    """Names the items of a step that was not finite.

    Raises:
        UserError: it was one too many in a row.
    """
    progress, log = trainer.progress, trainer.log
    progress.nonfinite_in_a_row += 1
    samples = gather_object(result.samples())
    culprits = [sample for sample in samples if not math.isfinite(sample[2])] or samples
    what = "gradient" if math.isfinite(summary.loss) else "loss"
    log.skipped_step()
    log.record(progress.step + 1, skipped=f"{what} is not finite", items=described(culprits))
    names = "; ".join(described(culprits))
    log.say(f"step {progress.step + 1} skipped, its {what} is not finite: {names}")
    if progress.nonfinite_in_a_row >= trainer.options.training.max_nonfinite_steps:
        raise UserError(
            f"{progress.nonfinite_in_a_row} steps in a row were not finite (--max_nonfinite_steps), the last with "
            f"{names}; check --dit and these caches, lower --learning_rate; saved checkpoints are good"
        )


def begin(trainer: Trainer) -> None:
    """What comes before the first step."""
    progress = trainer.progress
    trainer.trained.start_epoch()
    if trainer.validation is not None and progress.base_validation_loss is None:
        with trainer.trained.switched_off():
            progress.base_validation_loss = validate(trainer, "base_validation_loss")
    if trainer.previewer is not None and trainer.options.previews.sample_at_first and progress.step == 0:
        preview(trainer, "000000")


def after_step(trainer: Trainer, summary: StepSummary) -> None:
    """Validation, previews, checkpoints: in this order, so that a checkpoint knows its validation loss."""
    options, plan, progress = trainer.options, trainer.plan, trainer.progress
    epoch_ended = plan.ends_epoch(progress.step - 1)
    epoch = plan.epoch_of(progress.step - 1) + 1
    last = progress.step == plan.total_steps
    if trainer.validation is not None and (last or validation_due(options.validation, progress.step, epoch_ended)):
        progress.validation_loss = validate(trainer, "validation_loss")
        progress.validation_step = progress.step
        if progress.validation_loss is not None:
            trainer.saver.save_best(progress)
    if trainer.previewer is not None:
        if options.previews.sample_every_n_epochs is not None:
            if epoch_ended and epoch % options.previews.sample_every_n_epochs == 0:
                preview(trainer, f"e{epoch:06d}")
        elif _every(options.previews.sample_every_n_steps, progress.step):
            preview(trainer, f"{progress.step:06d}")
    with trainer.log.pause():
        if epoch_ended and _every(options.save.save_every_n_epochs, epoch) and not last:
            trainer.saver.save_epoch(epoch, progress)
        asked = summary.save and not summary.quit
        if _every(options.save.save_every_n_steps, progress.step):
            trainer.saver.save_step(progress, with_state=asked)
        elif asked:
            trainer.saver.save(trainer.saver.files.of_step(progress.step), progress, state=True)
    if epoch_ended and not last:
        trainer.trained.start_epoch()


def _every(count: int | None, number: int) -> bool:
    return count is not None and number % count == 0


def validation_due(options: ValidationOptions, step: int, epoch_ended: bool) -> bool:
    """Every N steps, or after every epoch."""
    return _every(options.validate_every_n_steps, step) if options.validate_every_n_steps else epoch_ended


def validate(trainer: Trainer, name: str) -> float | None:
    """The mean validation loss, None if it is not finite; its parts go to the log under `name`."""
    log, step = trainer.log, trainer.progress.step
    sigmas = [sigma_at(quantile, trainer.options.timesteps) for quantile in QUANTILES]
    with log.pause(), trainer.trained.evaluation(), averaged_weights(trainer.optimizer):
        losses = validation_losses(
            trainer.model, trainer.validation, sigmas, trainer.accelerator, trainer.progress.seed
        )
    mean = sum(losses) / len(losses)
    parts = {f"{1000 * sigma:.0f}": loss for sigma, loss in zip(sigmas, losses, strict=True)}
    if not math.isfinite(mean):
        log.say(f"{name} is not finite: {parts}")
        mean, parts = None, {}
    log.record(step, **{name: mean, "by_timestep": parts})
    if mean is not None:
        log.track({f"validation/{name}": mean, **{f"{name}/timestep {key}": loss for key, loss in parts.items()}}, step)
    return mean


def preview(trainer: Trainer, moment: str) -> None:
    """Previews on the main process; the others wait."""
    with trainer.log.pause(), trainer.trained.evaluation(), averaged_weights(trainer.optimizer):
        if trainer.accelerator.is_main_process:
            trainer.previewer.run(moment, trainer.log)
        trainer.accelerator.wait_for_everyone()


def finish(trainer: Trainer, stopped: bool) -> None:
    """The last checkpoint; a run that was stopped leaves the state to continue from."""
    save, files, progress = trainer.options.save, trainer.saver.files, trainer.progress
    if stopped:
        trainer.saver.save(files.of_step(progress.step), progress, state=True)
    else:
        trainer.saver.save(files.last(), progress, state=save.save_state or save.save_state_on_train_end)
