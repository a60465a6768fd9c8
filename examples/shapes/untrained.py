"""Models of the shapes world with random weights: the text encoders, and the DiT before training."""

import random
from dataclasses import replace
from pathlib import Path

from examples.shapes.world import random_scene
from examples.tiny_models import TINY_DIT, dit_shapes, random_weights, write_clip, write_llm
from examples.tiny_tokenizers import clip_tokenizer, llama_tokenizer
from hunyuan_model.tokenizers import ROUND_TRIP, VIDEO_TEMPLATE
from utils.safetensors_utils import load_file, save_file

DIT = replace(TINY_DIT, hidden_size=128, heads=4, mlp_hidden=512)
# Gains with which random text encoders can be used. The LLM's layers add little to the embeddings, so that its states
# tell words apart. CLIP's end token attends to all words alike, so that the pooled vector is a sum over the words.
LLM_GAINS = {"embed_tokens": 8.0, "o_proj": 0.5, "down_proj": 0.5}
CLIP_GAINS = {"token_embedding": 11.0, "position": 0.2, "q_proj": 0.2, "k_proj": 0.2, "out_proj": 3.0, "fc2": 0.3}
# Modulation and the last layer start at zero, so that every block starts as the identity (DiT, arXiv 2212.09748).
# Training uses one guidance scale. Its weight is large, so that a test can see that the model fails with another one.
DIT_GAINS = {"_mod.linear": 0.0, "modulation": 0.0, "adaLN": 0.0, "final_layer": 0.0, "guidance_in.mlp.2": 6.0}
MERGES = 2000  # more than the text needs, so that every word of the world is one token


def vocabulary() -> list[str]:
    """Text that contains every word of the world and of the prompt template."""
    generator = random.Random(0)
    captions = [random_scene(generator, concept).caption for concept in (False, True) for _ in range(200)]
    return [*captions, VIDEO_TEMPLATE.split("<|end_header_id|>")[1].split("<|")[0], ROUND_TRIP]


def write_text_encoders(folder: Path, seed: int) -> None:
    """Writes text_encoder/ and text_encoder_2/ with weights in float16."""
    text = vocabulary()
    llm, clip = folder / "text_encoder", folder / "text_encoder_2"
    write_llm(llm, llama_tokenizer(text, MERGES), seed, LLM_GAINS, num_hidden_layers=3)
    write_clip(clip, clip_tokenizer(text, MERGES), seed, CLIP_GAINS, num_hidden_layers=1)
    for file in (llm / "model.safetensors", clip / "model.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def write_new_dit(path: Path, seed: int) -> None:
    """Writes the DiT from which training starts."""
    weights = random_weights(dit_shapes(DIT), seed, DIT_GAINS)
    save_file(weights, path)
