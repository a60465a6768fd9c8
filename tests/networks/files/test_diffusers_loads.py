"""diffusers loads our file in its format: no key missing, none unexpected, and the output is ours."""

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.loaders.lora_pipeline import HunyuanVideoLoraLoaderMixin
from peft import get_peft_model_state_dict

from hunyuan_model.checkpoints.names import dit_from_official
from hunyuan_model.models import HunyuanVideoConfig, HYVideoDiffusionTransformer
from networks.factors import LoraFactors
from networks.files.format_table import FORMATS
from networks.files.formats import LoraWeights
from networks.files.lora_files import read_lora, write_lora
from networks.lora import create_arch_network
from utils.safetensors_utils import load_file

CONFIG = HunyuanVideoConfig(
    hidden_size=64,
    heads=2,
    mlp_hidden=256,
    depth_double=2,
    depth_single=2,
    text_dim=48,
    text_dim_2=24,
    rope_dims=(4, 14, 14),
)


def random_dit() -> HYVideoDiffusionTransformer:
    torch.manual_seed(0)
    model = HYVideoDiffusionTransformer(CONFIG).eval().requires_grad_(False)
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.copy_(noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.5 + 0.2 * noise)
    return model


def diffusers_twin(model: HYVideoDiffusionTransformer) -> HunyuanVideoTransformer3DModel:
    twin = HunyuanVideoTransformer3DModel(
        num_attention_heads=CONFIG.heads,
        attention_head_dim=CONFIG.head_dim,
        num_layers=CONFIG.depth_double,
        num_single_layers=CONFIG.depth_single,
        num_refiner_layers=CONFIG.depth_refiner,
        text_embed_dim=CONFIG.text_dim,
        pooled_projection_dim=CONFIG.text_dim_2,
        rope_axes_dim=CONFIG.rope_dims,
    )
    twin.load_state_dict(dit_from_official(model.state_dict(), "diffusers"))
    return twin.eval()


def random_network(model, use_dora="False", ranks=(4,)):
    network = create_arch_network(
        1.0, ranks[0], 3.0, None, [], model, use_dora=use_dora, include_patterns="['.*mod.*linear']"
    )
    for index, adapter in enumerate(network.adapters):
        rank = ranks[index % len(ranks)]
        adapter.rank, adapter.scale = rank, 3.0 / rank
        adapter.lora_down.weight = torch.nn.Parameter(torch.randn(rank, adapter.in_features) / adapter.in_features**0.5)
        adapter.lora_up.weight = torch.nn.Parameter(torch.randn(adapter.out_features, rank) / rank)
        if adapter.dora_scale is not None:
            adapter.dora_scale.data *= 0.5 + torch.rand_like(adapter.dora_scale)
    return network.requires_grad_(False)


@pytest.mark.parametrize(("use_dora", "ranks"), [("False", (4,)), ("False", (4, 1, 8)), ("True", (4,))])
def test_loads_whole_and_computes_the_same(tmp_path, use_dora, ranks):
    model = random_dit()
    twin = diffusers_twin(model)
    network = random_network(model, use_dora, ranks)
    network.save_weights(tmp_path / "native.safetensors", None, {})
    write_lora(read_lora(tmp_path / "native.safetensors"), tmp_path / "diffusers.safetensors", FORMATS["diffusers"])

    twin.load_lora_adapter(tmp_path / "diffusers.safetensors", prefix="transformer")
    loaded = get_peft_model_state_dict(twin, adapter_name="default_0")
    written = load_file(tmp_path / "diffusers.safetensors")
    assert {f"transformer.{key}" for key in loaded} == written.keys()
    assert all(torch.equal(loaded[key.removeprefix("transformer.")], tensor) for key, tensor in written.items())

    x, timestep = torch.randn(1, 16, 2, 4, 6), torch.tensor([400.0])
    text, pooled, mask = torch.randn(1, 9, 48), torch.randn(1, 24), torch.ones(1, 9, dtype=torch.long)
    guidance = torch.tensor([6000.0])
    with torch.no_grad():
        plain = model(x, timestep, text, mask, pooled, guidance)
        network.apply_to([], model)
        network.eval()
        ours = model(x, timestep, text, mask, pooled, guidance)
        theirs = twin(x, timestep, text, mask, pooled, guidance).sample
    assert (ours - plain).abs().max() > 0.01 * plain.abs().max()
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_diffusers_converts_official_names_to_our_diffusers_file(tmp_path):
    """Its own conversion (for the 13B model's widths only) of our 'other' file gives our 'diffusers' file."""
    torch.manual_seed(0)
    shapes = {}
    for stream in ("img", "txt"):
        for name, shape in {"attn_qkv": (9216, 3072), "mlp.fc1": (12288, 3072), "mod.linear": (18432, 3072)}.items():
            shapes[f"double_blocks.19.{stream}_{name}"] = shape
    shapes |= {"single_blocks.7.linear1": (21504, 3072), "single_blocks.7.linear2": (3072, 15360)}
    shapes |= {"vector_in.in_layer": (3072, 768), "txt_in.individual_token_refiner.blocks.1.mlp.fc2": (3072, 12288)}
    modules = {
        name: LoraFactors(up=torch.randn(rows, 2), down=torch.randn(2, columns), alpha=3.0)
        for name, (rows, columns) in shapes.items()
    }
    for name in ("other", "diffusers"):
        write_lora(LoraWeights(modules), tmp_path / f"{name}.safetensors", FORMATS[name])
    theirs = HunyuanVideoLoraLoaderMixin.lora_state_dict(tmp_path / "other.safetensors")
    ours = load_file(tmp_path / "diffusers.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], tensor) for key, tensor in ours.items())
    unchanged = HunyuanVideoLoraLoaderMixin.lora_state_dict(tmp_path / "diffusers.safetensors")
    assert unchanged.keys() == ours.keys()
