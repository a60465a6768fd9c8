"""Time of the DiT, relative to diffusers with the same weights and to the machine's rate of matrix products.

    python -m benchmarks.dit_speed

1 double and 2 single blocks of full width, 1020 image tokens (latents 1 x 60 x 68), 64 of 256 text tokens valid. The
forward pass alone, and with the backward pass to the latents, in bfloat16 on a GPU and in float32 on a CPU. The runs of
both models alternate; medians are compared.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor

from benchmarks.comparison import Comparison, print_comparisons
from benchmarks.saved_bytes import inputs, new_model
from benchmarks.throughput import forward_operations, matrix_product_rate, timed
from hunyuan_model.checkpoints.names import dit_from_official
from hunyuan_model.models import HYVideoDiffusionTransformer
from utils.device_utils import dtype_word, resolve_device

LIMIT = 0.85


def diffusers_twin(model: HYVideoDiffusionTransformer) -> HunyuanVideoTransformer3DModel:
    """diffusers' model with the same weights, which are shared except for those that must be split."""
    config = model.config
    with torch.device("meta"):
        twin = HunyuanVideoTransformer3DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.head_dim,
            num_layers=config.depth_double,
            num_single_layers=config.depth_single,
            num_refiner_layers=config.depth_refiner,
            text_embed_dim=config.text_dim,
            pooled_projection_dim=config.text_dim_2,
        )
    twin.load_state_dict(dit_from_official(model.state_dict(), "diffusers"), strict=True, assign=True)
    return twin.requires_grad_(False).eval()


def with_backward(model: Callable[..., Tensor], given: dict[str, Tensor], latents: str) -> Callable[[], None]:
    """Forward, and backward to the latents; the weights are frozen, as in LoRA training."""
    x = given[latents].clone().requires_grad_()

    def run() -> None:
        model(**given | {latents: x}).square().mean().backward()

    return run


def main(argv: Sequence[str] | None = None) -> list[Comparison]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=6)
    args = parser.parse_args(argv)
    device = resolve_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = new_model(dtype).to(device).eval()
    twin = diffusers_twin(model)
    ours = {name: value.to(device) for name, value in inputs((1, 60, 68), 64, dtype).items()}
    renamed = {"x": "hidden_states", "text_states": "encoder_hidden_states", "text_mask": "encoder_attention_mask"}
    renamed |= {"text_states_2": "pooled_projections"}
    theirs = {renamed.get(name, name): value for name, value in ours.items()}

    def run_twin(**given: Tensor) -> Tensor:
        return twin(**given, return_dict=False)[0]

    with torch.no_grad():
        difference = (model(**ours) - run_twin(**theirs)).abs().max()
    comparisons = []
    for name, pair in {
        "forward": (torch.no_grad()(lambda: model(**ours)), torch.no_grad()(lambda: run_twin(**theirs))),
        "forward + backward": (with_backward(model, ours, "x"), with_backward(run_twin, theirs, "hidden_states")),
    }.items():
        times = [[timed(run, device) for run in pair] for _ in range(args.repeats)]
        mine, other = (statistics.median(column) for column in zip(*times, strict=True))
        comparisons.append(Comparison(f"DiT, {name}: time", mine, other, "s", "diffusers", LIMIT))
    tokens = 1020 + 64
    achieved = sum(forward_operations(model.config, tokens)) / comparisons[0].ours / 1e9
    rate = matrix_product_rate(device, dtype, tokens) / 1e9
    comparisons.append(Comparison("DiT, forward: matrix products", achieved, rate, "GFLOP/s", "measured rate", None))
    print_comparisons(f"DiT, {dtype_word(dtype)}", comparisons)
    print(f"largest difference of outputs: {difference:.1e}")
    return comparisons


if __name__ == "__main__":
    main()
