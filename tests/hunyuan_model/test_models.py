"""The DiT against diffusers' implementation, same weights and inputs, and against itself under padding and batching."""

from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel

from hunyuan_model.models import HunyuanVideoConfig, HYVideoDiffusionTransformer, drop_padding, with_image_keys
from utils.errors import UserError

KEY_TABLE = Path(__file__).parent.parent / "data" / "hunyuanvideo_dit_keys.tsv"

# docs/formats.md 2.9, written out here on its own so that the project's key map is not its own witness.
EMBEDDERS = {
    "img_in.proj": "x_embedder.proj",
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
REFINER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "self_attn_proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
}
DOUBLE = {
    "img_mod.linear": "norm1.linear",
    "txt_mod.linear": "norm1_context.linear",
    "img_attn_q_norm": "attn.norm_q",
    "img_attn_k_norm": "attn.norm_k",
    "txt_attn_q_norm": "attn.norm_added_q",
    "txt_attn_k_norm": "attn.norm_added_k",
    "img_attn_proj": "attn.to_out.0",
    "txt_attn_proj": "attn.to_add_out",
    "img_mlp.fc1": "ff.net.0.proj",
    "img_mlp.fc2": "ff.net.2",
    "txt_mlp.fc1": "ff_context.net.0.proj",
    "txt_mlp.fc2": "ff_context.net.2",
}
SINGLE = {"linear2": "proj_out", "q_norm": "attn.norm_q", "k_norm": "attn.norm_k", "modulation.linear": "norm.linear"}


