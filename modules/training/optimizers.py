"""Optimizers by short name or dotted path. Importing this module does not import torch."""

import contextlib
import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils.cli import option, unused_options
from utils.errors import UserError, did_you_mean, one_line
from utils.plugins import check_arguments, load_class, parse_arguments, refuse_taken, require_package

if TYPE_CHECKING:
    import torch

_PACKAGES = {
    "torch.optim": "Adadelta Adagrad Adam AdamW Adamax ASGD Muon NAdam RAdam RMSprop Rprop SGD",
    "transformers": "Adafactor",
    "bitsandbytes.optim": (
        "AdEMAMix AdEMAMix8bit PagedAdEMAMix PagedAdEMAMix8bit Adam8bit PagedAdam PagedAdam8bit AdamW8bit PagedAdamW "
        "PagedAdamW8bit PagedAdamW32bit Adagrad8bit LAMB LAMB8bit LARS LARS8bit Lion Lion8bit PagedLion PagedLion8bit "
        "RMSprop8bit SGD8bit"
    ),
    "prodigyopt": "Prodigy",
    "schedulefree": "AdamWScheduleFree RAdamScheduleFree SGDScheduleFree",
}
OPTIMIZERS = {name.lower(): f"{package}.{name}" for package, names in _PACKAGES.items() for name in names.split()}
_TAKEN = {"params": "the network", "lr": "--learning_rate"}
_SMALL_GRADIENT = 1e-4


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """optimizer"""

    optimizer_type: str = option(
        "AdamW", help="AdamW, AdamW8bit, Adafactor, Prodigy, ..., or a dotted path such as bitsandbytes.optim.Lion8bit"
    )
    optimizer_args: list[str] = option([], help="arguments of the optimizer, such as weight_decay=0.1 betas=0.9,0.99")
    learning_rate: float = option(2e-6, help="learning rate", minimum=0)

    def __post_init__(self) -> None:
        require_package(self.path, "--optimizer_type")
        refuse_taken(self.arguments, "--optimizer_args", _TAKEN)

    @property
    def path(self) -> str:
        """Dotted path of the class. Short names may be in any case; an empty name means AdamW."""
        name = self.optimizer_type or "AdamW"
        if "." in name:
            return name
        if name.lower() not in OPTIMIZERS:
            nearest = did_you_mean(name.lower(), list(OPTIMIZERS))
            raise UserError(
                f"--optimizer_type {name}: unknown{nearest}; a class of torch.optim or bitsandbytes.optim, Adafactor, "
                "or a dotted path package.Class is expected"
            )
        return OPTIMIZERS[name.lower()]

    @property
    def arguments(self) -> dict[str, Any]:
        """`optimizer_args` by name, as Python values."""
        return parse_arguments(self.optimizer_args, "--optimizer_args")

    @property
    def adapts_own_rate(self) -> bool:
        """Whether this is Adafactor with `relative_step`, its default: it sets its own learning rate."""
        return self.path == OPTIMIZERS["adafactor"] and self.arguments.get("relative_step", True)

    def ignored(self) -> list[str]:
        """The options that were changed but have no effect, for a warning."""
        return unused_options(self, {"learning_rate": not self.adapts_own_rate})

    @property
    def description(self) -> str:
        """`torch.optim.AdamW(weight_decay=0.1)`, for the metadata."""
        return self.path + (f"({','.join(self.optimizer_args)})" if self.optimizer_args else "")


def optimizer_class(options: OptimizerOptions) -> type:
    """Imports the optimizer and checks the names of its arguments."""
    # bitsandbytes reports on import which of its optional kernels a CPU lacks.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    cls = load_class(options.path, "--optimizer_type")
    check_arguments(cls, options.arguments, "--optimizer_args", _TAKEN)
    return cls


