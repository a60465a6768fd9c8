"""Sets a training run up: processes, seed, datasets, plan and outputs before the model is loaded, then the trainer."""

import datetime
import functools
import os
import random
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from torch import nn

from dataset.config_utils import load_dataset_config
from dataset.image_video_dataset import TrainingDataset
from dataset.training_items import cached_items
from hunyuan_model import attention, checkpoints
from hunyuan_model.checkpoints.identification import CLIP, LLM, VAE, identify
from hunyuan_model.models import HunyuanVideoConfig, HYVideoDiffusionTransformer
from modules.generation.requests import Request
from modules.training.denoiser import Denoiser, Trained
from modules.training.files import HuggingFaceOptions
from modules.training.log import TrainingLog
from modules.training.loop import Trainer
from modules.training.optimizers import create_optimizer, optimizer_class
from modules.training.options import LogOptions, TrainerOptions
from modules.training.previews import Previewer, create_previewer
from modules.training.saver import CheckpointSaver, Uploader
from modules.training.schedulers import create_scheduler, follow_schedule, scheduler_class, try_schedule
from modules.training.state import Progress, load_state, resumed_options
from modules.training.step_plan import StepPlan, batch_loader
from modules.training.stop_requests import StopRequests
from utils.cli import print_table
from utils.device_utils import DTYPES
from utils.errors import UserError, one_line
from utils.files import read_toml, remove_leftovers, require_writable
from utils.processes import process_share

Options = TypeVar("Options", bound=TrainerOptions)


@dataclass
class TrainingSetup(Generic[Options]):
    """A run before its model is loaded.

    Attributes:
        state: the folder that the run continues from; None for a new run.
        notes: how the options differ from those of the state, in words.
        uploader: after `open_outputs`.
    """

    options: Options
    accelerator: Accelerator
    progress: Progress
    plan: StepPlan
    state: Path | None
    train_set: TrainingDataset
    validation_set: TrainingDataset | None
    notes: list[str]
    uploader: Uploader = field(init=False)

    @property
    def settings(self) -> str:
        return self.options.settings(self.progress.seed)

    def print_plan(self) -> None:
        """Prints how many items, batches, steps and epochs the run has, and which options have no effect."""
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

    def open_outputs(self) -> None:
        """Opens folder, repository and trackers, so that errors in them show before a model is loaded.

        Raises:
            UserError: one of them cannot be written to.
        """
        options, is_main = self.options, self.accelerator.is_main_process
        self.uploader = Uploader(options.hub if is_main else HuggingFaceOptions())
        if is_main:
            require_writable(options.save.output_dir, "--output_dir")
            remove_leftovers(options.save.output_dir)
        start_trackers(self.accelerator, options.log, self.settings)

    def create_previewer(self, requests: Sequence[Request]) -> Previewer | None:
        """Encodes the prompts and loads the VAE; call it before the DiT is loaded. None without requests."""
        return create_previewer(self.options, requests, self.accelerator, self.progress.seed)

    def build_trainer(self, dit: HYVideoDiffusionTransformer, trained: Trained, previewer: Previewer | None) -> Trainer:
        """The trainer of a loaded model, at the step of the run's state if there is one."""
        options, accelerator, progress, plan = self.options, self.accelerator, self.progress, self.plan
        # The schedule also advances in steps that are skipped because they were not finite.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        self._record_batch_counts()
        optimizer = create_optimizer(options.optimizer, trained.parameter_groups(options.optimizer.learning_rate))
        scheduler = create_scheduler(options.scheduler, optimizer, plan.total_steps)
        stateful = {"optimizer": optimizer, "scheduler": scheduler}
        if accelerator.scaler is not None:
            stateful["scaler"] = accelerator.scaler
            # The scaler is set up by its first loss, but in the first step this process may have no batch.
            accelerator.scaler.scale(torch.zeros((), device=accelerator.device))
        if self.state is not None:
            load_state(self.state, trained.tensors, stateful)
            follow_schedule(scheduler)
        workers = loader_workers(options.dataset.max_data_loader_n_workers)
        guidance, split_batches = options.training.guidance_scale, options.attention.split_attn
        return Trainer(
            options,
            accelerator,
            plan,
            progress,
            self.train_set,
            self.validation_set,
            denoiser=Denoiser(dit, guidance, accelerator.device, split_batches),
            trained=trained,
            optimizer=optimizer,
            scheduler=scheduler,
            loader=batch_loader(self.train_set, plan, accelerator.process_index, progress.step, workers),
            log=TrainingLog(options.files, accelerator, progress, plan.total_steps),
            saver=CheckpointSaver(
                options, accelerator, plan, progress, self.train_set, trained, stateful, self.uploader
            ),
            requests=StopRequests(options.save.output_dir, accelerator.is_main_process),
            previewer=previewer,
        )

    def _record_batch_counts(self) -> None:
        """Records the numbers of batches and items for later states; warns if they differ from the resumed state."""
        arithmetic = {
            "batches per epoch": self.plan.batches_per_epoch,
            "batches per step": self.plan.batches_per_step,
            "items": self.train_set.num_items,
        }
        step = self.progress.step
        for difference in self.progress.differences(arithmetic) if self.accelerator.is_main_process else []:
            print(f"warning: --resume: {difference}; epochs are counted anew from step {step}", file=sys.stderr)
        self.progress.arithmetic = arithmetic


