"""Full fine-tuning: all or some parameters of the DiT itself are trained."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hunyuan_model import checkpoints
from hunyuan_model.block_swap import offload_embedders
from hunyuan_model.checkpoints.identification import identify
from hunyuan_model.models import HYVideoDiffusionTransformer
from modules.blocks.activation_checkpointing import apply_activation_checkpointing
from modules.training import setup
from modules.training.options import FullTrainerOptions
from modules.training.setup import TrainingSetup
from modules.training.state import check_tensors
from utils.device_utils import DTYPES
from utils.errors import UserError
from utils.safetensors_utils import streamed_file

SHOWN_NAMES = 4


def trained_names(names: Sequence[str], parts: Sequence[str]) -> set[str]:
    """The parameters whose names contain one of `parts` (`--trainable_modules`); "." is in every name.

    Raises:
        UserError: a part is in no name.
    """
    for part in parts:
        if not any(part in name for name in names):
            found = ", ".join(names[:: max(len(names) // SHOWN_NAMES, 1)][:SHOWN_NAMES])
            raise UserError(f"--trainable_modules {part}: no parameter has this in its name; there are {found}, ...")
    return {name for name in names if any(part in name for part in parts)}


class HalfGradScaler(torch.amp.GradScaler):
    """A gradient scaler that also unscales float16 gradients, which torch's own scaler refuses.

    Gradients that overflow float16 are found and their step is skipped, as with torch's scaler.
    """

    def _unscale_grads_(self, optimizer: Any, inv_scale: Any, found_inf: Any, allow_fp16: bool) -> Any:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


class TrainedModel:
    """A model of which all or some parameters are trained.

    Args:
        model: its parameters have the names under which they are saved.
        names: the parameters that are trained; all others are frozen.
        dtype: dtype of saved checkpoints; None: each parameter keeps its own.
        source_config: the config in the file that training started from, which is written into every checkpoint.
        untouched: the weights are still those of that file.
    """

    facts: Mapping[str, Any] = {}  # the metadata say nothing of a network

    def __init__(
        self,
        model: nn.Module,
        names: set[str],
        dtype: torch.dtype | None = None,
        source_config: Mapping[str, Any] | None = None,
        untouched: bool = True,
    ) -> None:
        self.model, self.dtype, self.source_config, self.untouched = model, dtype, source_config, untouched
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every trained tensor by name."""
        return {name: tensor for name, tensor in self.model.named_parameters() if tensor.requires_grad}

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """One parameter group for the optimizer."""
        return [{"params": list(self.tensors.values()), "lr": learning_rate}]

    def start_epoch(self) -> None:
        self.model.train()

    def start_step(self) -> None:
        """Nothing changes from step to step."""

    def after_update(self) -> dict[str, float]:
        self.untouched = False
        return {}

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Inside, dropout is off, as it will be when the checkpoint is used."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        """Inside, the model is as it was before training. Only before the first step, because no copy is kept."""
        if not self.untouched:
            raise RuntimeError("the weights from before training are gone")
        yield

    def save(self, path: Path, metadata: Mapping[str, str]) -> list[Path]:
        """Writes the whole model, including frozen parameters, tensor by tensor; returns the path."""
        if self.source_config:
            metadata = {**metadata, "config": json.dumps(self.source_config)}
        weights = {name: tensor.detach() for name, tensor in self.model.named_parameters()}
        layout = {name: (self.dtype or tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
        with streamed_file(path, layout, metadata) as write:
            for name, tensor in weights.items():
                write(name, tensor.to(layout[name][0]))
        return [path]


def dit_shapes(run: TrainingSetup[FullTrainerOptions]) -> dict[str, torch.Size]:
    """The shape of every parameter of the DiT by its official name, after comparing the DiT with the caches."""
    config = setup.read_dit_config(run.options, run.train_set)
    with torch.device("meta"):
        dit = HYVideoDiffusionTransformer(config)
    return {name: weight.shape for name, weight in dit.named_parameters()}


def check_trained(run: TrainingSetup[FullTrainerOptions], shapes: Mapping[str, torch.Size], names: set[str]) -> None:
    """Checks that the trained parameters fit the other options and the state.

    Args:
        shapes: every parameter of the DiT.
        names: the trained ones.

    Raises:
        UserError: they do not.
    """
    options = run.options
    check_dtypes(options, run.accelerator.mixed_precision, has_frozen=len(names) < len(shapes))
    if options.swap.img_in_txt_in_offloading and any(name.startswith(("img_in.", "txt_in.")) for name in names):
        raise UserError("--img_in_txt_in_offloading: --trainable_modules trains what it would offload; leave it out")
    if run.state is not None:
        check_tensors(run.state, {name: shapes[name] for name in names})
        if run.validation_set is not None and run.progress.base_validation_loss is None:
            raise UserError(
                f"--resume: {run.state} has no validation loss from before training, and it cannot be measured now; "
                "resume without validation, or start a new run"
            )


def check_dtypes(options: FullTrainerOptions, autocast: str, has_frozen: bool) -> None:
    """Checks that the dtypes of weights and autocast fit together.

    Args:
        autocast: "no", "fp16" or "bf16".
        has_frozen: some weights are not trained.

    Raises:
        UserError: they do not.
    """
    trained = options.tuning.trained_dtype
    if trained == "float16" and autocast != "fp16":
        raise UserError("--full_fp16 needs --mixed_precision fp16, whose scaled loss keeps gradients from vanishing")
    if trained == "bfloat16" and autocast == "fp16":
        raise UserError("--full_bf16 and --mixed_precision fp16 contradict each other; give bf16 or no")
    if has_frozen and autocast == "no" and DTYPES[options.saved_dtype] != DTYPES[trained]:
        raise UserError(
            f"--dit_dtype {options.dit.dit_dtype}: the trained weights are {trained}; give --mixed_precision bf16, "
            "so that both can be in one model"
        )


def load_model(run: TrainingSetup[FullTrainerOptions], names: set[str]) -> HYVideoDiffusionTransformer:
    """The DiT with trained weights in the dtype of training and frozen ones in --dit_dtype."""
    options, device = run.options, run.accelerator.device
    trained, frozen = DTYPES[options.tuning.trained_dtype], DTYPES[options.saved_dtype]
    setup.verify_attention(options, run.accelerator, trained)

    def dtype_of(name: str) -> torch.dtype:
        return trained if name in names else frozen

    dit = checkpoints.load_dit(options.dit.dit, device, dtype_of, attention=options.attention.mode)
    if options.swap.img_in_txt_in_offloading:
        offload_embedders(dit, device)
    apply_activation_checkpointing(dit, options.checkpointing.policy or "none", device)
    return dit


def select_trained(
    run: TrainingSetup[FullTrainerOptions], dit: HYVideoDiffusionTransformer, names: set[str]
) -> TrainedModel:
    """Freezes all parameters of the DiT but the trained ones."""
    config = identify(run.options.dit.dit).checkpoint.config
    return TrainedModel(dit, names, DTYPES[run.options.saved_dtype], config, untouched=run.state is None)
