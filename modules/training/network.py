"""LoRA training: the network that is trained beside the frozen DiT, from its options to its files.

Our network modules (`--network_module`) and those of other projects are called in the same way, by the protocol of
kohya's trainers. Optional methods that a network does not have are skipped.
"""

import contextlib
import dataclasses
import errno
import importlib
import inspect
import io
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from hunyuan_model import checkpoints
from hunyuan_model.block_swap import enable_block_swap, offload_embedders, swapped_blocks
from hunyuan_model.models import HunyuanVideoConfig, HYVideoDiffusionTransformer
from modules.blocks.activation_checkpointing import apply_activation_checkpointing
from modules.blocks.compilation import compile_blocks, require_backend
from modules.training import setup
from modules.training.options import LoraTrainerOptions, NetworkOptions
from modules.training.setup import TrainingSetup
from modules.training.state import check_tensors
from networks.adapters import AdapterNetwork
from networks.comparison import float16_loss
from networks.factors import LokrFactors, LoraFactors
from networks.files.format_table import FORMATS
from networks.files.formats import from_tensors
from networks.files.lora_files import load_native, read_lora, require_formats, write_formats
from networks.merging import weight_changes
from utils.device_utils import DTYPES, default_dtype
from utils.errors import UserError, did_you_mean, one_line, printable
from utils.files import atomic_path_of_same_name
from utils.plugins import refuse_taken

OWN_MODULES = ["networks.lora", "networks.loha", "networks.lokr"]


