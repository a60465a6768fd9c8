"""The two text encoders: LLaVA-Llama-3-8B's language model for the token states, CLIP-L for one pooled vector.

The layers are those of transformers. The DiT is conditioned on the LLM's third hidden state from the end, so the LLM's
last two layers, its final norm and its head are never built, loaded or run.

    model = empty_llm(config)          # parameters on the meta device; a loader fills them one by one
    llm = LlmTextEncoder(model, llm_tokenizer(path), fingerprint)
    states, mask = llm.encode(["a cat"])
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hunyuan_model.shapes import Shapes, depth
from hunyuan_model.tokenizers import PromptTokenizer
from utils.errors import UserError

# The official pipeline's "hidden_state_skip_layer": the states are hidden_states[-3] of the whole LLM.
SKIPPED_LAYERS = 2
# The head sizes of every Llama 3 and of CLIP ViT-L/14, which the shapes of a single file do not tell.
LLAMA_3_HEAD_DIM = 128
CLIP_HEAD_DIM = 64


class LlmTextEncoder:
    """Text encoder 1.

    Args:
        model: an `empty_llm` that was filled, or any Llama whose `last_hidden_state` is the conditioning.
        tokenizer: from `hunyuan_model.tokenizers.llm_tokenizer`.
        fingerprint: identifies weights and tokenizer in caches.

    Raises:
        UserError: the tokenizer has more tokens than the model.
    """

    def __init__(self, model: nn.Module, tokenizer: PromptTokenizer, fingerprint: str) -> None:
        _check_vocabulary(model, tokenizer)
        # A loader has moved the parameters to their device; this moves the buffers.
        self.model = model.eval().requires_grad_(False).to(model.device)
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States (B, 256, D) of the prompts' tokens and their mask (B, 256) int64, padded on the right."""
        ids, mask = (each.to(self.model.device) for each in self.tokenizer(prompts))  # (B, prefix + 256)
        states = self.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # (B, L, D)
        prefix = self.tokenizer.prefix_length
        return states[:, prefix:], mask[:, prefix:]

    def truncated(self, prompts: Sequence[str]) -> list[str]:
        """For each prompt the end beyond 256 tokens, which is cut; an empty string if nothing is cut."""
        return self.tokenizer.truncated(prompts)


class ClipTextEncoder:
    """Text encoder 2.

    Args:
        model: an `empty_clip` that was filled.
        tokenizer: from `hunyuan_model.tokenizers.clip_tokenizer`.
        fingerprint: identifies weights and tokenizer in caches.

    Raises:
        UserError: the tokenizer has more tokens than the model.
    """

    def __init__(self, model: nn.Module, tokenizer: PromptTokenizer, fingerprint: str) -> None:
        _check_vocabulary(model, tokenizer)
        # A loader has moved the parameters to their device; this moves the buffers.
        self.model = model.eval().requires_grad_(False).to(model.device)
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """The pooled state at the end-of-text token, (B, D2)."""
        ids, mask = (each.to(self.model.device) for each in self.tokenizer(prompts))  # (B, 77)
        return self.model(input_ids=ids, attention_mask=mask).pooler_output


def _check_vocabulary(model: nn.Module, tokenizer: PromptTokenizer) -> None:
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.size > rows:
        raise UserError(
            f"{tokenizer.path}: a tokenizer with {tokenizer.size} tokens, but the text encoder has {rows}; give the "
            "right one with --tokenizer1 (LLM) or --tokenizer2 (CLIP)"
        )


def llm_config_from_shapes(shapes: Shapes, config: Mapping[str, Any] | None = None) -> LlamaConfig:
    """The config of a Llama 3 from the shapes of its tensors; what its config.json states has precedence.

    Args:
        shapes: {name: shape} with the names of a LlamaForCausalLM (`model.layers.0...`).
        config: content of config.json, which may omit sizes; of a LLaVA's only the language part is used.

    Raises:
        UserError: a tensor that every Llama has is missing.
    """
    given = dict(config or {})
    given = given.get("text_config", given)
    layer = "model.layers.0"
    try:
        vocabulary, hidden = shapes["model.embed_tokens.weight"]
        queries = shapes[f"{layer}.self_attn.q_proj.weight"][0]
        keys = shapes[f"{layer}.self_attn.k_proj.weight"][0]
        mlp = shapes[f"{layer}.mlp.gate_proj.weight"][0]
    except KeyError as error:
        raise UserError(f"not a Llama language model: the tensor {error} is missing") from None
    heads = given.get("num_attention_heads", queries // LLAMA_3_HEAD_DIM)
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "head_dim": queries // heads,
        "num_attention_heads": heads,
        "num_key_value_heads": keys * heads // queries,
        "num_hidden_layers": depth(shapes, "model.layers."),
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
    }
    if "rope_parameters" not in given:
        sizes["rope_theta"] = 500_000.0
    return LlamaConfig(**(sizes | given))


def clip_config_from_shapes(shapes: Shapes, config: Mapping[str, Any] | None = None) -> CLIPTextConfig:
    """The config of a CLIP-L text model from the shapes of its tensors; what its config.json states has precedence.

    Args:
        shapes: {name: shape} with the published names (`text_model.encoder...`).
        config: content of config.json; of a whole CLIP's only the text part is used.

    Raises:
        UserError: a tensor that every CLIP text model has is missing.
    """
    given = dict(config or {})
    given = given.get("text_config", given)
    try:
        vocabulary, hidden = shapes["text_model.embeddings.token_embedding.weight"]
        positions = shapes["text_model.embeddings.position_embedding.weight"][0]
        mlp = shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0]
    except KeyError as error:
        raise UserError(f"not a CLIP text model: the tensor {error} is missing") from None
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": hidden // CLIP_HEAD_DIM,
        "num_hidden_layers": depth(shapes, "text_model.encoder.layers."),
        "max_position_embeddings": positions,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }
    return CLIPTextConfig(**(sizes | given))


def empty_llm(config: LlamaConfig) -> LlamaModel:
    """The layers of the LLM that are used, with parameters on the meta device and buffers on the CPU.

    The parameter `layers.0...` is the tensor `model.layers.0...` of a LlamaForCausalLM.

    Raises:
        UserError: the model has too few layers.
    """
    needed = config.num_hidden_layers - SKIPPED_LAYERS
    if needed < 1:
        raise UserError(f"text encoder 1: {config.num_hidden_layers} layers, at least {SKIPPED_LAYERS + 1} are needed")
    # No text is generated, so no keys and values are cached. The states are used without the final norm.
    config = LlamaConfig(**(config.to_dict() | {"num_hidden_layers": needed, "use_cache": False}))
    with torch.device("meta"):
        model = LlamaModel(config)
    model.norm = nn.Identity()
    model.rotary_emb = LlamaRotaryEmbedding(config)
    return model


def empty_clip(config: CLIPTextConfig) -> CLIPTextModel:
    """CLIP's text model, with parameters on the meta device and buffers on the CPU.

    The parameter `encoder.layers.0...` is the tensor `text_model.encoder.layers.0...` of the published files.
    """
    with torch.device("meta"):
        model = CLIPTextModel(config)
    positions = torch.arange(config.max_position_embeddings)[None]
    model.embeddings.register_buffer("position_ids", positions, persistent=False)
    return model
