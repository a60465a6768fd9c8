"""Trains the small VAE of the shapes world, first on stills, then on clips.

    python -m examples.shapes.vae_training FOLDER

Writes `vae.safetensors` and `vae_log.jsonl` into the folder. A run that was stopped continues when it is started again.
"""

import argparse
import colorsys
import json
import math
import random
from dataclasses import astuple, dataclass, field
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from examples.shapes.world import SHAPES, Layer, draw, random_scene, render
from hunyuan_model.vae import SCALING_FACTOR, AutoencoderKLCausal3D, DiagonalGaussian, VaeConfig
from hunyuan_model.vae_layers import CausalConv3d, Downsample, FrameCausalAttention, GroupNorm, ResnetBlock, Upsample
from utils.cli import run_script
from utils.errors import UserError
from utils.files import atomic_path, write_text
from utils.safetensors_utils import save_file

CONFIG = VaeConfig(block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=2)
CLIP_FRAMES, CLIP_SIDE = 9, 64  # height and width of a clip are the same
KL_WEIGHT = 1e-4
PEAK_RATE, WARMUP_STEPS = 6e-4, 50
SAVE_EVERY = 100
STATE = "vae_state.pt"


@dataclass(frozen=True)
class Stage:
    """Training steps on batches of one size; `side` is height and width in pixels."""

    steps: int
    batch: int
    frames: int
    side: int


STAGES = (
    Stage(600, 16, 1, 32),
    Stage(200, 16, 1, 64),
    Stage(600, 8, 5, 32),
    Stage(1800, 2, 9, 64),
)
TOTAL_STEPS = sum(stage.steps for stage in STAGES)


