"""Models that take memory only while they are needed."""

from collections.abc import Callable
from typing import Generic, Literal, TypeVar

import torch

from modules.memory.plan import explain_out_of_memory
from utils.device_utils import release_memory

M = TypeVar("M")


class LazyModel(Generic[M]):
    """A model that is loaded at its first use. `release` frees its memory.

    Args:
        load: returns the model on `device`; with "offload" on the CPU.
        device: where the model runs.
        when_released: "free" deletes the model, and the next use loads it again; "offload" moves the module to main
            memory, and the next use moves it back; "keep" leaves it where it is.
        advice: what a user can do if memory runs out while the model is loaded.
    """

    def __init__(
        self,
        load: Callable[[], M],
        device: torch.device,
        when_released: Literal["free", "offload", "keep"] = "free",
        advice: str = "use another dtype or a smaller model",
    ) -> None:
        self._load, self._device, self._when_released, self._advice = load, device, when_released, advice
        self._model: M | None = None

    @property
    def model(self) -> M:
        """The model, ready to run on its device."""
        self.load()
        if self._when_released == "offload":
            self._model.to(self._device)
        return self._model

    def load(self) -> None:
        """Loads the model if it is not loaded yet.

        Raises:
            UserError: out of memory.
        """
        if self._model is None:
            with explain_out_of_memory("while a model is loaded", self._advice):
                self._model = self._load()

    def release(self) -> None:
        """Frees the device's memory, unless the model stays there."""
        if self._model is None or self._when_released == "keep":
            return
        if self._when_released == "offload":
            self._model.to("cpu")
        else:
            self._model = None
        release_memory(self._device)
