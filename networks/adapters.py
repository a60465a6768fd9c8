"""What LoRA, LoHa and LoKr share: applied to a DiT from outside, trained, saved and loaded in the same way."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from networks.factors import Factors
from networks.files.format_table import NATIVE
from networks.files.lora_files import load_native, native_tensors, save_native
from networks.targets import find_targets, is_linear, read_arguments
from utils.errors import UserError
from utils.wrap_forward import WrapperKind, wrap_forward

DEFAULT_RANK = 4
SMALL_SCALE = 0.1


class AdapterModule(nn.Module):
    """Adds a trained update to the output of one frozen Linear, its target.

    A subclass defines the update: `update` computes it in the forward pass, `factors` returns the trained matrices.

    Args:
        target: a Linear, plain or quantised: in_features, out_features, weight (out, in).
        rank: rank of the factors.
        alpha: the update is scaled by alpha / rank.
        multiplier: factor of the whole update.
        dropout: probability of dropping a value between the factors; training only, as are the next two.
        rank_dropout: probability of dropping a rank, drawn for each sample.
        module_dropout: probability of dropping the whole update.
    """

    def __init__(
        self,
        target: nn.Module,
        rank: int,
        alpha: float,
        multiplier: float = 1.0,
        dropout: float | None = None,
        rank_dropout: float | None = None,
        module_dropout: float | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = target.in_features, target.out_features
        self.rank = rank
        self.multiplier = multiplier
        self.dropout = dropout or 0.0
        self.rank_dropout = rank_dropout or 0.0
        self.module_dropout = module_dropout or 0.0
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.scale = float(alpha) / rank
        # In a tuple, because nn.Module would register a plain attribute as a submodule.
        self._target = (target,)

    @property
    def target(self) -> nn.Module:
        return self._target[0]

    def apply_to_target(self) -> None:
        """From now on the target's output has the update added."""
        wrap_forward(self.target, WrapperKind.OUTPUT_CHANGE, self.forward)

    def forward(self, target_forward: Callable, x: torch.Tensor) -> torch.Tensor:
        """Runs the target on x (..., in_features) and adds the update: (..., out_features)."""
        y = target_forward(x)
        if self.training and self.module_dropout and torch.rand(()) < self.module_dropout:
            return y
        return self.add_update(target_forward, x, y)

    def add_update(self, target_forward: Callable, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The target's output `y` for `x`, with the update added."""
        return y + self.update(x, self.scale * self.multiplier).to(y.dtype)

    def update(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        """`scale` times the change of the target's output: x (..., in_features) -> (..., out_features)."""
        raise NotImplementedError

    def factors(self) -> Factors:
        """The trained matrices, with alpha."""
        raise NotImplementedError

    @classmethod
    def from_tensors(cls, target: nn.Module, tensors: Mapping[str, torch.Tensor], multiplier: float) -> "AdapterModule":
        """An adapter of the kind and the shapes of a module's tensors, by suffix; the values are loaded later."""
        raise NotImplementedError

    def limit_norm(self, max_norm: float) -> tuple[float, bool]:
        """Scales the factors so that the update's Frobenius norm is at most `max_norm`: (norm, whether scaled)."""
        norm = self.factors().norm()
        if norm <= max_norm:
            return norm, False
        self.scale_update(max_norm / norm)
        return max_norm, True

    def scale_update(self, ratio: float) -> None:
        """Multiplies the update by `ratio`, by the same number in every factor."""
        factors = [parameter for name, parameter in self.named_parameters() if name != "dora_scale"]
        for parameter in factors:
            parameter.mul_(ratio ** (1 / len(factors)))

    def keep_mask(self, shape: list[int], like: torch.Tensor) -> torch.Tensor:
        """0 with probability `rank_dropout`, else 1 / (1 - rank_dropout), which keeps the mean."""
        keep = torch.rand(shape, device=like.device) >= self.rank_dropout
        return keep.to(like.dtype) / (1 - self.rank_dropout)


class AdapterNetwork(nn.Module):
    """The adapters of a DiT, in the order of its modules; keys are the native ones (docs/formats.md 2.4).

    Its methods are the protocol of network modules by which the trainer calls every `--network_module`.
    """

    def __init__(self, adapters: Mapping[str, AdapterModule], loraplus_lr_ratio: float | None = None):
        super().__init__()
        self.loraplus_lr_ratio = loraplus_lr_ratio
        for name, adapter in adapters.items():
            self.add_module(native_name(name), adapter)
        self.names = dict(zip(self._modules, adapters))

    @classmethod
    def from_weights(
        cls,
        tensors: Mapping[str, torch.Tensor],
        model: nn.Module,
        module_type: type[AdapterModule],
        multiplier: float = 1.0,
    ) -> "AdapterNetwork":
        """A network with the modules, ranks and values of a state dict of any format.

        Raises:
            UserError: a module of the state dict is not in the model, or a shape differs.
        """
        tensors = native_tensors(tensors)
        per_module: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            module, suffix = key.split(".", 1)
            per_module.setdefault(module, {})[suffix] = tensor
        linears = {name: module for name, module in model.named_modules() if is_linear(module)}
        targets = {native_name(name): (name, module) for name, module in linears.items()}
        for module in per_module:
            if module not in targets:
                raise UserError(f"{module}: the weights have this module, but the DiT has no such Linear")
        adapters = {}
        for module, own in per_module.items():
            name, target = targets[module]
            try:
                adapters[name] = module_type.from_tensors(target, own, multiplier)
            except KeyError:
                raise UserError(f"{module}: has {', '.join(own)}: give the --network_module that made it") from None
        network = cls(adapters)
        network.load_native(tensors, "weights")
        return network

    @property
    def adapters(self) -> list[AdapterModule]:
        return list(self.children())

    def apply_to(
        self, text_encoders: Any, unet: nn.Module, apply_text_encoder: bool = False, apply_unet: bool = True
    ) -> None:
        """Puts the adapters around their targets in the DiT. Text encoders are never adapted."""
        for adapter in self.adapters if apply_unet else []:
            adapter.apply_to_target()

    def set_multiplier(self, multiplier: float) -> None:
        for adapter in self.adapters:
            adapter.multiplier = multiplier

    def prepare_optimizer_params(self, unet_lr: float | None = None, **_: Any) -> tuple[list[dict], list[str]]:
        """Parameter groups and their descriptions; with LoRA+, `lora_up` has a group with a higher learning rate."""
        plain, plus = [], []
        for name, parameter in self.named_parameters():
            is_plus = self.loraplus_lr_ratio is not None and ".lora_up." in name
            (plus if is_plus else plain).append(parameter)
        groups, descriptions = [_group(plain, unet_lr)], ["unet"]
        if plus:
            groups.append(_group(plus, None if unet_lr is None else unet_lr * self.loraplus_lr_ratio))
            descriptions.append("unet plus")
        return groups, descriptions

    def prepare_grad_etc(self, unet: nn.Module) -> None:
        self.requires_grad_(True)

    def enable_gradient_checkpointing(self) -> None:
        """Does nothing: adapters run inside the DiT's blocks and are checkpointed with them."""

    def on_epoch_start(self, unet: nn.Module) -> None:
        self.train()

    def on_step_start(self) -> None:
        """Does nothing; part of the protocol of network modules."""

    def get_trainable_params(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def save_weights(
        self, file: str | os.PathLike, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Writes a native file; `sshs_*` hashes (docs/formats.md 2.5) are added to the metadata."""
        save_native(self.state_dict(), file, dtype, metadata)

    def load_weights(self, file: str | os.PathLike) -> str:
        """Loads a LoRA file of any format that has exactly the modules of this network.

        Raises:
            UserError: modules or shapes differ.
        """
        self.load_native(load_native(file), str(file))
        return f"{file}: {len(self.adapters)} modules loaded"

    def load_native(self, tensors: Mapping[str, torch.Tensor], source: str) -> None:
        """Loads tensors with native keys.

        Raises:
            UserError: keys or shapes differ; `source` names the file.
        """
        own = self.state_dict()
        for problem, keys in {"lacks": own.keys() - tensors.keys(), "has unknown": tensors.keys() - own.keys()}.items():
            if keys:
                raise UserError(
                    f"{source}: {problem} {len(keys)} of {len(own)} keys of this network, such as {min(keys)}"
                )
        for key, tensor in tensors.items():
            if tensor.shape != own[key].shape:
                raise UserError(
                    f"{source}: {key} is {tuple(tensor.shape)}, this network has {tuple(own[key].shape)}; "
                    "give the --network_dim of the file, or --dim_from_weights"
                )
        self.load_state_dict(tensors)
        for adapter in self.adapters:
            adapter.scale = adapter.factors().scale

    @torch.no_grad()
    def apply_max_norm_regularization(
        self, max_norm: float, device: torch.device | None = None
    ) -> tuple[int, float, float]:
        """Limits the Frobenius norm of every update: (number of updates scaled, mean norm, largest norm)."""
        results = [adapter.limit_norm(max_norm) for adapter in self.adapters]
        norms = [norm for norm, _ in results]
        return sum(scaled for _, scaled in results), sum(norms) / len(norms), max(norms)


def native_name(name: str) -> str:
    """`double_blocks.0.img_mlp.fc1` -> `lora_unet_double_blocks_0_img_mlp_fc1`"""
    return NATIVE.prefix + name.replace(".", "_")


def _group(parameters: list[nn.Parameter], learning_rate: float | None) -> dict[str, Any]:
    return {"params": parameters} if learning_rate is None else {"params": parameters, "lr": learning_rate}


def build_network(
    title: str,
    module_type: type[AdapterModule],
    unet: nn.Module,
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    neuron_dropout: float | None,
    network_args: Mapping[str, Any],
    known_arguments: list[str],
) -> AdapterNetwork:
    """A new network with an adapter of the same rank on every target of the DiT; used by every `create_arch_network`.

    Raises:
        UserError: an unknown or unreadable argument, or no target.
    """
    arguments = read_arguments(network_args, known_arguments)
    rank = network_dim or DEFAULT_RANK
    alpha = 1.0 if network_alpha is None else network_alpha or rank
    targets = find_targets(unet, arguments.pop("exclude_patterns", None), arguments.pop("include_patterns", None))
    loraplus_lr_ratio, verbose = arguments.pop("loraplus_lr_ratio", None), arguments.pop("verbose", False)
    ignored = [name for name in arguments if name.startswith("conv_")]
    if ignored:
        print(f"warning: network_args: without effect, as no convolution of the DiT is adapted: {', '.join(ignored)}")
    arguments = {name: value for name, value in arguments.items() if name not in ignored}
    settings = {"multiplier": multiplier, "dropout": neuron_dropout, **arguments}
    adapters = {name: module_type(target, rank, alpha, **settings) for name, target in targets.items()}
    network = AdapterNetwork(adapters, loraplus_lr_ratio)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(
        f"{title}: {len(adapters)} modules, {parameters:,} parameters, "
        f"rank {rank}, alpha {alpha:g}, scale alpha/rank = {alpha / rank:g}"
    )
    if alpha / rank < SMALL_SCALE:
        print(f"warning: a scale below {SMALL_SCALE} learns slowly; --network_alpha {rank} gives a scale of 1")
    if verbose:
        for name, adapter in adapters.items():
            print(f"  {name}: {adapter.in_features} -> {adapter.out_features}, rank {adapter.rank}")
    return network
