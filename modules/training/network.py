"""The protocol of network modules (`--network_module`): ours and third parties' are called in the same way.

What a module lacks of the optional methods is skipped.
"""

import contextlib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError, did_you_mean, one_line
from utils.plugins import refuse_taken

OWN_MODULES = ["networks.lora", "networks.loha", "networks.lokr"]


def import_network_module(name: str) -> ModuleType:
    """The module called `name`.

    Raises:
        UserError: it cannot be imported, or is no network module.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"--network_module '{name}': a dotted path such as networks.lora is expected")
    try:
        module = importlib.import_module(name)
    except Exception as error:  # what another's module does while it is imported is not ours to know
        package = name.split(".")[0]
        hint = did_you_mean(name, OWN_MODULES) or f"; is the package {package} installed?"
        raise UserError(f"--network_module {name}: cannot be imported: {one_line(error)}{hint}") from None
    if _creator(module) is None:
        raise UserError(f"--network_module {name}: has no create_arch_network; {', '.join(OWN_MODULES)} are ours")
    return module


def _creator(module: ModuleType, ending: str = "") -> Any:
    names = (f"create_arch_network{ending}", f"create_network{ending}")
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def create_network(
    module: ModuleType,
    dit: nn.Module,
    dim: int | None,
    alpha: float,
    dropout: float | None,
    arguments: Mapping[str, str],
) -> nn.Module:
    """A new network for the DiT.

    Raises:
        UserError: an argument is one that the trainer gives.
    """
    creator = _creator(module)
    ours = list(inspect.signature(creator).parameters)[:6]
    options = {"network_dim": "--network_dim", "network_alpha": "--network_alpha"}
    taken = dict.fromkeys(ours, "the trainer") | options | {"neuron_dropout": "--network_dropout"}
    refuse_taken(arguments, "--network_args", taken)
    return creator(1.0, dim, alpha, None, [], dit, neuron_dropout=dropout, **arguments)


def create_network_from_weights(module: ModuleType, dit: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """The network whose rank and alpha are those of `weights`.

    Raises:
        UserError: the module cannot do that.
    """
    creator = _creator(module, "_from_weights")
    if creator is None:
        raise UserError(f"--dim_from_weights: {module.__name__} cannot read the rank from weights; give --network_dim")
    if "file" in inspect.signature(creator).parameters:  # kohya's older signature
        network = creator(1.0, None, None, [], dit, weights_sd=weights, for_inference=False)
    else:
        network = creator(1.0, weights, text_encoders=[], unet=dit, for_inference=False)
    return network[0] if isinstance(network, tuple) else network


class TrainedNetwork:
    """A network that is applied to a frozen DiT and trained.

    Args:
        max_norm: largest norm of a module's weight change, None for no limit.
    """

    def __init__(self, network: nn.Module, dit: nn.Module, device: torch.device, max_norm: float | None = None) -> None:
        self.network, self.dit, self.device, self.max_norm = network, dit, device, max_norm
        network.apply_to([], dit, False, True)
        network.to(device, torch.float32)
        self._call("prepare_grad_etc", dit)

    def _call(self, method: str, *arguments: Any) -> Any:
        found = getattr(self.network, method, None)
        return None if found is None else found(*arguments)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every trained tensor by name."""
        return {name: tensor for name, tensor in self.network.named_parameters() if tensor.requires_grad}

    def sizes(self) -> tuple[int, float] | None:
        """Rank and alpha of our own networks, also where they came from a file."""
        adapters = getattr(self.network, "adapters", None)
        return (adapters[0].rank, float(adapters[0].alpha)) if adapters else None

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Groups for the optimizer; each holds its parameters under `params` and, where it differs, `lr`."""
        groups = self.network.prepare_optimizer_params(unet_lr=learning_rate)
        groups = groups[0] if isinstance(groups, tuple) else groups
        return [{**group, "params": list(group["params"])} for group in groups]

    def enable_gradient_checkpointing(self) -> None:
        self._call("enable_gradient_checkpointing")

    def start_epoch(self) -> None:
        self.network.train()
        self._call("on_epoch_start", self.dit)

    def start_step(self) -> None:
        self._call("on_step_start")

    def after_update(self) -> None:
        """Shrinks every module's weight change to at most `max_norm`."""
        if self.max_norm is not None:
            self._call("apply_max_norm_regularization", self.max_norm, self.device)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Without dropout, as the saved network is used later."""
        was_training = self.network.training
        self.network.eval()
        try:
            yield
        finally:
            self.network.train(was_training)

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        """The DiT as if the network were not there."""
        self._call("set_multiplier", 0.0)
        try:
            yield
        finally:
            self._call("set_multiplier", 1.0)

    def save(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        self.network.save_weights(str(path), dtype, dict(metadata))
