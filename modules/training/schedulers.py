"""Learning-rate schedules. Importing this module does not import torch.

All are LambdaLR or similar: their rates depend on the step alone, so a resumed run continues with the same rates. They
count optimizer steps: call `step()` once after each, whatever the number of processes.
"""

import functools
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils.cli import option, unused_options
from utils.errors import UserError, one_line
from utils.plugins import check_arguments, load_class, parse_arguments, require_package

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

# Schedules that need no import of transformers, which takes seconds; two of them are not in transformers.
_OWN = ("constant", "piecewise_constant", "rex")
SCHEDULES = (
    *_OWN,
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
    "adafactor",
)


REX_FLOOR = 0.01  # share of the rate at which rex ends, as in musubi-tuner; the paper has 0


class Steps(float):
    """A number of steps, or a share of all steps: `100`, `0.05` or `5%`."""

    expected = "a number of steps (100) or a share of all steps (0.05 or 5%)"

    def __new__(cls, text: object) -> "Steps":
        word = str(text).strip()
        value = float(word[:-1]) / 100 if word.endswith("%") else float(word)
        if not (0 <= value < 1 or (value.is_integer() and value > 0)):
            raise ValueError(word)
        return super().__new__(cls, value)

    def __str__(self) -> str:
        return f"{float(self):g}"

    def of(self, total: int) -> int:
        """The number of steps in a run of `total` steps."""
        return int(self * total) if self < 1 else int(self)


@dataclass(frozen=True, kw_only=True)
class SchedulerOptions:
    """learning-rate schedule"""

    lr_scheduler: str = option("constant", help="schedule of the learning rate", choices=SCHEDULES)
    lr_warmup_steps: Steps = option(Steps(0), help="steps, or share of all steps, over which the rate rises from 0")
    lr_decay_steps: Steps = option(Steps(0), help="steps, or share of all steps, over which warmup_stable_decay falls")
    lr_scheduler_num_cycles: int = option(1, help="number of cosine waves", minimum=1)
    lr_scheduler_power: float = option(1.0, help="power of the polynomial", minimum=0)
    lr_scheduler_timescale: int | None = option(
        None, help="time scale of inverse_sqrt; unset: the warm-up steps", minimum=1
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None, help="lowest rate, as a share of --learning_rate; unset: 0.01 for rex, else 0", minimum=0, maximum=1
    )
    lr_scheduler_type: str | None = option(
        None, help="class to use instead of --lr_scheduler: dotted path, or a name in torch.optim.lr_scheduler"
    )
    lr_scheduler_args: list[str] = option([], help="arguments of the scheduler, such as T_max=100")

    def __post_init__(self) -> None:
        arguments = self.arguments
        if self.lr_scheduler_type:
            require_package(self.custom_path, "--lr_scheduler_type")
        elif self.lr_scheduler == "piecewise_constant":
            parse_step_rules(arguments.get("step_rules"))
        elif self._needs_lowest_rate and not arguments.keys() & {"min_lr", "min_lr_rate"}:
            raise UserError(f"--lr_scheduler {self.lr_scheduler}: needs --lr_scheduler_min_lr_ratio, for example 0.1")

    @property
    def _needs_lowest_rate(self) -> bool:
        return "min_lr" in self.lr_scheduler and self.lr_scheduler_min_lr_ratio is None

    @property
    def custom_path(self) -> str:
        """Dotted path of `lr_scheduler_type`."""
        name = self.lr_scheduler_type
        return name if "." in name else f"torch.optim.lr_scheduler.{name}"

    @property
    def arguments(self) -> dict[str, Any]:
        """`lr_scheduler_args` by name, as Python values."""
        return parse_arguments(self.lr_scheduler_args, "--lr_scheduler_args")

    @property
    def description(self) -> str:
        """Name for the metadata."""
        return self.lr_scheduler_type or self.lr_scheduler

    def ignored(self, own_rate: bool = False) -> list[str]:
        """The options that were changed but have no effect with the chosen schedule.

        Args:
            own_rate: `OptimizerOptions.adapts_own_rate`.
        """
        name = "custom" if self.lr_scheduler_type else "adafactor" if own_rate else self.lr_scheduler
        used = {
            "lr_scheduler": name in ("custom", self.lr_scheduler),
            "lr_warmup_steps": name not in ("custom", "constant", "piecewise_constant", "adafactor"),
            "lr_decay_steps": name == "warmup_stable_decay",
            "lr_scheduler_num_cycles": name in ("cosine_with_restarts", "warmup_stable_decay") or "min_lr" in name,
            "lr_scheduler_power": name == "polynomial",
            "lr_scheduler_timescale": name == "inverse_sqrt",
            "lr_scheduler_min_lr_ratio": name in ("warmup_stable_decay", "rex") or "min_lr" in name,
            "lr_scheduler_args": name not in ("constant", "constant_with_warmup"),
        }
        return unused_options(self, used)


