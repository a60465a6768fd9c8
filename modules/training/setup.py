"""Builds a training run around a model: processes, seed, plan, optimizer, log, checkpoints."""

import datetime
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from torch import nn

from modules.training.denoiser import Trained, TrainingModel
from modules.training.huggingface_utils import HuggingFaceOptions, Uploader
from modules.training.log import TrainingLog
from modules.training.loop import Trainer
from modules.training.optimizers import create_optimizer
from modules.training.previews import Previewer
from modules.training.resumed_options import continued
from modules.training.saver import CheckpointSaver
from modules.training.schedulers import create_scheduler
from modules.training.state import Progress, load_state
from modules.training.step_plan import StepPlan, batch_loader
from modules.training.stop_requests import StopRequests
from modules.training.trainer_options import TrainerOptions
from modules.training.training_options import DistributedOptions, LogOptions, TrainingOptions
from networks.files.metadata import RunFacts
from utils.cli import print_table
from utils.device_utils import DTYPES
from utils.errors import UserError, one_line
from utils.files import read_toml, require_writable


def create_accelerator(training: TrainingOptions, log: LogOptions, distributed: DistributedOptions) -> Accelerator:
    """The processes of this run, as `accelerate launch` started them; one without it.

    Raises:
        UserError: the mixed precision needs another device.
    """
    torch.backends.cuda.matmul.allow_tf32 = training.cuda_allow_tf32
    torch.backends.cudnn.allow_tf32 = training.cuda_allow_tf32
    torch.backends.cudnn.benchmark = training.cuda_cudnn_benchmark
    timeout = datetime.timedelta(minutes=distributed.ddp_timeout)
    try:
        accelerator = Accelerator(
            # Without it, accelerate takes several processes on a machine without a GPU for separate runs.
            cpu=None if torch.accelerator.is_available() else True,
            mixed_precision=training.mixed_precision,
            log_with=log.trackers or None,
            project_dir=log.logging_dir and log.logging_dir / f"{log.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"--mixed_precision or --log_with: {one_line(error)}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16: a CPU has no autocast to float16; use bf16 or no")
    return accelerator


def silence_all_but_main(accelerator: Accelerator) -> None:
    """One process speaks for all."""
    if not accelerator.is_main_process:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends


def start_trackers(accelerator: Accelerator, options: LogOptions, settings: str) -> None:
    """Opens TensorBoard and wandb as asked for; `settings` are the run's, as TOML.

    Raises:
        UserError: their config names others, or they refuse it.
    """
    if not options.trackers:
        return
    if options.wandb_api_key is not None:
        os.environ["WANDB_API_KEY"] = options.wandb_api_key
    arguments: dict[str, Any] = {}
    if options.log_tracker_config is not None:
        arguments = read_toml(options.log_tracker_config, "tracker config")
        for name, table in arguments.items():
            if name not in options.trackers or not isinstance(table, dict):
                tables = " or ".join(f"[{tracker}]" for tracker in options.trackers)
                raise UserError(f"{options.log_tracker_config}: '{name}': only the tables {tables} are expected")
    if options.wandb_run_name is not None:
        arguments.setdefault("wandb", {})["name"] = options.wandb_run_name
    config = {"settings": settings} if options.log_config else None
    try:
        accelerator.init_trackers(options.log_tracker_name or "network_train", config, init_kwargs=arguments)
    except Exception as error:  # what the trackers' libraries raise is theirs
        raise UserError(f"--log_with {' '.join(options.trackers)}: cannot start: {one_line(error)}") from error


def first_progress(accelerator: Accelerator, training: TrainingOptions, state: Path | None) -> Progress:
    """The counters to start from: those of a state, or zero with a seed that all processes share."""
    if state is not None:
        progress = Progress.load(state)
        if training.seed is not None and training.seed != progress.seed:
            raise UserError(
                f"--seed {training.seed}: the run in {state} has seed {progress.seed}; leave --seed out to continue it"
            )
        return progress
    seed = training.seed if training.seed is not None else random.SystemRandom().randrange(2**32)
    session = random.SystemRandom().randrange(2**32)
    seed, session = broadcast_object_list([seed, session])
    return Progress(seed=seed, session_id=session, started_at=time.time())


@dataclass
class Run:
    """A training run before its model is there.

    Attributes:
        state: the folder it continues from.
        train_set, validation_set: `batch_of(epoch, index)`, item i is a batch, `num_items`, `description()`.
        notes: how its options differ from those of the state.
        uploader: after `open_outputs`.
    """

    options: TrainerOptions
    accelerator: Accelerator
    progress: Progress
    plan: StepPlan
    state: Path | None
    train_set: Any
    validation_set: Any
    notes: list[str]
    uploader: Uploader = field(init=False)

    @property
    def settings(self) -> str:
        return self.options.settings(self.progress.seed)

    def check_optimizer(self) -> None:
        """Tries optimizer and schedule on a parameter, so that what they refuse is known before a model is loaded."""
        optimizer = create_optimizer(self.options.optimizer, [{"params": [nn.Parameter(torch.zeros(2, 2))]}])
        create_scheduler(self.options.scheduler, optimizer, self.plan.total_steps)

    def open_outputs(self) -> None:
        """Opens folder, repository and trackers, so that what they refuse is known before a model is loaded.

        Raises:
            UserError: one of them cannot be written to.
        """
        options, main = self.options, self.accelerator.is_main_process
        self.uploader = Uploader(options.hub if main else HuggingFaceOptions())
        if main:
            require_writable(options.save.output_dir, "--output_dir")
            options.files.remove_leftovers()
        start_trackers(self.accelerator, options.log, self.settings)

    def print_plan(self) -> None:
        """The arithmetic of the run, and which settings have no effect."""
        plan, step = self.plan, self.progress.step
        per_step = f"{plan.batches_per_step} ({plan.processes} processes x {plan.accumulation} accumulated)"
        rows = [
            ("items, with repeats", self.train_set.num_items),
            ("batches per epoch", plan.batches_per_epoch),
            ("batches per step", per_step),
            ("steps per epoch", plan.steps_per_epoch),
            ("epochs", plan.total_epochs),
            ("steps", f"{plan.total_steps}, {plan.total_steps - step} of them left" if step else plan.total_steps),
            ("seed", self.progress.seed),
        ]
        if self.accelerator.is_main_process:
            print_table("training plan", rows)
            ignored = self.options.ignored(validates=self.validation_set is not None)
            unused = [f"--{name} has no effect together with the other settings" for name in ignored]
            for note in (*unused, *self.notes):
                print(f"warning: {note}", file=sys.stderr)

    def remember_arithmetic(self) -> None:
        """Puts into the state what its steps mean, and says what a resumed run counts otherwise than before."""
        arithmetic = {
            "batches per epoch": self.plan.batches_per_epoch,
            "batches per step": self.plan.batches_per_step,
            "items": self.train_set.num_items,
        }
        step = self.progress.step
        for difference in self.progress.differences(arithmetic) if self.accelerator.is_main_process else []:
            print(f"warning: --resume: {difference}; epochs are counted anew from step {step}", file=sys.stderr)
        self.progress.arithmetic = arithmetic

    def facts(self, progress: Progress, **model: Any) -> RunFacts:
        """What a checkpoint's metadata say of the run; `model` are the facts on model and network."""
        options, plan = self.options, self.plan
        return RunFacts(
            session_id=progress.session_id,
            training_started_at=progress.started_at,
            training_finished_at=time.time(),
            num_train_items=self.train_set.num_items,
            num_batches_per_epoch=plan.batches_per_epoch,
            num_epochs=plan.total_epochs,
            max_train_steps=plan.total_steps,
            steps=progress.step,
            epoch=plan.epoch_of(max(progress.step - 1, 0)) + 1,
            seed=progress.seed,
            optimizer=options.optimizer.description,
            lr_scheduler=options.scheduler.description,
            lr_warmup_steps=options.scheduler.lr_warmup_steps.of(plan.total_steps),
            mixed_precision=self.accelerator.mixed_precision,
            datasets=self.train_set.description(),
            validation=progress.validation_facts(),
            **model,
        )


def prepare_run(options: TrainerOptions, state: Path | None, load_datasets: Callable[[int], tuple[Any, Any]]) -> Run:
    """Starts the processes and reads the datasets; the run's options are those that its state leaves.

    Args:
        load_datasets: seed -> training set, validation set or None.
    """
    options, notes = continued(options, state)
    training = options.training
    accelerator = create_accelerator(training, options.log, options.distributed)
    silence_all_but_main(accelerator)
    progress = first_progress(accelerator, training, state)
    train_set, validation_set = load_datasets(progress.seed)
    plan = StepPlan.create(
        len(train_set),
        training.gradient_accumulation_steps,
        accelerator.num_processes,
        training.max_train_steps,
        training.max_train_epochs,
    )
    return Run(options, accelerator, progress, plan, state, train_set, validation_set, notes)


def build_trainer(
    run: Run,
    model: TrainingModel,
    trained: Trained,
    previewer: Previewer | None,
    metadata: Callable[[Progress], Mapping[str, str]],
    extra_formats: Callable[[Path], Sequence[Path]],
) -> Trainer:
    """Everything that the loop needs, continued from the run's state where there is one.

    Args:
        metadata: of a checkpoint.
        extra_formats: writes the other layouts of a checkpoint and returns their paths.
    """
    options, accelerator, progress = run.options, run.accelerator, run.progress
    # A step that is skipped because it was not finite moves the schedule all the same.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    run.remember_arithmetic()
    optimizer = create_optimizer(options.optimizer, trained.parameter_groups(options.optimizer.learning_rate))
    scheduler = create_scheduler(options.scheduler, optimizer, run.plan.total_steps)
    stateful = {"optimizer": optimizer, "scheduler": scheduler}
    if accelerator.scaler is not None:
        stateful["scaler"] = accelerator.scaler
        # Its scale comes with the first loss, but the first step of this process may have no batch.
        accelerator.scaler.scale(torch.zeros((), device=accelerator.device))
    if run.state is not None:
        load_state(run.state, trained.tensors, stateful)
    return Trainer(
        options,
        accelerator,
        run.plan,
        progress,
        model,
        trained,
        optimizer,
        scheduler,
        loader=batch_loader(
            run.train_set,
            run.plan,
            accelerator.process_index,
            progress.step,
            loader_workers(options.dataset.max_data_loader_n_workers),
        ),
        log=TrainingLog(options.files, accelerator, progress, run.plan.total_steps),
        saver=CheckpointSaver(
            options.files,
            options.save,
            DTYPES[options.saved_dtype],
            accelerator,
            trained,
            stateful,
            run.settings,
            options.validation.keep_best,
            metadata,
            extra_formats,
            run.uploader,
        ),
        requests=StopRequests(options.save.output_dir, accelerator.is_main_process),
        validation=run.validation_set,
        previewer=previewer,
    )


def close_run(trainer: Trainer) -> None:
    """Waits for uploads, closes the trackers, and says what was done."""
    trainer.saver.uploader.close()
    trainer.accelerator.end_training()
    if trainer.accelerator.is_main_process:
        rows = [("steps", f"{trainer.progress.step} of {trainer.plan.total_steps}"), *trainer.log.summary()]
        print_table("training", [*rows, *(("written", path) for path in trainer.saver.written)])


def loader_workers(wanted: int) -> int:
    """`--max_data_loader_n_workers`, but no more than there are cores to spare."""
    return min(wanted, max((os.cpu_count() or 1) - 1, 1))