def import_network_module(name: str) -> ModuleType:
    """The module called `name`.

    Raises:
        UserError: it cannot be imported, or is not a network module.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"--network_module '{name}': a dotted path such as networks.lora is expected")
    try:
        module = importlib.import_module(name)
    except Exception as error:  # importing a module of another project may raise anything
        package = name.split(".")[0]
        hint = did_you_mean(name, OWN_MODULES) or f"; is the package {package} installed?"
        raise UserError(f"--network_module {name}: cannot be imported: {one_line(error)}{hint}") from None
    if _creator(module) is None:
        raise UserError(f"--network_module {name}: has no create_arch_network; give one of {', '.join(OWN_MODULES)}")
    return module


def _creator(module: ModuleType, ending: str = "") -> Any:
    names = (f"create_arch_network{ending}", f"create_network{ending}")
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def create_network(module: ModuleType, dit: nn.Module, options: NetworkOptions) -> nn.Module:
    """A new network for the DiT, with the rank, alpha, dropout and arguments of the options.

    Raises:
        UserError: an argument that another option or the trainer sets, or that the module refuses.
    """
    creator = _creator(module)
    ours = list(inspect.signature(creator).parameters)[:6]
    flags = {name: f"--{name}" for name in ("network_dim", "network_alpha")} | {"neuron_dropout": "--network_dropout"}
    refuse_taken(options.arguments, "--network_args", dict.fromkeys(ours, "the trainer") | flags)
    dim, alpha, dropout = options.network_dim, options.network_alpha, options.network_dropout
    return creator(1.0, dim, alpha, None, [], dit, neuron_dropout=dropout, **options.arguments)


def create_network_from_weights(module: ModuleType, dit: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A network with the rank and alpha of `weights`.

    Raises:
        UserError: the module cannot read them.
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
    """A network that is applied to a frozen DiT and trained."""

    def __init__(self, network: nn.Module, dit: nn.Module, device: torch.device, options: LoraTrainerOptions) -> None:
        self.network, self.dit, self.device, self.options = network, dit, device, options
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

    @property
    def facts(self) -> dict[str, Any]:
        """Rank, alpha and arguments, for the metadata."""
        options, adapters = self.options.network, getattr(self.network, "adapters", None)
        dim, alpha = options.network_dim, options.network_alpha
        if adapters:  # rank and alpha of our own networks may come from --network_weights
            # Dynamic where they differ, as kohya's tools write it.
            ranks, alphas = {adapter.rank for adapter in adapters}, {float(adapter.alpha) for adapter in adapters}
            dim = min(ranks) if len(ranks) == 1 else "Dynamic"
            alpha = min(alphas) if len(alphas) == 1 else "Dynamic"
        return {"network_dim": dim, "network_alpha": alpha, "network_args": options.arguments}

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer; a group may have its own `lr`."""
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

    def after_update(self) -> dict[str, float]:
        """Scales every module's weight change down to the norm of --scale_weight_norms; returns the norms, for the log.

        Networks of other projects may return nothing.
        """
        max_norm = self.options.network.scale_weight_norms
        norms = self._call("apply_max_norm_regularization", max_norm, self.device) if max_norm else None  # 0: off
        names = ("max_norm/keys_scaled", "max_norm/average_key_norm", "max_norm/max_key_norm")
        return dict(zip(names, map(float, norms), strict=True)) if norms else {}

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Inside, dropout is off, as it will be when the checkpoint is used."""
        was_training = self.network.training
        self.network.eval()
        try:
            yield
        finally:
            self.network.train(was_training)

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        """Inside, the DiT is as it was before training."""
        self._call("set_multiplier", 0.0)
        try:
            yield
        finally:
            self._call("set_multiplier", 1.0)

    def save(self, path: Path, metadata: Mapping[str, str]) -> list[Path]:
        """Writes the network, and beside it the other formats of --save_format; returns the paths.

        Raises:
            OSError: a file cannot be written.
        """
        dtype = DTYPES[self.options.save.save_precision or "float32"]
        with atomic_path_of_same_name(path) as temporary:  # networks of other projects write in place
            try:
                self.network.save_weights(str(temporary), dtype, dict(metadata))
            except SafetensorError as error:  # what safetensors makes of a full disk
                raise OSError(errno.EIO, one_line(error), str(path)) from error
        paths = [path, *write_formats(path, self.options.save.save_format)]
        if dtype == torch.float16 and isinstance(self.network, AdapterNetwork):
            self._warn_of_rounding(paths)
        return paths

    def _warn_of_rounding(self, paths: Sequence[Path]) -> None:
        """Names the modules of float16 files that differ from the trained ones.

        LoHa and LoKr are left out: for a whole DiT, comparing them takes too long to do it at every checkpoint.
        """
        tensors = {name: tensor.cpu() for name, tensor in self.network.state_dict().items()}
        trained = from_tensors(tensors, {}, "the trained network")
        loras = {name: own for name, own in trained.modules.items() if isinstance(own, LoraFactors)}
        trained = dataclasses.replace(trained, modules=loras)
        for path in paths:
            loss = float16_loss(trained, read_lora(path))
            if loss:
                print(printable(f"warning: {path}: {loss}; --save_precision fp32 keeps it"), file=sys.stderr)


def check_choices(options: LoraTrainerOptions) -> None:
    """Checks that everything chosen by name exists, and that every LoRA file holds a LoRA.

    Raises:
        UserError: something does not exist, or a file holds no LoRA.
    """
    setup.check_choices(options)
    if options.compile.compile:
        require_backend(options.compile.compile_backend)
    for name in options.save.save_format:
        if name not in FORMATS:
            raise UserError(f"--save_format {name}: unknown{did_you_mean(name, list(FORMATS))}; {', '.join(FORMATS)}")
    for path in options.network.base_weights:
        read_lora(path)
    weights, wanted = options.network.network_weights, options.network.network_dim or 4
    if weights is not None:
        modules = read_lora(weights).modules.values()
        # A LoKr of two whole matrices has no rank.
        ranks = {own.rank for own in modules if not isinstance(own, LokrFactors) or own.has_rank}
        if not options.network.dim_from_weights and ranks - {wanted}:
            raise UserError(
                f"--network_weights {weights}: has rank {', '.join(map(str, sorted(ranks)))}, --network_dim is "
                f"{wanted}; give --dim_from_weights instead"
            )


def check_network(run: TrainingSetup[LoraTrainerOptions], module: ModuleType) -> int:
    """Tries the network on a DiT without weights; returns the number of trained weights.

    Raises:
        UserError: the DiT, the caches, the network, the formats or the state do not fit together.
    """
    options = run.options
    config = setup.read_dit_config(options, run.train_set)
    swapped_blocks(options.swap.blocks_to_swap or 0, config.depth_double, config.depth_single, training=True)
    shapes = trained_shapes(options, module, config)
    if module.__name__ in OWN_MODULES:
        require_formats(shapes, options.save.save_format)
        if run.state is not None:
            check_tensors(run.state, shapes)
    return sum(map(math.prod, shapes.values()))


def trained_shapes(
    options: LoraTrainerOptions, module: ModuleType, config: HunyuanVideoConfig
) -> dict[str, Sequence[int]]:
    """The shapes of the trained tensors by name; of other projects' networks those that exist before `apply_to`."""
    if options.network.dim_from_weights:
        tensors = load_native(options.network.network_weights)
        return {name: tensor.shape for name, tensor in tensors.items() if not name.endswith(".alpha")}
    with torch.device("meta"):
        network = create_trial_network(module, HYVideoDiffusionTransformer(config), options.network)
    return {name: parameter.shape for name, parameter in network.named_parameters()}