def parse_step_rules(rules: object) -> tuple[tuple[tuple[int, float], ...], float]:
    """`"1:10,0.1:20,0.01"`: the full rate before step 10, a tenth of it before step 20, then a hundredth.

    Returns:
        ((10, 1.0), (20, 0.1)) and 0.01.
    """
    try:
        *parts, last = rules.split(",")
        pairs = sorted((int(step), float(factor)) for factor, _, step in (part.partition(":") for part in parts))
        return tuple(pairs), float(last)
    except (AttributeError, ValueError):
        example = "--lr_scheduler_args \"step_rules='1:10,0.1:20,0.01'\""
        raise UserError(f"--lr_scheduler piecewise_constant: step_rules = {rules!r}; write {example}") from None


def piecewise_factor(step: int, pairs: tuple[tuple[int, float], ...], last: float) -> float:
    """The factor of the first pair whose step is not reached yet."""
    return next((factor for end, factor in pairs if step < end), last)


def rex_factor(step: int, *, warmup: int, total: int, floor: float, rex_alpha: float, rex_beta: float) -> float:
    """REX (arXiv 2107.04197): r / (alpha + beta r), where r is the remaining share of the run, from 1 down to 0.

    The paper has alpha = beta = 1/2; the defaults 0.1 and 0.9 keep the rate high for longer.
    """
    if step < warmup:
        return step / warmup
    remaining = max(total - step, 0) / max(total - warmup, 1)
    return floor + (1 - floor) * remaining / (rex_alpha + rex_beta * remaining)


def create_scheduler(options: SchedulerOptions, optimizer: "Optimizer", total_steps: int) -> "LRScheduler":
    """Builds the schedule for a run of `total_steps` optimizer steps.

    Raises:
        UserError: the steps do not fit into the run, or arguments that the schedule does not know or refuses.
    """
    warmup, decay = options.lr_warmup_steps.of(total_steps), options.lr_decay_steps.of(total_steps)
    if warmup + decay > total_steps:
        raise UserError(f"--lr_warmup_steps {warmup} + --lr_decay_steps {decay}: the run has {total_steps} steps")
    try:
        if options.lr_scheduler_type:
            return _custom(options, optimizer)
        if options.lr_scheduler == "adafactor" or optimizer.defaults.get("relative_step"):
            return _adafactor(options, optimizer)
        if options.lr_scheduler in _OWN:
            return _own(options, optimizer, warmup, total_steps)
        return _from_transformers(options, optimizer, warmup, decay, total_steps)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        name = options.description
        raise UserError(
            f"--lr_scheduler_args {' '.join(options.lr_scheduler_args)}: {name}: {one_line(error)}"
        ) from error


def try_schedule(options: SchedulerOptions, optimizer: "Optimizer", total_steps: int) -> None:
    """Goes once through the rates of a run, so that a schedule that ends too early shows before the first step.

    Raises:
        UserError: a rate cannot be computed or is not finite, or what `create_scheduler` raises.
    """
    step = 0
    try:
        scheduler = create_scheduler(options, optimizer, total_steps)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for step in range(1, total_steps + 1):  # noqa: B007 - for the message
                scheduler.step()
                if not all(map(math.isfinite, scheduler.get_last_lr())):
                    raise ValueError(f"the rate is {scheduler.get_last_lr()[0]}")
    except UserError:
        raise
    except Exception as error:  # a class of the user's choice may raise anything
        arguments = f" with {' '.join(options.lr_scheduler_args)}" if options.lr_scheduler_args else ""
        raise UserError(
            f"--lr_scheduler {options.description}{arguments}: has no rate after step {step} of {total_steps}: "
            f"{one_line(error)}; make it as long as the run"
        ) from None