def create_optimizer(options: OptimizerOptions, parameter_groups: list[dict]) -> "torch.optim.Optimizer":
    """The optimizer for parameter groups; the `lr` of a group takes precedence over --learning_rate.

    Raises:
        UserError: unknown arguments, or values that the optimizer refuses.
    """
    cls = optimizer_class(options)
    rate = options.learning_rate
    if options.adapts_own_rate:
        rate = None
        parameter_groups = [{key: value for key, value in group.items() if key != "lr"} for group in parameter_groups]
    arguments = options.arguments
    if not arguments.keys() & {"foreach", "fused", "differentiable"}:
        arguments |= _kernels(cls, parameter_groups)
    try:
        optimizer = cls(parameter_groups, lr=rate, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"--optimizer_args: {cls.__name__} refuses {options.description}: {one_line(error)}") from error
    if _has_modes(optimizer):
        optimizer.train()
    return optimizer


def _kernels(cls: type, parameter_groups: list[dict]) -> dict[str, bool]:
    """Arguments for torch's own optimizers that save memory on CUDA.

    Their default there, "foreach", copies all states in every step: 24 GiB for AdamW on the whole model.
    """
    weights = [weight for group in parameter_groups for weight in group["params"]]
    if not cls.__module__.startswith("torch.optim.") or not all(weight.is_cuda for weight in weights):
        return {}
    # In half precision the fused kernels round later, so `try_optimizer` would not notice that states underflow.
    if cls.__name__ in ("Adam", "AdamW") and all(str(weight.dtype) == "torch.float32" for weight in weights):
        return {"fused": True}
    return {"foreach": False} if "foreach" in inspect.signature(cls).parameters else {}


def _has_modes(optimizer: "torch.optim.Optimizer") -> bool:
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


@contextlib.contextmanager
def averaged_weights(optimizer: "torch.optim.Optimizer") -> Iterator[None]:
    """Inside, the parameters are those to save, preview and validate; afterwards they are restored.

    Schedule-free optimizers (arXiv 2405.15682) compute gradients at one point and give an average of such points as the
    result. With every other optimizer this changes nothing.
    """
    if not _has_modes(optimizer):
        yield
        return
    # The optimizer's own way back to the training point rounds, so a validation would change the training. The copy is
    # kept in main memory, because validation and previews need the memory of the GPU.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        for parameter, value in zip(parameters, trained, strict=True):
            parameter.data.copy_(value)


def effective_rates(optimizer: "torch.optim.Optimizer") -> dict[str, float]:
    """The rate that Prodigy and D-Adaptation really use: their estimate d times the rate of the schedule."""
    groups = [group for group in optimizer.param_groups if "d" in group]
    return {f"d_times_lr/{index}": float(group["d"] * group["lr"]) for index, group in enumerate(groups)}


def try_optimizer(options: OptimizerOptions, dtype: "torch.dtype", device: "torch.device") -> float:
    """Takes one step on a small matrix; returns the bytes of optimizer state per weight on the device.

    The gradients are small, and zero in one row: with some optimizers their states underflow in half precision.

    Raises:
        UserError: the optimizer does not work with the dtype, or its states underflow and the weights become NaN.
    """
    import torch

    # Large enough for the paged optimizers of bitsandbytes, which page states from 100,000 weights on.
    weight = torch.nn.Parameter(torch.zeros(512, 512, dtype=dtype, device=device))
    weight.grad = torch.full_like(weight, _SMALL_GRADIENT)
    weight.grad[0] = 0
    optimizer = create_optimizer(options, [{"params": [weight]}])
    try:
        optimizer.step()
        problem = "" if weight.isfinite().all() else "its states underflow, and weights become NaN"
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        problem = one_line(error)
    if problem:
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"--optimizer_type {options.description}: does not work with {name} weights: {problem}; give "
            "--optimizer_type adafactor or adamw8bit, or a larger eps"
        )
    states = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    return sum(state.nbytes for state in states if state.device == weight.device) / weight.numel()
