"""The training loop.

Everything random in a step is a function of the seed, the step and the position in the global batch. So a run can be
interrupted and continued at any step, and divided among any number of processes, with the same result.
"""

import contextlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader

from dataset.image_video_dataset import Batch, TrainingDataset
from modules.flow_matching import interpolate, velocity_target, weighted_mse
from modules.training.denoiser import Denoiser, Trained
from modules.training.distributed import global_positions, sum_gradients, sum_over_processes
from modules.training.log import (
    FIRST_STEPS,
    MEDIAN_OF_STEPS,
    StepResult,
    StepSummary,
    TrainingLog,
    describe,
    smoothed,
)
from modules.training.optimizers import averaged_weights, effective_rates, try_optimizer
from modules.training.options import TrainerOptions
from modules.training.previews import Previewer
from modules.training.saver import CheckpointSaver
from modules.training.state import Progress
from modules.training.step_plan import StepPlan, draw_noise, read_batches, seed_dropout, step_generators
from modules.training.stop_requests import StopRequests
from modules.training.timesteps import loss_weight, sample_sigmas, sigma_at
from modules.training.validation import QUANTILES, validation_losses
from utils.cli import print_table
from utils.errors import UserError, one_line

SPIKE = 4.0  # a loss this many times the median of recent losses is logged with its items


