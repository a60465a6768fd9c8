"""Writes a small set of models with random weights in the layout and with the key names of the official ones.

Scripts and tests load it through the very code that loads the 13B model. Nothing it makes is
meaningful: videos are noise.

    python -m examples.tiny_models FOLDER
"""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from examples.tiny_tokenizers import clip_tokenizer, llama_tokenizer, write_tokenizer
from utils.cli import run_script
from utils.files import atomic_path, write_text
from utils.safetensors_utils import save_file

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class TinyModels:
    """Paths of one model set, as the scripts take them."""

    dit: Path
    vae: Path
    text_encoder1: Path
    text_encoder2: Path


@dataclass(frozen=True)
class DitSize:
    """Sizes of a DiT; the defaults are small, the official ones are 3072, 24, 20, 40, 4096 and 768."""

    hidden: int = 64
    heads: int = 2
    double_blocks: int = 3
    single_blocks: int = 6
    text_dim: int = 64
    text_dim_2: int = 128
    in_channels: int = 16
    guidance: bool = True


@dataclass(frozen=True)
class VaeSize:
    """Sizes of a VAE; the official ones are (128, 256, 512, 512) with 32 groups."""

    channels: tuple[int, int, int, int] = (8, 16, 16, 16)
    groups: int = 4


@dataclass(frozen=True)
class LlmSize:
    """Sizes of a Llama; head_dim is that of every Llama 3, so that a single file without config.json loads as well."""

    hidden: int = 64
    heads: int = 2
    key_value_heads: int = 1
    head_dim: int = 128
    mlp: int = 128
    layers: int = 5


@dataclass(frozen=True)
class ClipSize:
    """Sizes of a CLIP text model; heads have CLIP-L's 64 channels."""

    hidden: int = 128
    heads: int = 2
    mlp: int = 256
    layers: int = 2
    positions: int = 77


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def dit_shapes(size: DitSize) -> Shapes:
    """Key names and shapes of an official HunyuanVideo DiT checkpoint of this size."""
    D, head_dim, mlp = size.hidden, size.hidden // size.heads, 4 * size.hidden
    shapes: Shapes = {"img_in.proj.weight": (D, size.in_channels, 1, 2, 2), "img_in.proj.bias": (D,)}
    shapes |= _linear("txt_in.input_embedder", size.text_dim, D)
    shapes |= _linear("txt_in.t_embedder.mlp.0", 256, D) | _linear("txt_in.t_embedder.mlp.2", D, D)
    shapes |= _linear("txt_in.c_embedder.linear_1", size.text_dim, D) | _linear("txt_in.c_embedder.linear_2", D, D)
    for index in range(2):
        block = f"txt_in.individual_token_refiner.blocks.{index}"
        shapes |= _norm(f"{block}.norm1", D) | _norm(f"{block}.norm2", D)
        shapes |= _linear(f"{block}.self_attn_qkv", D, 3 * D) | _linear(f"{block}.self_attn_proj", D, D)
        shapes |= _linear(f"{block}.mlp.fc1", D, mlp) | _linear(f"{block}.mlp.fc2", mlp, D)
        shapes |= _linear(f"{block}.adaLN_modulation.1", D, 2 * D)
    for embedder in ["time_in", "guidance_in"] if size.guidance else ["time_in"]:
        shapes |= _linear(f"{embedder}.mlp.0", 256, D) | _linear(f"{embedder}.mlp.2", D, D)
    shapes |= _linear("vector_in.in_layer", size.text_dim_2, D) | _linear("vector_in.out_layer", D, D)
    for index in range(size.double_blocks):
        for stream in ("img", "txt"):
            block = f"double_blocks.{index}.{stream}"
            shapes |= _linear(f"{block}_mod.linear", D, 6 * D) | _linear(f"{block}_attn_qkv", D, 3 * D)
            shapes |= {f"{block}_attn_q_norm.weight": (head_dim,), f"{block}_attn_k_norm.weight": (head_dim,)}
            shapes |= _linear(f"{block}_attn_proj", D, D)
            shapes |= _linear(f"{block}_mlp.fc1", D, mlp) | _linear(f"{block}_mlp.fc2", mlp, D)
    for index in range(size.single_blocks):
        block = f"single_blocks.{index}"
        shapes |= _linear(f"{block}.linear1", D, 3 * D + mlp) | _linear(f"{block}.linear2", D + mlp, D)
        shapes |= {f"{block}.q_norm.weight": (head_dim,), f"{block}.k_norm.weight": (head_dim,)}
        shapes |= _linear(f"{block}.modulation.linear", D, 3 * D)
    return shapes | _linear("final_layer.linear", D, 64) | _linear("final_layer.adaLN_modulation.1", D, 2 * D)