def to_diffusers(state: dict[str, torch.Tensor], hidden: int) -> dict[str, torch.Tensor]:
    result = {}

    def split(name: str, kind: str, value: torch.Tensor, targets: list[str], sizes: list[int]) -> None:
        for target, part in zip(targets, value.split(sizes), strict=True):
            result[f"{name}.{target}.{kind}"] = part

    for key, value in state.items():
        name, kind = key.rsplit(".", 1)
        parts = name.split(".")
        if name in EMBEDDERS:
            result[f"{EMBEDDERS[name]}.{kind}"] = value
        elif name == "final_layer.adaLN_modulation.1":
            shift, scale = value.chunk(2)
            result[f"norm_out.linear.{kind}"] = torch.cat((scale, shift))
        elif parts[0] == "txt_in":
            target, rest = f"context_embedder.token_refiner.refiner_blocks.{parts[3]}", ".".join(parts[4:])
            if rest == "self_attn_qkv":
                split(target, kind, value, ["attn.to_q", "attn.to_k", "attn.to_v"], [hidden] * 3)
            else:
                result[f"{target}.{REFINER[rest]}.{kind}"] = value
        elif parts[0] == "double_blocks":
            target, rest = f"transformer_blocks.{parts[1]}", ".".join(parts[2:])
            if rest == "img_attn_qkv":
                split(target, kind, value, ["attn.to_q", "attn.to_k", "attn.to_v"], [hidden] * 3)
            elif rest == "txt_attn_qkv":
                split(target, kind, value, ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"], [hidden] * 3)
            else:
                result[f"{target}.{DOUBLE[rest]}.{kind}"] = value
        else:
            target, rest = f"single_transformer_blocks.{parts[1]}", ".".join(parts[2:])
            if rest == "linear1":
                names = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
                split(target, kind, value, names, [hidden] * 3 + [value.shape[0] - 3 * hidden])
            else:
                result[f"{target}.{SINGLE[rest]}.{kind}"] = value
    return result


def small_config(hidden: int, head_dim: int, guidance: bool) -> HunyuanVideoConfig:
    return HunyuanVideoConfig(
        hidden_size=hidden,
        heads=hidden // head_dim,
        mlp_hidden=4 * hidden,
        depth_double=2,
        depth_single=2,
        text_dim=48,
        text_dim_2=24,
        rope_dims=(head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16),
        guidance_embed=guidance,
    )


def random_model(config: HunyuanVideoConfig) -> HYVideoDiffusionTransformer:
    torch.manual_seed(0)
    model = HYVideoDiffusionTransformer(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.copy_(noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.5 + 0.2 * noise)
    return model


def random_inputs(config: HunyuanVideoConfig, lengths: list[int], seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    B, L = len(lengths), 20
    return {
        "x": torch.randn(B, config.in_channels, 3, 6, 8, generator=generator),
        "timestep": torch.rand(B, generator=generator) * 1000,
        "text_states": torch.randn(B, L, config.text_dim, generator=generator),
        "text_mask": (torch.arange(L) < torch.tensor(lengths)[:, None]).long(),
        "text_states_2": torch.randn(B, config.text_dim_2, generator=generator),
        "guidance": torch.rand(B, generator=generator) * 8000 if config.guidance_embed else None,
    }


def reference(model: HYVideoDiffusionTransformer) -> HunyuanVideoTransformer3DModel:
    config = model.config
    with torch.device("meta"):
        twin = HunyuanVideoTransformer3DModel(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_attention_heads=config.heads,
            attention_head_dim=config.head_dim,
            num_layers=config.depth_double,
            num_single_layers=config.depth_single,
            num_refiner_layers=config.depth_refiner,
            mlp_ratio=config.mlp_hidden / config.hidden_size,
            guidance_embeds=config.guidance_embed,
            text_embed_dim=config.text_dim,
            pooled_projection_dim=config.text_dim_2,
            rope_axes_dim=config.rope_dims,
        )
    twin.load_state_dict(to_diffusers(model.state_dict(), config.hidden_size), strict=True, assign=True)
    return twin.eval()


@pytest.mark.parametrize("lengths", [[13], [20], [13, 5]], ids=["one", "full", "ragged"])
@pytest.mark.parametrize("guidance", [True, False], ids=["guidance", "plain"])
@pytest.mark.parametrize(("hidden", "head_dim"), [(256, 128), (384, 128), (64, 32)])
def test_equals_diffusers(hidden: int, head_dim: int, guidance: bool, lengths: list[int]) -> None:
    model = random_model(small_config(hidden, head_dim, guidance))
    inputs = random_inputs(model.config, lengths)
    with torch.no_grad():
        ours = model(**inputs)
        theirs = reference(model)(
            hidden_states=inputs["x"],
            timestep=inputs["timestep"],
            encoder_hidden_states=inputs["text_states"],
            encoder_attention_mask=inputs["text_mask"],
            pooled_projections=inputs["text_states_2"],
            guidance=inputs["guidance"],
        ).sample
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("lengths", [[7], [13, 5]])
def test_padding_has_no_influence(lengths: list[int]) -> None:
    model = random_model(small_config(64, 32, True))
    inputs = random_inputs(model.config, lengths)
    expected = model(**inputs)
    padded = inputs["text_mask"] == 0
    inputs["text_states"] = torch.where(padded[..., None], 100 * torch.randn(20, 48), inputs["text_states"])
    assert torch.equal(model(**inputs), expected)


def test_batch_of_two_is_two_of_one() -> None:
    model = random_model(small_config(64, 32, True))
    inputs = random_inputs(model.config, [13, 5])
    both = model(**inputs)
    for row in range(2):
        alone = model(**{name: value[row : row + 1] for name, value in inputs.items()})
        assert torch.allclose(both[row : row + 1], alone, rtol=0, atol=1e-5 * both.abs().max())


def test_full_size_keys_and_shapes() -> None:
    shapes = {}
    for line in KEY_TABLE.read_text().splitlines():
        key, shape = line.split("\t")
        shapes[key] = tuple(map(int, shape.split("x")))
    config = HunyuanVideoConfig.from_shapes(shapes)
    assert config == HunyuanVideoConfig()
    with torch.device("meta"):
        state = HYVideoDiffusionTransformer(config).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == shapes
    assert sum(value.numel() for value in state.values()) == pytest.approx(12.82e9, rel=1e-3)


def test_config_from_shapes_of_small_models() -> None:
    for guidance in (True, False):
        config = small_config(64, 32, guidance)
        state = HYVideoDiffusionTransformer(config).state_dict()
        assert HunyuanVideoConfig.from_shapes({key: value.shape for key, value in state.items()}) == config


def test_config_names_what_is_wrong() -> None:
    with pytest.raises(UserError, match=r"not a HunyuanVideo DiT.*img_in\.proj\.weight"):
        HunyuanVideoConfig.from_shapes({"model.weight": (1, 1)})
    state = HYVideoDiffusionTransformer(small_config(64, 32, True)).state_dict()
    with pytest.raises(UserError, match="rope_dims"):
        HunyuanVideoConfig.from_shapes({key: value.shape for key, value in state.items()}, rope_dims=(4, 14, 13))


def test_drop_padding() -> None:
    text = torch.arange(2 * 4.0).view(2, 4, 1)
    kept, mask, key_mask = drop_padding(text, torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]]))
    assert kept.shape == (2, 2, 1)
    assert mask.all()
    assert key_mask is None
    kept, mask, key_mask = drop_padding(text, torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]))
    assert kept.shape == (2, 3, 1)
    assert key_mask.shape == (2, 1, 1, 3)
    assert key_mask.flatten(1).tolist() == [[True, True, True], [True, False, False]]


def test_image_keys_are_valid_and_come_first() -> None:
    assert with_image_keys(None, image_tokens=3) is None
    key_mask = with_image_keys(torch.tensor([[True, True], [True, False]])[:, None, None, :], image_tokens=3)
    assert key_mask.shape == (2, 1, 1, 5)
    assert key_mask.flatten(1).tolist() == [[True] * 5, [True, True, True, True, False]]


def test_gradient_checkpointing_changes_nothing() -> None:
    from modules.blocks.activation_checkpointing import checkpoint_activations

    gradients = []
    for checkpointing in (False, True):
        model = random_model(small_config(64, 32, True))
        if checkpointing:
            checkpoint_activations(model.blocks)
        inputs = random_inputs(model.config, [13])
        inputs["x"].requires_grad_()
        model(**inputs).square().mean().backward()
        gradients.append(inputs["x"].grad)
    assert torch.equal(*gradients)