@dataclass
class Trainer:
    """A training run on its model, from the first step to the last checkpoint.

    `modules.training.setup.TrainingSetup` builds it. Call `rehearse` and `train` within its `log` and `requests`.
    """

    options: TrainerOptions
    accelerator: Accelerator
    plan: StepPlan
    progress: Progress
    train_set: TrainingDataset
    validation_set: TrainingDataset | None
    denoiser: Denoiser
    trained: Trained
    optimizer: torch.optim.Optimizer
    scheduler: Any
    loader: DataLoader
    log: TrainingLog
    saver: CheckpointSaver
    requests: StopRequests
    previewer: Previewer | None = None
    updates: int = 0  # of the weights, by this process
    updating: bool = False  # the weights, or what belongs to them, may be half updated
    stopped: bool = False  # as far as `stopping` knows

    def train(self) -> None:
        """Trains from `progress.step` to the end of the plan, or until somebody asks to stop.

        Whatever fails or interrupts a step, the weights of the steps before it are saved.

        Raises:
            UserError: too many consecutive steps were not finite, none was, or a file could not be written.
        """
        try:
            self.begin()
            self.run_steps()
        except BaseException:  # a second Ctrl+C is one
            self.rescue()
            raise
        self.finish()

    def run_steps(self) -> None:
        """The steps, and what follows each."""
        plan, progress = self.plan, self.progress
        with contextlib.closing(read_batches(self.loader)) as batches:
            while progress.step < plan.total_steps and not self.stopping():
                micro_batches = [next(batches) for _ in range(plan.accumulation)]
                names = [batch.names if batch is not None else [] for batch in micro_batches]
                positions_of, samples = global_positions(self.accelerator, names)
                self.trained.start_step()
                result = StepResult()
                for batch, positions in zip(micro_batches, positions_of, strict=True):
                    if batch is None:  # the epoch has no batch left for this process
                        continue
                    result.add(*self.train_batch(batch, positions, samples), batch)
                summary = self.summarize(result, samples)
                with self.requests.uninterrupted():
                    self.update(result, summary)
                    progress.step += 1
                    progress.samples += samples
                    self.updating = False
                self.after_step(summary.save)

    def train_batch(self, batch: Batch, positions: Sequence[int], samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """Adds the gradients of a batch. Its graph is freed on return, before the next batch needs the memory.

        Args:
            positions: where its items stand in the global batch.
            samples: number of items in the global batch.

        Returns:
            Losses, losses without weights, and sigmas of the items, all (B,), without a graph.
        """
        options, accelerator, progress, denoiser = self.options, self.accelerator, self.progress, self.denoiser
        latents = denoiser.latents(batch)  # B C f h w
        generators = step_generators(progress.seed, progress.step, positions)
        numbers = [progress.samples + position for position in positions]  # of the samples in the run
        sigma = sample_sigmas(options.timesteps, generators, numbers, progress.seed)
        sigma, noise = sigma.to(latents.device), draw_noise(latents, generators)
        weight = loss_weight(sigma, options.timesteps.weighting_scheme)
        seed_dropout(progress.seed, progress.step, min(positions))
        x_t = interpolate(latents, noise, sigma)
        with accelerator.autocast():
            velocity = denoiser.velocity(x_t, sigma, batch)
        errors = weighted_mse(velocity, velocity_target(latents, noise))  # B
        losses = errors * weight
        accelerator.backward(losses.sum() / samples)
        return losses.detach(), errors.detach(), sigma

    def rehearse(self) -> None:
        """Runs forward and backward on the largest batch, so that too little memory shows now and not in an hour.

        The memory is that of a later step: before the optimizer has states, a tensor of their size is allocated in
        their place, and with accumulation the batch runs twice, the second time with the gradients in memory.
        """
        batch, denoiser, optimizer = self.train_set.largest_batch(), self.denoiser, self.optimizer
        self.log.say(f"trying the largest batch: {len(batch.latents)} of bucket {batch.bucket}")
        weights, device = list(self.trained.tensors.values()), denoiser.device
        state_bytes = 0 if optimizer.state else try_optimizer(self.options.optimizer, weights[0].dtype, device)
        reserved = torch.empty(int(sum(map(torch.numel, weights)) * state_bytes), dtype=torch.uint8, device=device)
        latents = denoiser.latents(batch)
        sigma = torch.full((len(latents),), 0.5, device=latents.device)
        for _ in range(min(self.plan.accumulation, 2)):
            with self.accelerator.autocast():
                velocity = denoiser.velocity(latents, sigma, batch)
            weighted_mse(velocity, latents).sum().backward()
            del velocity
        optimizer.zero_grad(set_to_none=True)
        del reserved

    def summarize(self, result: StepResult, samples: int) -> StepSummary:
        """Adds up losses and requests of all processes, so that all of them decide alike."""
        own = [*result.totals(), self.requests.take_save()]
        *totals, saves = sum_over_processes(self.accelerator, own)
        return StepSummary.of(totals, samples, saves > 0)

    def update(self, result: StepResult, summary: StepSummary) -> None:
        """One optimizer step with the gradients of all processes; none if loss or gradient is not finite."""
        accelerator, optimizer, progress = self.accelerator, self.optimizer, self.progress
        scaler = accelerator.scaler
        parameters = list(self.trained.tensors.values())
        sum_gradients(accelerator, parameters)
        if scaler is not None:
            scaler.unscale_(optimizer)
        limit = self.options.training.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit).item()
        rates = self.scheduler.get_last_lr()
        if math.isfinite(summary.loss) and math.isfinite(norm):
            self.updating = True
            optimizer.step() if scaler is None else scaler.step(optimizer)
            facts = self.trained.after_update() | effective_rates(optimizer)
            self.updates += 1
            progress.nonfinite_in_a_row = 0
            self.log_update(result, summary, norm, rates, facts)
        elif scaler is not None and math.isfinite(summary.loss) and scaler.get_scale() > 1:
            self.log.skipped_step()  # float16 gradients overflow until the scaler has found its scale
        else:
            self.report_nonfinite(result, summary)
        if scaler is not None:
            scaler.update()
        self.scheduler.step()  # before the gradients are freed: the schedule of Adafactor reads them
        optimizer.zero_grad(set_to_none=True)

    def log_update(
        self,
        result: StepResult,
        summary: StepSummary,
        norm: float,
        rates: Sequence[float],
        facts: Mapping[str, float],
    ) -> None:
        """Logs a step that changed the weights; with its items if the loss is unusually high.

        Args:
            facts: further numbers for the log, by name.
        """
        progress, log = self.progress, self.log
        recent = progress.recent_losses
        is_spike = len(recent) >= FIRST_STEPS // 2 and summary.error > SPIKE * statistics.median(recent)
        recent.append(summary.error)
        del recent[:-MEDIAN_OF_STEPS]
        progress.smoothed_loss = smoothed(progress.smoothed_loss, summary.loss)
        for band, loss in summary.loss_by_band.items():
            progress.loss_by_band[band] = smoothed(progress.loss_by_band.get(band), loss)
        extra = {"spike": describe(gather_object(result.samples()))} if is_spike else {}
        epoch = self.plan.epoch_of(progress.step) + 1
        log.step(
            progress.step + 1, epoch, summary.loss, summary.error, summary.loss_by_band, norm, rates, facts, **extra
        )
        start = statistics.mean(progress.first_losses)
        if progress.step + 1 == FIRST_STEPS and start > 1:
            log.say(
                f"hint: the mean loss of the first {FIRST_STEPS} steps is {start:.2f}; the released checkpoint gives "
                "less than 1: is --dit complete, with its fp8 scales, and were the caches made with its VAE and text "
                "encoders?"
            )

    def report_nonfinite(self, result: StepResult, summary: StepSummary) -> None:
        """Names the items of a step whose loss or gradient was not finite.

        Raises:
            UserError: there were too many such steps in a row.
        """
        progress, log = self.progress, self.log
        progress.nonfinite_in_a_row += 1
        samples = gather_object(result.samples())
        culprits = describe([sample for sample in samples if not math.isfinite(sample[2])] or samples)
        what, names = "gradient" if math.isfinite(summary.loss) else "loss", "; ".join(culprits)
        log.skipped_step()
        log.record(progress.step + 1, skipped=f"{what} is not finite", items=culprits)
        log.say(f"step {progress.step + 1} skipped, its {what} is not finite: {names}")
        if progress.nonfinite_in_a_row >= self.options.training.max_nonfinite_steps:
            raise UserError(
                f"{progress.nonfinite_in_a_row} steps in a row were not finite (--max_nonfinite_steps), the last with "
                f"{names}; check --dit and these caches, or lower --learning_rate; saved checkpoints are intact"
            )

    def stopping(self) -> bool:
        """Whether any process was asked to stop; all processes must call it together."""
        (asked,) = sum_over_processes(self.accelerator, [self.requests.asked_to_stop()])
        self.stopped |= asked > 0
        return self.stopped

    def begin(self) -> None:
        """Before the first step: validates the untrained model, and makes previews if --sample_at_first is given."""
        progress = self.progress
        self.trained.start_epoch()
        if self.validation_set is not None and progress.base_validation_loss is None:
            with self.trained.switched_off():
                progress.base_validation_loss = self.validate("base_validation_loss")
        if self.options.previews.sample_at_first and progress.step == 0 and not self.stopped:
            self.preview("000000")
        if progress.evaluation_is_due:
            self.evaluate()

    def after_step(self, asked_to_save: bool) -> None:
        """Validation, previews, checkpoints: in this order, so that a checkpoint knows its validation loss."""
        plan, progress = self.plan, self.progress
        self.evaluate()
        is_last = progress.step == plan.total_steps
        ended = plan.epoch_of(progress.step) if plan.ends_epoch(progress.step - 1) and not is_last else None
        self.save(asked_to_save, ended)
        if ended is not None:
            self.trained.start_epoch()

    def evaluate(self) -> None:
        """The validation and the previews that are due after a step; broken off, they are made when the run goes on."""
        plan, progress, previews = self.plan, self.progress, self.options.previews
        epoch_ended, epoch = plan.ends_epoch(progress.step - 1), plan.epoch_of(progress.step - 1) + 1
        progress.evaluation_is_due = True
        due = progress.step == plan.total_steps or self.validation_is_due(epoch_ended)
        if self.validation_set is not None and due and progress.validation_step != progress.step:
            loss = self.validate("validation_loss")
            if self.stopped:
                return
            progress.validation_loss, progress.validation_step = loss, progress.step
            if loss is not None:
                self.saver.save_best()
        if previews.sample_every_n_epochs is not None:
            if epoch_ended and is_multiple(epoch, previews.sample_every_n_epochs):
                self.preview(f"e{epoch:06d}")
        elif is_multiple(progress.step, previews.sample_every_n_steps):
            self.preview(f"{progress.step:06d}")
        progress.evaluation_is_due = self.stopped

    def save(self, asked: bool, finished_epoch: int | None) -> None:
        """Saves the checkpoints that are due after a step, and those that somebody asked for."""
        save, saver = self.options.save, self.saver
        asked = asked and not self.stopped
        with self.log.pause(), self.requests.uninterrupted():
            if finished_epoch is not None and is_multiple(finished_epoch, save.save_every_n_epochs):
                saver.save_epoch(finished_epoch)
            if is_multiple(self.progress.step, save.save_every_n_steps):
                saver.save_step(with_state=asked)
            elif asked:
                saver.save(saver.files.of_step(self.progress.step), state=True)

    def validation_is_due(self, epoch_ended: bool) -> bool:
        every = self.options.validation.validate_every_n_steps
        return epoch_ended if every is None else is_multiple(self.progress.step, every)

    def validate(self, name: str) -> float | None:
        """The mean validation loss; the log gets it under `name`, and its parts by sigma.

        None if it is not finite, or if somebody asks to stop before it is known.
        """
        log, step = self.log, self.progress.step
        sigmas = [sigma_at(quantile, self.options.timesteps) for quantile in QUANTILES]
        with log.pause(), self.trained.evaluation(), averaged_weights(self.optimizer):
            losses = validation_losses(
                self.denoiser, self.validation_set, sigmas, self.accelerator, self.progress.seed, self.stopping
            )
        if losses is None:
            return None
        mean = sum(losses) / len(losses)
        parts = {f"{1000 * sigma:.0f}": loss for sigma, loss in zip(sigmas, losses, strict=True)}
        if not math.isfinite(mean):
            log.say(f"{name} is not finite: {parts}")
            mean, parts = None, {}
        log.record(step, **{name: mean, "by_timestep": parts})
        if mean is not None:
            by_timestep = {f"{name}/timestep {key}": loss for key, loss in parts.items()}
            log.track({f"validation/{name}": mean, **by_timestep}, step)
        return mean

    def preview(self, moment: str) -> None:
        """Makes the previews on the main process, while the others wait; nothing without --sample_prompts."""
        if self.previewer is None:
            return
        with self.log.pause(), self.trained.evaluation(), averaged_weights(self.optimizer):
            if self.accelerator.is_main_process:
                self.previewer.run(self.denoiser.dit, moment, self.log, self.requests.asked_to_stop)
            self.accelerator.wait_for_everyone()
        self.stopping()

    def finish(self) -> None:
        """Saves the last checkpoint; a run that was stopped early saves its state too, to continue from.

        Raises:
            UserError: no step changed the weights.
        """
        save, saver, step = self.options.save, self.saver, self.progress.step
        with self.requests.uninterrupted():
            if step < self.plan.total_steps and self.updates:
                saver.save(saver.files.of_step(step), state=True)
            elif step == self.plan.total_steps and self.updates == 0 and self.log.skipped:
                raise UserError(
                    f"nothing was trained and nothing is written: the loss or the gradient of all {self.log.skipped} "
                    "steps was not finite; check --dit, the caches and --network_weights"
                )
            elif step == self.plan.total_steps:
                saver.save(saver.files.last(), state=save.save_state or save.save_state_on_train_end)

    def rescue(self) -> None:
        """Saves what was trained when a step cannot be finished; on the main process alone, others may be gone.

        If an update was under way, the checkpoint without a state, because the two may not belong together.
        """
        if self.updates == 0 or not self.accelerator.is_main_process:
            return
        stem = self.saver.files.of_step(self.progress.step)
        try:
            with self.requests.uninterrupted():
                self.saver.write(stem, state=not self.updating)
        except Exception as error:
            self.log.say(f"step {self.progress.step} could not be saved: {one_line(error)}")
        else:
            how = "" if self.updating else f"; to continue:\n  {self.saver.command()}"
            self.log.say(f"step {self.progress.step} is saved as {stem}{how}")

    def close(self) -> None:
        """Waits for uploads, closes the trackers, and prints what was done, and how a stopped run goes on."""
        self.saver.uploader.close()
        self.accelerator.end_training()
        if self.accelerator.is_main_process:
            rows = [("steps", f"{self.progress.step} of {self.plan.total_steps}"), *self.log.summary()]
            print_table("training", [*rows, *(("written", path) for path in self.saver.written)])
            if self.progress.step < self.plan.total_steps:
                how = f"; to continue:\n  {self.saver.command()}"
                print(
                    f"\nstopped{how if self.updates else ' before anything was trained; give the same command again'}"
                )


def is_multiple(number: int, of: int | None) -> bool:
    return of is not None and number % of == 0
