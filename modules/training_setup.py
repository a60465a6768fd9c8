"""Builds what a training run needs besides its model: processes, seed, plan, log, trackers."""

import datetime
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list

from modules.step_plan import StepPlan
from modules.training_state import Progress
from utils.cli import print_table
from utils.errors import UserError, one_line
from utils.files import read_toml
from utils.training_options import DistributedOptions, LogOptions, TrainingOptions


def create_accelerator(training: TrainingOptions, log: LogOptions, distributed: DistributedOptions) -> Accelerator:
    """The processes of this run, as `accelerate launch` started them; one without it.

    Raises:
        UserError: the mixed precision needs another device.
    """
    torch.backends.cuda.matmul.allow_tf32 = training.cuda_allow_tf32
    torch.backends.cudnn.allow_tf32 = training.cuda_allow_tf32
    torch.backends.cudnn.benchmark = training.cuda_cudnn_benchmark
    timeout = distributed.ddp_timeout and datetime.timedelta(minutes=distributed.ddp_timeout)
    try:
        accelerator = Accelerator(
            # Without it, accelerate takes several processes on a machine without a GPU for separate runs.
            cpu=None if torch.accelerator.is_available() else True,
            mixed_precision=training.mixed_precision,
            log_with=log.trackers or None,
            project_dir=log.logging_dir and log.logging_dir / f"{log.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)] if timeout else [],
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
    """Opens TensorBoard and wandb as asked for; `settings` are the run's, as TOML."""
    if not options.trackers:
        return
    if options.wandb_api_key is not None:
        os.environ["WANDB_API_KEY"] = options.wandb_api_key
    arguments: dict[str, Any] = {}
    if options.log_tracker_config is not None:
        arguments = read_toml(options.log_tracker_config, "tracker config")
    if options.wandb_run_name is not None:
        arguments.setdefault("wandb", {})["name"] = options.wandb_run_name
    config = {"settings": settings} if options.log_config else None
    accelerator.init_trackers(options.log_tracker_name or "network_train", config, init_kwargs=arguments)


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


def warn_of_differences(progress: Progress, plan: StepPlan, items: int) -> None:
    """Says what a resumed run counts otherwise than before, and remembers the arithmetic."""
    arithmetic = {
        "batches per epoch": plan.batches_per_epoch,
        "batches per step": plan.batches_per_step,
        "items": items,
    }
    for difference in progress.differences(arithmetic):
        print(f"warning: --resume: {difference}; epochs are counted anew from step {progress.step}", file=sys.stderr)
    progress.arithmetic = arithmetic


def print_plan(plan: StepPlan, items: int, progress: Progress) -> None:
    """The arithmetic of the run."""
    steps_left = plan.total_steps - progress.step
    rows = [
        ("items, with repeats", items),
        ("batches per epoch", plan.batches_per_epoch),
        ("batches per step", f"{plan.batches_per_step} ({plan.processes} processes x {plan.accumulation} accumulated)"),
        ("steps per epoch", plan.steps_per_epoch),
        ("epochs", plan.total_epochs),
        ("steps", plan.total_steps if not progress.step else f"{plan.total_steps}, {steps_left} of them left"),
        ("seed", progress.seed),
    ]
    print_table("training plan", rows)


def loader_workers(wanted: int) -> int:
    """`--max_data_loader_n_workers`, but no more than there are cores to spare."""
    return min(wanted, max((os.cpu_count() or 1) - 1, 1))