def set_up(options: Options, state: Path | None) -> TrainingSetup[Options]:
    """Starts the processes, reads the datasets and tries the optimizer; a resumed run keeps options of its state.

    Raises:
        UserError: options, datasets or state do not fit together.
    """
    options, notes = resumed_options(options, state)
    training = options.training
    accelerator = create_accelerator(options)
    silence_all_but_main(accelerator)
    progress = first_progress(accelerator, training.seed, state)
    train_set, validation_set = load_datasets(options, progress.seed)
    plan = StepPlan.create(
        len(train_set),
        training.gradient_accumulation_steps,
        accelerator.num_processes,
        training.max_train_steps,
        training.max_train_epochs,
    )
    # What optimizer and schedule refuse shows here, before a model is loaded.
    optimizer = create_optimizer(options.optimizer, [{"params": [nn.Parameter(torch.zeros(2, 2))]}])
    try_schedule(options.scheduler, optimizer, plan.total_steps)
    if progress.step > plan.total_steps:
        raise UserError(
            f"--max_train_steps or --max_train_epochs: {plan.total_steps} steps, and {state} is already at step "
            f"{progress.step}; give more, or leave --resume out to start a new run"
        )
    return TrainingSetup(options, accelerator, progress, plan, state, train_set, validation_set, notes)


def check_choices(options: TrainerOptions) -> None:
    """Checks that optimizer, schedule and attention exist, and that the model files of previews are the right kind.

    Raises:
        UserError: one does not exist or is of another kind.
    """
    optimizer_class(options.optimizer)
    scheduler_class(options.scheduler)
    attention.attention_backend(options.attention.mode)
    if options.previews.sample_prompts is not None:
        identify(options.vae.vae).tensors(VAE)
        identify(options.text.text_encoder1).tensors(LLM)
        identify(options.text.text_encoder2).tensors(CLIP)