def create_trial_network(module: ModuleType, dit: nn.Module, options: NetworkOptions) -> nn.Module:
    """Like `create_network`, but nothing that the module prints is shown."""
    with contextlib.redirect_stdout(io.StringIO()):
        return create_network(module, dit, options)


def load_model(run: TrainingSetup[LoraTrainerOptions]) -> HYVideoDiffusionTransformer:
    """The frozen DiT with --base_weights merged; blocks that will be swapped are in main memory."""
    options, device = run.options, run.accelerator.device
    path, swap, network = options.dit.dit, options.swap.blocks_to_swap or 0, options.network
    merges = list(zip(network.base_weights, network.base_multipliers(), strict=True))
    dtype = default_dtype(options.dit.dit_dtype, device, on_gpu="bfloat16")
    setup.verify_attention(options, run.accelerator, dtype)
    changes = weight_changes(checkpoints.open_dit(path).shapes, merges) if merges else None
    place = checkpoints.block_swap_placement(checkpoints.read_dit_config(path), swap, device)
    return checkpoints.load_dit(
        path, place, dtype, options.memory.fp8_base, options.attention.mode, compute_device=device, changes=changes
    )


def apply_network(
    run: TrainingSetup[LoraTrainerOptions], module: ModuleType, dit: HYVideoDiffusionTransformer
) -> TrainedNetwork:
    """The network, applied to the DiT, and around the blocks of the DiT what saves memory and time.

    From the inside out: network, compilation, block swap, activation checkpointing; docs/design.md says why.
    """
    options, device = run.options, run.accelerator.device
    torch.manual_seed(run.progress.seed)
    if options.network.dim_from_weights:
        network = create_network_from_weights(module, dit, load_native(options.network.network_weights))
    else:
        network = create_network(module, dit, options.network)
    trained = TrainedNetwork(network, dit, device, options)
    if options.network.network_weights is not None:
        network.load_weights(str(options.network.network_weights))
    if options.compile.compile:
        compile_blocks(dit.blocks, options.compile)
    if options.swap.blocks_to_swap:
        ring, pin = options.memory.block_swap_ring_size, options.swap.use_pinned_memory_for_block_swap
        enable_block_swap(dit, options.swap.blocks_to_swap, device, ring, training=True, pin=pin or None)
    if options.swap.img_in_txt_in_offloading:
        offload_embedders(dit, device)
    policy, swapped = options.checkpointing.policy, bool(options.swap.blocks_to_swap)
    apply_activation_checkpointing(dit, policy or "none", device, options.compile.compile, swapped)
    if policy is not None:
        trained.enable_gradient_checkpointing()
    return trained