def _conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel, kernel), f"{name}.bias": (outputs,)}


def _resnet(name: str, inputs: int, outputs: int) -> Shapes:
    shapes = _norm(f"{name}.norm1", inputs) | _conv(f"{name}.conv1.conv", inputs, outputs)
    shapes |= _norm(f"{name}.norm2", outputs) | _conv(f"{name}.conv2.conv", outputs, outputs)
    return shapes if inputs == outputs else shapes | _conv(f"{name}.conv_shortcut.conv", inputs, outputs, kernel=1)


def _vae_half(half: str, level: str, resampler: str, channels: list[int], resnets: int) -> Shapes:
    """The levels of the encoder or decoder, `channels` in the order in which they are passed, and its mid block."""
    shapes: Shapes = {}
    for index, outputs in enumerate(channels):
        inputs = channels[max(index - 1, 0)]
        for resnet in range(resnets):
            shapes |= _resnet(f"{half}.{level}.{index}.resnets.{resnet}", outputs if resnet else inputs, outputs)
        if index < len(channels) - 1:
            shapes |= _conv(f"{half}.{level}.{index}.{resampler}.0.conv.conv", outputs, outputs)
    widest = max(channels)
    attention = f"{half}.mid_block.attentions.0"
    shapes |= _norm(f"{attention}.group_norm", widest)
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        shapes |= _linear(f"{attention}.{name}", widest, widest)
    for index in range(2):
        shapes |= _resnet(f"{half}.mid_block.resnets.{index}", widest, widest)
    return shapes | _norm(f"{half}.conv_norm_out", channels[-1])


def vae_shapes(size: VaeSize) -> Shapes:
    """Key names and shapes of an official HunyuanVideo VAE checkpoint of this size: 4x8x8, 16 latent channels."""
    first, last = size.channels[0], size.channels[-1]
    shapes = _conv("encoder.conv_in.conv", 3, first) | _conv("encoder.conv_out.conv", last, 32)
    shapes |= _vae_half("encoder", "down_blocks", "downsamplers", list(size.channels), resnets=2)
    shapes |= _conv("decoder.conv_in.conv", 16, last) | _conv("decoder.conv_out.conv", first, 3)
    shapes |= _vae_half("decoder", "up_blocks", "upsamplers", list(reversed(size.channels)), resnets=3)
    return shapes | _conv("quant_conv", 32, 32, kernel=1) | _conv("post_quant_conv", 16, 16, kernel=1)


def llm_shapes(size: LlmSize, vocabulary: int) -> Shapes:
    """Key names and shapes of a LlamaForCausalLM."""
    D, queries, keys = size.hidden, size.heads * size.head_dim, size.key_value_heads * size.head_dim
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, D), "model.norm.weight": (D,)}
    for index in range(size.layers):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (queries, D),
            f"{layer}.self_attn.k_proj.weight": (keys, D),
            f"{layer}.self_attn.v_proj.weight": (keys, D),
            f"{layer}.self_attn.o_proj.weight": (D, queries),
            f"{layer}.mlp.gate_proj.weight": (size.mlp, D),
            f"{layer}.mlp.up_proj.weight": (size.mlp, D),
            f"{layer}.mlp.down_proj.weight": (D, size.mlp),
            f"{layer}.input_layernorm.weight": (D,),
            f"{layer}.post_attention_layernorm.weight": (D,),
        }
    return shapes | {"lm_head.weight": (vocabulary, D)}


def clip_shapes(size: ClipSize, vocabulary: int) -> Shapes:
    """Key names and shapes of a CLIPTextModel as published, with the prefix `text_model.`."""
    D = size.hidden
    shapes: Shapes = {
        "text_model.embeddings.token_embedding.weight": (vocabulary, D),
        "text_model.embeddings.position_embedding.weight": (size.positions, D),
    }
    for index in range(size.layers):
        layer = f"text_model.encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{name}", D, D)
        shapes |= _norm(f"{layer}.layer_norm1", D) | _norm(f"{layer}.layer_norm2", D)
        shapes |= _linear(f"{layer}.mlp.fc1", D, size.mlp) | _linear(f"{layer}.mlp.fc2", size.mlp, D)
    return shapes | _norm("text_model.final_layer_norm", D)


