"""Writes small models with random weights, with the layout and the tensor names of the official ones.

The same code loads them and the 13B model, so they serve to test it. The videos that they make are noise.

    python -m examples.tiny_models FOLDER
"""

import argparse
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM

from examples.tiny_tokenizers import clip_tokenizer, llama_tokenizer, write_tokenizer
from hunyuan_model.models import HunyuanVideoConfig, HYVideoDiffusionTransformer
from hunyuan_model.vae import AutoencoderKLCausal3D, VaeConfig
from utils.cli import run_script
from utils.files import atomic_path, write_text
from utils.safetensors_utils import save_file

Shapes = dict[str, tuple[int, ...]]

TINY_DIT = HunyuanVideoConfig(
    hidden_size=64,
    heads=2,
    mlp_hidden=256,
    depth_double=3,
    depth_single=6,
    text_dim=64,
    text_dim_2=128,
    rope_dims=(4, 14, 14),
)
TINY_VAE = VaeConfig(block_out_channels=(8, 16, 16, 16), norm_num_groups=4)
# The head sizes are those of every Llama 3 and of CLIP-L, so that a single file without config.json can be loaded too.
TINY_LLM = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
}
TINY_CLIP = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "max_position_embeddings": 77,
}
# `random_weights` draws tensors in the order of their names. The models of examples/shapes were drawn in another order
# than that of the state dicts. So that the recipe makes the same models again, a tensor whose name matches one of these
# patterns is drawn after the tensor whose name results from the replacement.
_DRAWN_AFTER = (
    (r"^vector_in\..*", "guidance_in.mlp.2.bias"),
    (r"(?<!resnets\.\d\.)norm2\.(weight|bias)$", "norm1.bias"),
    (r"^model\.norm\.weight$", "model.embed_tokens.weight"),
    (r"[kv]_proj\.(weight|bias)$", "q_proj.bias"),
)


@dataclass(frozen=True)
class TinyModels:
    """Paths of one model set, as the scripts take them."""

    dit: Path
    vae: Path
    text_encoder1: Path
    text_encoder2: Path


def _shapes(model: nn.Module, prefix: str = "") -> Shapes:
    """Names and shapes of a model's state dict, in the order in which `random_weights` draws them."""
    shapes = {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    position = {name: index for index, name in enumerate(shapes)}

    def key(name: str) -> tuple[int, int]:
        others = (re.sub(pattern, other, name) for pattern, other in _DRAWN_AFTER if re.search(pattern, name))
        return next(((position[other], position[name]) for other in others if other in position), (position[name], -1))

    return {name: shapes[name] for name in sorted(shapes, key=key)}


def dit_shapes(config: HunyuanVideoConfig = TINY_DIT, **changes: Any) -> Shapes:
    """Names and shapes of an official HunyuanVideo DiT checkpoint; `changes` replace fields of the config."""
    with torch.device("meta"):
        return _shapes(HYVideoDiffusionTransformer(replace(config, **changes)))


def vae_shapes(config: VaeConfig = TINY_VAE) -> Shapes:
    """Names and shapes of an official HunyuanVideo VAE checkpoint."""
    with torch.device("meta"):
        return _shapes(AutoencoderKLCausal3D(config))


def llm_shapes(config: LlamaConfig) -> Shapes:
    """Names and shapes of a published Llama."""
    with torch.device("meta"):
        return _shapes(LlamaForCausalLM(config))


def clip_shapes(config: CLIPTextConfig) -> Shapes:
    """Names and shapes of a published CLIP text model, whose prefix `text_model.` transformers 5 has dropped."""
    with torch.device("meta"):
        return _shapes(CLIPTextModel(config), prefix="text_model.")


def random_weights(
    shapes: Mapping[str, tuple[int, ...]], seed: int, gains: Mapping[str, float] | None = None
) -> dict[str, torch.Tensor]:
    """Random float32 weights that keep activations near unit variance.

    Matrices are N(0, 1/fan_in), the weights of norms N(1, 0.01), biases N(0, 0.01).

    Args:
        gains: {part of a name: factor}; every tensor is multiplied by the factors of all parts that its name contains.
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
    write_llm(models.text_encoder1, llama_tokenizer(), seed)
    write_clip(models.text_encoder2, clip_tokenizer(), seed)
    _write_vae(models.vae, TINY_VAE, seed)
    with atomic_path(models.dit) as temporary:
        torch.save({"module": random_weights(dit_shapes(), seed)}, temporary)
    return models


def _write_vae(path: Path, config: VaeConfig, seed: int) -> None:
    """Writes weights and config.json, as in the official folder. Shapes do not tell the number of norm groups."""
    with atomic_path(path) as temporary:
        torch.save({"state_dict": random_weights(vae_shapes(config), seed)}, temporary)
    content = {
        "_class_name": "AutoencoderKLCausal3D",
        "block_out_channels": list(config.block_out_channels),
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "scaling_factor": 0.476986,
        "spatial_compression_ratio": 8,
        "time_compression_ratio": 4,
    }
    _write_json(path.with_name("config.json"), content)


def write_llm(
    folder: Path,
    tokenizer: Tokenizer,
    seed: int,
    gains: Mapping[str, float] | None = None,
    **sizes: int,
) -> None:
    """Writes text encoder 1; `gains` are those of `random_weights`, `sizes` replace some of TINY_LLM."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **TINY_LLM,
        **sizes,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        # As in LLaVA the embedding has more rows than there are tokens: their number is a multiple of 64.
        "vocab_size": math.ceil(tokenizer.get_vocab_size() / 64) * 64,
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
    weights = random_weights(llm_shapes(LlamaConfig(**config)), seed, gains)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def write_clip(
    folder: Path,
    tokenizer: Tokenizer,
    seed: int,
    gains: Mapping[str, float] | None = None,
    **sizes: int,
) -> None:
    """Writes text encoder 2; `gains` are those of `random_weights`, `sizes` replace some of TINY_CLIP."""
    config: dict[str, Any] = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        **TINY_CLIP,
        **sizes,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": TINY_CLIP["hidden_size"],
        "vocab_size": tokenizer.get_vocab_size(),
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
        model_max_length=TINY_CLIP["max_position_embeddings"],
    )
    weights = random_weights(clip_shapes(CLIPTextConfig(**config)), seed, gains)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


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