def convolve(layer: CausalConv3d, x: Tensor) -> Tensor:
    """What `CausalConv3d` computes, with a backward pass, B C F H W.

    Padding repeats a still in time, so its convolution is one in space with the kernel summed over time.
    """
    conv, reach = layer.conv, layer.conv.kernel_size[0] - 1
    if x.shape[2] == 1:
        still = F.pad(x[:, :, 0], [reach // 2] * 4, mode="replicate") if reach else x[:, :, 0]
        return F.conv2d(still, conv.weight.sum(2), conv.bias, conv.stride[1:]).unsqueeze(2)
    if reach:
        x = F.pad(x, (*[reach // 2] * 4, reach, 0), mode="replicate")
        x = x.contiguous(memory_format=torch.channels_last_3d)  # a quarter faster on a CPU
    return F.conv3d(x, conv.weight, conv.bias, conv.stride)


def activated(norm: GroupNorm, x: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))


def attend(layer: FrameCausalAttention, x: Tensor) -> Tensor:
    """What `FrameCausalAttention` computes, with a backward pass, B C F H W."""
    norm, (frames, height, width) = layer.group_norm, x.shape[2:]
    tokens = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps).flatten(2).transpose(1, 2)  # B FHW C
    frame_of = torch.arange(frames).repeat_interleave(height * width)
    seen = frame_of[:, None] >= frame_of[None, :]
    q, k, v = (linear(tokens).unsqueeze(1) for linear in (layer.to_q, layer.to_k, layer.to_v))
    out = layer.to_out[0](F.scaled_dot_product_attention(q, k, v, attn_mask=seen).squeeze(1))
    return x + out.transpose(1, 2).unflatten(2, (frames, height, width))


def upsample(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """What `UpsampledFrames` computes, with a backward pass, B C F H W."""
    time_factor, *space = factors
    if time_factor > 1:
        x = torch.cat((x[:, :, :1], x[:, :, 1:].repeat_interleave(time_factor, dim=2)), dim=2)
    return x.repeat_interleave(space[0], dim=3).repeat_interleave(space[1], dim=4)


def run_layer(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """What a layer of the VAE computes, with a backward pass, which its own `forward` does not have, B C F H W."""
    if isinstance(layer, ResnetBlock):
        h = convolve(layer.conv2, activated(layer.norm2, convolve(layer.conv1, activated(layer.norm1, x))))
        return h + (x if layer.conv_shortcut is None else convolve(layer.conv_shortcut, x))
    if isinstance(layer, FrameCausalAttention):
        return attend(layer, x)
    if isinstance(layer, Downsample):
        return convolve(layer.conv, x)
    if isinstance(layer, Upsample):
        return convolve(layer.conv, upsample(x, layer.factors))
    raise TypeError(type(layer).__name__)


def encode(vae: AutoencoderKLCausal3D, pixels: Tensor) -> DiagonalGaussian:
    """`vae.encode` with a backward pass; pixels B 3 F H W in -1..1."""
    encoder = vae.encoder
    x = convolve(encoder.conv_in, pixels)
    for block in [*encoder.down_blocks, encoder.mid_block]:
        for layer in block.layers():
            x = run_layer(layer, x)
    return DiagonalGaussian(vae.quant_conv(convolve(encoder.conv_out, activated(encoder.conv_norm_out, x))))


def decode(vae: AutoencoderKLCausal3D, latents: Tensor) -> Tensor:
    """`vae.decode` with a backward pass; latents B C f h w."""
    decoder = vae.decoder
    x = convolve(decoder.conv_in, vae.post_quant_conv(latents))
    for block in [decoder.mid_block, *decoder.up_blocks]:
        for layer in block.layers():
            x = run_layer(layer, x)
    return convolve(decoder.conv_out, activated(decoder.conv_norm_out, x))


def new_vae() -> AutoencoderKLCausal3D:
    """A VAE whose convolutions start close to the identity, so that colours are right from the start.

    A layer that halves the number of frames would lose every other frame. It starts with the lost frame in the second
    half of its channels. The posterior starts with a small variance, so that its noise does not hide the latents.
    """
    vae = AutoencoderKLCausal3D(CONFIG)
    encoder, decoder = vae.encoder, vae.decoder
    passing = [vae.quant_conv, vae.post_quant_conv]
    passing += [end.conv for half in (encoder, decoder) for end in (half.conv_in, half.conv_out)]
    halving_time = []
    with torch.no_grad():
        for layer in vae.modules():
            if isinstance(layer, ResnetBlock):
                layer.conv2.conv.weight *= 0.1
                layer.conv2.conv.bias.zero_()
                passing += [layer.conv_shortcut.conv] if layer.conv_shortcut is not None else []
            elif isinstance(layer, Downsample | Upsample):
                passing.append(layer.conv.conv)
            if isinstance(layer, Downsample) and layer.conv.conv.stride[0] > 1:
                halving_time.append(layer.conv.conv)
        for conv in passing:
            channels, centre = torch.arange(min(conv.weight.shape[:2])), conv.kernel_size[-1] // 2
            conv.weight *= 0.5
            conv.weight[channels, channels, -1, centre, centre] += 1  # in time, the last tap is the frame itself
        for conv in halving_time:
            half = torch.arange(len(conv.weight) // 2)
            conv.weight[half + len(half), half + len(half), -1, 1, 1] -= 1
            conv.weight[half + len(half), half, -2, 1, 1] += 1
        vae.quant_conv.weight[CONFIG.latent_channels :] *= 0.1
        vae.quant_conv.bias[CONFIG.latent_channels :] = -5.0
    return vae.to(memory_format=torch.channels_last_3d)


def loss_of(vae: AutoencoderKLCausal3D, pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(loss, mean squared error) of a batch B 3 F H W. Loss: absolute + squared error + KL_WEIGHT x KL divergence."""
    posterior = encode(vae, pixels)
    error = decode(vae, posterior.sample(generator)) - pixels
    kl = 0.5 * (posterior.mean.square() + posterior.logvar.exp() - 1 - posterior.logvar).mean()
    squared = error.square().mean()
    return error.abs().mean() + squared + KL_WEIGHT * kl, squared


def any_colour(generator: random.Random) -> tuple[int, int, int]:
    """A saturated or a gray RGB colour."""
    saturation = generator.choice((0.0, generator.uniform(0.5, 1.0), generator.uniform(0.7, 1.0)))
    rgb = colorsys.hsv_to_rgb(generator.random(), saturation, generator.uniform(0.05, 1.0))
    return tuple(round(255 * channel) for channel in rgb)


def training_clip(generator: random.Random) -> Tensor:
    """Pixels (3, 9, 64, 64) in 0..1: mostly the known world, else shapes in any colours, nested and on any path.

    The VAE must also reproduce what the DiT has never seen.
    """
    frames, side = CLIP_FRAMES, CLIP_SIDE
    if generator.random() < 0.65:
        return render(random_scene(generator), frames, side, side)
    layers = [Layer(generator.choice(SHAPES), any_colour(generator))]
    if generator.random() < 0.6:
        layers.append(Layer(generator.choice(SHAPES), any_colour(generator), generator.uniform(0.35, 0.75)))
    motion = (generator.uniform(-0.35, 0.35), generator.uniform(-0.35, 0.35), 2 ** generator.uniform(-0.8, 0.8))
    offset = (generator.uniform(-0.2, 0.2), generator.uniform(-0.2, 0.2))
    return draw(layers, any_colour(generator), motion, generator.uniform(0.12, 0.3), offset, (frames, side, side))


def training_batch(generator: random.Random, stage: Stage) -> Tensor:
    """Pixels (B, 3, F, H, W) in -1..1. Each item is a random crop of another clip."""
    crops = []
    for _ in range(stage.batch):
        clip = training_clip(generator)
        frame, top, left = (
            generator.randint(0, length - wanted)
            for length, wanted in zip(clip.shape[1:], (stage.frames, stage.side, stage.side), strict=True)
        )
        crops.append(clip[:, frame:, top:, left:][:, : stage.frames, : stage.side, : stage.side])
    return torch.stack(crops) * 2 - 1


def stage_of(step: int) -> Stage:
    for stage in STAGES:
        if step < stage.steps:
            return stage
        step -= stage.steps
    raise ValueError("after the last step")


def learning_rate_at(step: int) -> float:
    """The learning rate: linear warmup, and cosine decay to a hundredth."""
    falling = 0.5 * (1 + math.cos(math.pi * step / TOTAL_STEPS))
    return PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (0.01 + 0.99 * falling)


def psnr(squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of pixels in -1..1."""
    return 10 * math.log10(4 / squared_error)


def normalized(vae: AutoencoderKLCausal3D, seed: int) -> AutoencoderKLCausal3D:
    """The VAE, changed in place so that every scaled latent channel has mean 0 and variance 1 over clips of the world.

    Flow matching starts from noise of unit variance. The two 1x1x1 convolutions around the latents undo each other's
    change, so that decoded pixels stay the same.
    """
    generator = random.Random(f"{seed}/statistics")
    with torch.no_grad():
        clips = training_batch(generator, Stage(1, 64, CLIP_FRAMES, CLIP_SIDE))
        means = torch.cat([vae.encode(clip.unsqueeze(0)).mean for clip in clips])
        mean, std = means.mean((0, 2, 3, 4)), means.std((0, 2, 3, 4)) * SCALING_FACTOR
        into, out = vae.quant_conv, vae.post_quant_conv
        C = len(mean)
        out.bias += out.weight.flatten(1) @ mean
        out.weight *= std.view(1, C, 1, 1, 1)
        into.weight[:C] /= std.view(C, 1, 1, 1, 1)
        into.bias[:C] = (into.bias[:C] - mean) / std
        into.bias[C:] -= 2 * std.log()
    return vae


@dataclass
class TrainingRun:
    """The state of a training run."""

    vae: AutoencoderKLCausal3D
    optimizer: torch.optim.Optimizer
    seed: int
    step: int = 0
    log: list[dict[str, float]] = field(default_factory=list)

    @property
    def plan(self) -> list:
        """What a run must have in common with the saved run that it continues."""
        return [self.seed, PEAK_RATE, *(list(astuple(stage)) for stage in STAGES)]

    def save(self, folder: Path) -> None:
        parts = {"vae": self.vae.state_dict(), "optimizer": self.optimizer.state_dict()}
        with atomic_path(folder / STATE) as temporary:
            torch.save({**parts, "step": self.step, "log": self.log, "plan": self.plan}, temporary)

    def resume(self, folder: Path) -> None:
        """Loads the state in `folder` if there is one; raises UserError if it is from a run with another plan."""
        if not (folder / STATE).exists():
            return
        saved = torch.load(folder / STATE, weights_only=True)
        if saved["plan"] != self.plan:
            raise UserError(
                f"{folder / STATE}: saved with another seed or other stages; remove it or name another folder"
            )
        self.vae.load_state_dict(saved["vae"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.log = saved["step"], saved["log"]


def train(folder: Path, seed: int) -> TrainingRun:
    """Trains to the last step, from the state in `folder` if there is one."""
    torch.manual_seed(seed)
    vae = new_vae()
    run = TrainingRun(vae, torch.optim.AdamW(vae.parameters(), PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.0), seed)
    run.resume(folder)
    errors = []
    with tqdm(range(run.step, TOTAL_STEPS), "VAE", TOTAL_STEPS, initial=run.step) as progress:
        for step in progress:
            errors.append(train_step(run, step))
            run.step = step + 1
            if run.step % SAVE_EVERY and run.step < TOTAL_STEPS:
                continue
            line = {"step": run.step, "frames": stage_of(step).frames, "psnr": round(psnr(fmean(errors)), 2)}
            progress.set_postfix(psnr=line["psnr"])
            run.log.append(line)
            run.save(folder)
            errors = []
    return run


def train_step(run: TrainingRun, step: int) -> float:
    """One step; returns the mean squared error. What is drawn at random depends only on the seed and the step."""
    pixels = training_batch(random.Random(f"{run.seed}/{step}"), stage_of(step))
    loss, squared = loss_of(run.vae, pixels, torch.Generator().manual_seed(step))
    run.optimizer.param_groups[0]["lr"] = learning_rate_at(step)
    run.optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.vae.parameters(), 1.0)
    run.optimizer.step()
    return squared.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    run = train(args.folder, args.seed)
    weights = {name: tensor.half() for name, tensor in normalized(run.vae, args.seed).state_dict().items()}
    write_text(args.folder / "vae_log.jsonl", "".join(json.dumps(line) + "\n" for line in run.log))
    config = {"config": json.dumps({"norm_num_groups": CONFIG.norm_num_groups})}
    save_file(weights, args.folder / "vae.safetensors", config)


if __name__ == "__main__":
    run_script(main)