def create_accelerator(options: TrainerOptions) -> Accelerator:
    """The processes of this run, as `accelerate launch` started them; without it a single one.

    Raises:
        UserError: the mixed precision needs another device.
    """
    precision, log = options.precision, options.log
    torch.backends.cuda.matmul.allow_tf32 = precision.cuda_allow_tf32
    torch.backends.cudnn.allow_tf32 = precision.cuda_allow_tf32
    torch.backends.cudnn.benchmark = precision.cuda_cudnn_benchmark
    timeout = datetime.timedelta(minutes=options.distributed.ddp_timeout)
    try:
        accelerator = Accelerator(
            # Unless it is told, accelerate takes several processes on a machine without a GPU for separate runs.
            cpu=None if torch.accelerator.is_available() else True,
            mixed_precision=precision.mixed_precision,
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
    """Only the main process prints."""
    if not accelerator.is_main_process:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends


def start_trackers(accelerator: Accelerator, options: LogOptions, settings: str) -> None:
    """Opens TensorBoard and wandb as the options say; `settings` are those of the run, as TOML.

    Raises:
        UserError: --log_tracker_config names another tracker, or a tracker refuses its arguments.
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
    except Exception as error:  # the trackers' libraries raise errors of any kind
        raise UserError(f"--log_with {' '.join(options.trackers)}: cannot start: {one_line(error)}") from error


def first_progress(accelerator: Accelerator, seed: int | None, state: Path | None) -> Progress:
    """The counters to start from: those of the state, or zero, with a seed that all processes share.

    Args:
        seed: --seed.

    Raises:
        UserError: --seed is not that of the state.
    """
    if state is not None:
        progress = Progress.load(state)
        if seed is not None and seed != progress.seed:
            raise UserError(
                f"--seed {seed}: the run in {state} has seed {progress.seed}; leave --seed out to continue it"
            )
        return progress
    seed = seed if seed is not None else random.SystemRandom().randrange(2**32)
    session = random.SystemRandom().randrange(2**32)
    seed, session = broadcast_object_list([seed, session])
    return Progress(seed=seed, session_id=session, started_at=time.time())


def load_datasets(options: TrainerOptions, seed: int) -> tuple[TrainingDataset, TrainingDataset | None]:
    """The training set, and the validation set if one is asked for.

    Raises:
        UserError: one of them is empty, or caches are missing.
    """
    config = load_dataset_config(options.dataset.dataset_config)
    split = options.validation.validation_split
    is_first = process_share()[0] == 0
    items_of = functools.cache(functools.partial(cached_items, show_progress=is_first))
    train_set = TrainingDataset(config, seed, subset="train", validation_split=split, items_of=items_of)
    for note in (*config.notes, *train_set.notes) if is_first else ():
        print(f"note: {note}", file=sys.stderr)
    if not split and not config.validation:
        return train_set, None
    validation_set = TrainingDataset(config, seed, subset="validation", validation_split=split, items_of=items_of)
    if not len(validation_set):
        raise UserError(
            f"{config.path}: nothing is held out for validation (--validation_split {split:g}), because a source is "
            "never split; give more sources, or a [[validation]] set with items"
        )
    return train_set, validation_set


def read_dit_config(options: TrainerOptions, train_set: TrainingDataset) -> HunyuanVideoConfig:
    """The config of the DiT, after comparing it with the caches.

    Raises:
        UserError: not a HunyuanVideo DiT, or the caches were made with other models.
    """
    path, batch = options.dit.dit, train_set[0]
    config = checkpoints.read_dit_config(path)
    channels = options.dit.dit_in_channels
    if channels is not None and channels != config.in_channels:
        raise UserError(f"--dit_in_channels {channels}: {path} has {config.in_channels} input channels")
    latent_channels = batch.latents.shape[1]
    if config.in_channels not in (latent_channels, 2 * latent_channels):
        raise UserError(
            f"{path}: {config.in_channels} input channels; only {latent_channels} (text to video) and "
            f"{2 * latent_channels} (latents and an image, as in SkyReels-V1-I2V) can be trained"
        )
    if config.in_channels != latent_channels and options.previews.sample_prompts is not None:
        raise UserError(
            f"--sample_prompts: {path} makes videos of an image, and previews have no image to start from; leave it out"
        )
    dims = (batch.text_states.shape[-1], batch.text_states_2.shape[-1])
    if dims != (config.text_dim, config.text_dim_2):
        raise UserError(
            f"{options.dataset.dataset_config}: text caches have {dims[0]} and {dims[1]} channels, {path} "
            f"takes {config.text_dim} and {config.text_dim_2}; run cache_text_encoder_outputs.py with its encoders"
        )
    return config


def verify_attention(options: TrainerOptions, accelerator: Accelerator, weights: torch.dtype) -> None:
    """Tries the attention in the dtype in which training computes: that of autocast, else that of the weights.

    Raises:
        UserError: it does not run with this device and dtype, or its result is wrong.
    """
    computed = DTYPES.get(accelerator.mixed_precision, weights)
    head_dim = checkpoints.read_dit_config(options.dit.dit).head_dim
    attention.verify_attention(options.attention.mode, accelerator.device, computed, head_dim)


def loader_workers(wanted: int) -> int:
    """`--max_data_loader_n_workers`, but at most the number of cores minus one."""
    return min(wanted, max((os.cpu_count() or 1) - 1, 1))
