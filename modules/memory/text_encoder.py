"""How much GPU memory text encoder 1 needs, and whether it fits without --fp8_llm."""

import dataclasses
import functools

import torch

from modules.memory import plan
from modules.memory.measure import measure_text_encoder_1
from modules.options import TextEncoderOptions
from utils.device_utils import default_dtype

PlanRows = list[tuple[str, object]]  # name, value


def plan_text_encoder_1(
    text: TextEncoderOptions, device: torch.device, vram_gb: float | None, captions: int = 1
) -> tuple[TextEncoderOptions, PlanRows]:
    """The options, with --fp8_llm if text encoder 1 needs it to fit into `vram_gb`; and the rows of the plan.

    Args:
        captions: batch size.
    """
    dtype = default_dtype(text.text_encoder_dtype, device)

    @functools.cache
    def needed(fp8: bool) -> int:
        return plan.required_device_memory(measure_text_encoder_1(text.text_encoder1, dtype, fp8, captions))

    choices = [True] if text.fp8_llm else [False, True]
    limit = plan.memory_limit(vram_gb, plan.free_device_memory(device))
    fp8 = plan.first_that_fits("text encoder 1", choices, needed, limit)
    rows = [
        ("text encoder 1", "--fp8_llm" if fp8 else "no option"),
        ("GPU memory of text encoder 1", plan.format_bytes(needed(fp8))),
    ]
    return dataclasses.replace(text, fp8_llm=fp8), rows