def follow_schedule(scheduler: "LRScheduler") -> None:
    """Sets the rates of the current step, after the optimizer of a state brought those of the saved schedule.

    The schedule of a resumed run may be longer. Custom schedules keep their arguments, and so their rates.
    """
    from torch.optim.lr_scheduler import LambdaLR

    if type(scheduler) is LambdaLR:  # that of Adafactor is derived from it, and asks the optimizer
        step, factors = scheduler.last_epoch, scheduler.lr_lambdas
        rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates


def scheduler_class(options: SchedulerOptions) -> type | None:
    """Imports the class of --lr_scheduler_type and checks the names of its arguments; None without one."""
    if not options.lr_scheduler_type:
        return None
    cls = load_class(options.custom_path, "--lr_scheduler_type")
    if cls.__name__ == "ReduceLROnPlateau":
        raise UserError("--lr_scheduler_type ReduceLROnPlateau: needs a validation loss in each step; choose another")
    check_arguments(cls, options.arguments, "--lr_scheduler_args", {"optimizer": "--optimizer_type"})
    return cls


def _custom(options: SchedulerOptions, optimizer: "Optimizer") -> "LRScheduler":
    return scheduler_class(options)(optimizer, **options.arguments)


def _adafactor(options: SchedulerOptions, optimizer: "Optimizer") -> "LRScheduler":
    from transformers.optimization import AdafactorSchedule

    if not optimizer.defaults.get("relative_step"):
        raise UserError(
            "--lr_scheduler adafactor: needs --optimizer_type Adafactor with relative_step=True, its default"
        )

    class FloatAdafactorSchedule(AdafactorSchedule):
        def get_lr(self) -> list[float]:
            return [float(rate) for rate in super().get_lr()]  # tensors, which cannot be logged as JSON

    return FloatAdafactorSchedule(optimizer, **options.arguments)


def _own(options: SchedulerOptions, optimizer: "Optimizer", warmup: int, total: int) -> "LRScheduler":
    from torch.optim.lr_scheduler import ConstantLR, LambdaLR

    if options.lr_scheduler == "constant":
        if options.arguments:
            # The arguments have no effect, but states saved with them contain the state of a ConstantLR.
            return ConstantLR(optimizer, factor=1.0)
        return LambdaLR(optimizer, functools.partial(piecewise_factor, pairs=(), last=1.0))
    if options.lr_scheduler == "piecewise_constant":
        pairs, last = parse_step_rules(options.arguments["step_rules"])
        return LambdaLR(optimizer, functools.partial(piecewise_factor, pairs=pairs, last=last))
    shape = {"rex_alpha": 0.1, "rex_beta": 0.9} | options.arguments
    floor = REX_FLOOR if options.lr_scheduler_min_lr_ratio is None else options.lr_scheduler_min_lr_ratio
    return LambdaLR(optimizer, functools.partial(rex_factor, warmup=warmup, total=total, floor=floor, **shape))


def _from_transformers(
    options: SchedulerOptions, optimizer: "Optimizer", warmup: int, decay: int, total: int
) -> "LRScheduler":
    from transformers import get_scheduler

    cycles, lowest = options.lr_scheduler_num_cycles, options.lr_scheduler_min_lr_ratio
    # For these schedules, transformers counts one fall of the cosine as half a cycle.
    shape: dict[str, Any] = {
        "cosine_with_restarts": {"num_cycles": cycles},
        "polynomial": {"power": options.lr_scheduler_power},
        "inverse_sqrt": {"timescale": options.lr_scheduler_timescale},
        "cosine_with_min_lr": {"num_cycles": cycles / 2, "min_lr_rate": lowest},
        "cosine_warmup_with_min_lr": {"num_cycles": cycles / 2, "min_lr_rate": lowest},
        "warmup_stable_decay": {"num_cycles": cycles / 2, "num_decay_steps": decay, "min_lr_ratio": lowest or 0.0},
    }.get(options.lr_scheduler, {})
    return get_scheduler(options.lr_scheduler, optimizer, warmup, total, shape | options.arguments)