def random_weights(
    shapes: Mapping[str, tuple[int, ...]], seed: int, gains: Mapping[str, float] | None = None
) -> dict[str, torch.Tensor]:
    """Float32 weights that keep activations near unit size: matrices N(0, 1/fan_in), norms about 1, biases about 0.

    Args:
        gains: factors for the tensors whose names contain these words.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            weights[name] = noise / math.sqrt(math.prod(shape[1:]))
        else:
            weights[name] = 0.1 * noise + (0.0 if name.endswith("bias") else 1.0)
        weights[name] *= math.prod(gain for word, gain in (gains or {}).items() if word in name)
    return weights


def write_tiny_models(folder: str | Path, seed: int = 0) -> TinyModels:
    """Writes DiT, VAE and both text encoders below `folder`, in the layout of the official download.

    Args:
        folder: created if missing; existing files of the same names are replaced.
        seed: of the weights; the same seed gives the same files.
    """
    folder = Path(folder)
    models = TinyModels(
        dit=folder / "transformers" / "mp_rank_00_model_states.pt",
        vae=folder / "vae" / "pytorch_model.pt",
        text_encoder1=folder / "text_encoder",
        text_encoder2=folder / "text_encoder_2",
    )
    write_llm(models.text_encoder1, LlmSize(), llama_tokenizer(), seed)
    write_clip(models.text_encoder2, ClipSize(), clip_tokenizer(), seed)
    _write_vae(models.vae, VaeSize(), seed)
    with atomic_path(models.dit) as temporary:
        torch.save({"module": random_weights(dit_shapes(DitSize()), seed)}, temporary)
    return models


def _write_vae(path: Path, size: VaeSize, seed: int) -> None:
    """The official folder holds a config.json beside the weights: shapes do not tell the number of norm groups."""
    with atomic_path(path) as temporary:
        torch.save({"state_dict": random_weights(vae_shapes(size), seed)}, temporary)
    config = {
        "_class_name": "AutoencoderKLCausal3D",
        "block_out_channels": list(size.channels),
        "latent_channels": 16,
        "layers_per_block": 2,
        "norm_num_groups": size.groups,
        "scaling_factor": 0.476986,
        "spatial_compression_ratio": 8,
        "time_compression_ratio": 4,
    }
    _write_json(path.with_name("config.json"), config)


def write_llm(
    folder: Path, size: LlmSize, tokenizer: Tokenizer, seed: int, gains: Mapping[str, float] | None = None
) -> None:
    """Writes a text encoder 1; `gains` are those of `random_weights`."""
    # As in LLaVA the embedding has more rows than there are tokens: it is padded to a multiple of 64.
    rows = math.ceil(tokenizer.get_vocab_size() / 64) * 64
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_value_heads,
        "head_dim": size.head_dim,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": rows,
        "bos_token_id": tokenizer.token_to_id("<|begin_of_text|>"),
        "eos_token_id": tokenizer.token_to_id("<|end_of_text|>"),
        "pad_token_id": tokenizer.token_to_id("<pad>"),
        "tie_word_embeddings": False,
    }
    _write_json(folder / "config.json", config)
    write_tokenizer(
        tokenizer,
        folder,
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<pad>",
        model_max_length=8192,
    )
    save_file(random_weights(llm_shapes(size, rows), seed, gains), folder / "model.safetensors", {"format": "pt"})


def write_clip(
    folder: Path, size: ClipSize, tokenizer: Tokenizer, seed: int, gains: Mapping[str, float] | None = None
) -> None:
    """Writes a text encoder 2; `gains` are those of `random_weights`."""
    vocabulary = tokenizer.get_vocab_size()
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": size.hidden,
        "num_attention_heads": size.heads,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "max_position_embeddings": size.positions,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": size.hidden,
        "vocab_size": vocabulary,
        "bos_token_id": tokenizer.token_to_id("<|startoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
    }
    _write_json(folder / "config.json", config)
    write_tokenizer(
        tokenizer,
        folder,
        tokenizer_class="CLIPTokenizer",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=size.positions,
    )
    save_file(
        random_weights(clip_shapes(size, vocabulary), seed, gains), folder / "model.safetensors", {"format": "pt"}
    )


def _write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the models are written")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    options = parser.parse_args()
    for name, path in vars(write_tiny_models(options.folder, options.seed)).items():
        print(f"--{name} {path}")


if __name__ == "__main__":
    run_script(main)
