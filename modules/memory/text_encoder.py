"""What text encoder 1 needs of a GPU's memory, and whether it fits without --fp8_llm."""

import dataclasses
import functools

import torch

from modules.memory import plan as planner
from modules.memory.measure import measure_text_encoder_1
from modules.options import TextEncoderOptions
from utils.device_utils import default_dtype

PlanRows = list[tuple[str, object]]  # name, value


def plan_text_encoder_1(
    text: TextEncoderOptions, device: torch.device, vram_gb: float | None, captions: int = 1
) -> tuple[TextEncoderOptions, PlanRows]:
    """The options with --fp8_llm where nothing else fits into `vram_gb`, and the rows of a plan.

    Args:
        captions: so many are encoded at once.
    """
    dtype = default_dtype(text.text_encoder_dtype, device)

    @functools.cache
    def needed(fp8: bool) -> int:
        return planner.with_overhead(measure_text_encoder_1(text.text_encoder1, dtype, fp8, captions))

    choices = [True] if text.fp8_llm else [False, True]
    limit = planner.memory_limit(vram_gb, planner.free_memory(device))
    fp8 = planner.first_fitting("text encoder 1", choices, needed, limit)
    rows = [
        ("text encoder 1", "--fp8_llm" if fp8 else "no option"),
        ("GPU memory of text encoder 1", planner.in_words(needed(fp8))),
    ]
    return dataclasses.replace(text, fp8_llm=fp8), rows
