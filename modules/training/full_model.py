"""Full fine-tuning: the parameters of a model themselves are trained, all of them or some."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.safetensors_utils import streamed_file

EXAMPLES = 4


def trained_names(names: Sequence[str], parts: Sequence[str]) -> set[str]:
    """The parameters whose names contain one of `parts` (`--trainable_modules`); "." is in every name.

    Raises:
        UserError: a part is in no name.
    """
    for part in parts:
        if not any(part in name for name in names):
            found = ", ".join(names[:: max(len(names) // EXAMPLES, 1)][:EXAMPLES])
            raise UserError(f"--trainable_modules {part}: no parameter has this in its name; there are {found}, ...")
    return {name for name in names if any(part in name for part in parts)}


class TrainedModel:
    """A model some or all of whose parameters are trained.

    Args:
        model: its parameters have the names under which they are saved.
        names: of the parameters that are trained; all others are frozen.
        untouched: the weights are those of the file that training started from.
    """

    def __init__(self, model: nn.Module, names: set[str], untouched: bool = True) -> None:
        self.model, self.untouched = model, untouched
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every trained tensor by name."""
        return {name: tensor for name, tensor in self.model.named_parameters() if tensor.requires_grad}

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """One group for the optimizer."""
        return [{"params": list(self.tensors.values()), "lr": learning_rate}]

    def start_epoch(self) -> None:
        self.model.train()

    def start_step(self) -> None:
        """Nothing is drawn anew."""

    def after_update(self) -> None:
        self.untouched = False

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Without dropout, as the saved model is used later."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        """The model as it was before training: before the first step only, for no copy of the weights is kept."""
        if not self.untouched:
            raise RuntimeError("the weights from before training are gone")
        yield

    def save(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Writes the whole model, frozen parameters included, in the memory of one tensor.

        Args:
            path: safetensors file.
            dtype: of the file; None keeps that of each parameter.
            metadata: of the file.
        """
        weights = {name: tensor.detach() for name, tensor in self.model.named_parameters()}
        layout = {name: (dtype or tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
        with streamed_file(path, layout, metadata) as write:
            for name, tensor in weights.items():
                write(name, tensor.to(layout[name][0]))
