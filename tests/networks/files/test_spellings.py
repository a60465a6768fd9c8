"""LoRA files as other programs write them: all are read, with the dW that those programs compute.

Files of PEFT and diffusers are written by these libraries, and LyCORIS's too where it is installed; the dW is theirs.
The other files follow the key rules of docs/formats.md 2.4 and 2.13, and their dW is computed here from the factors.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from hunyuan_model.checkpoints.names import DIT_TO_DIFFUSERS, dit_from_official
from hunyuan_model.models import HunyuanVideoConfig, HYVideoDiffusionTransformer
from networks.files.formats import LoraWeights
from networks.files.lora_files import read_lora
from tests.networks.files.lora_reference import SHAPES, comfyui_name, diffusers_names, flat, part_rows
from utils.errors import UserError
from utils.safetensors_utils import save_file

CONFIG = HunyuanVideoConfig(
    hidden_size=64,
    heads=2,
    mlp_hidden=256,
    depth_double=1,
    depth_single=1,
    depth_refiner=1,
    text_dim=48,
    text_dim_2=24,
    rope_dims=(4, 14, 14),
)
# Modules of every kind, by official and by diffusers names.
OFFICIAL = {
    "double_blocks.0.img_attn_qkv": ["transformer_blocks.0.attn.to_q", ".to_k", ".to_v"],
    "double_blocks.0.txt_mod.linear": ["transformer_blocks.0.norm1_context.linear"],
    "single_blocks.0.linear1": ["single_transformer_blocks.0.attn.to_q", ".to_k", ".to_v", "..proj_mlp"],
    "txt_in.individual_token_refiner.blocks.0.mlp.fc1": [
        "context_embedder.token_refiner.refiner_blocks.0.ff.net.0.proj"
    ],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "final_layer.linear": ["proj_out"],
}


def parts_of(names: list[str]) -> list[str]:
    """`["a.attn.to_q", ".to_k", "..proj_mlp"]` -> the three full names."""
    block, stem = names[0].rsplit(".", 2)[0] if names[0].count(".") > 1 else "", names[0].rpartition(".")[0]
    return [f"{block}{n[1:]}" if n.startswith("..") else f"{stem}{n}" if n.startswith(".") else n for n in names]


DIFFUSERS = {official: parts_of(names) for official, names in OFFICIAL.items()}


@pytest.fixture(scope="module")
def dit() -> HYVideoDiffusionTransformer:
    torch.manual_seed(0)
    return HYVideoDiffusionTransformer(CONFIG).requires_grad_(False)


@pytest.fixture(scope="module")
def twin(dit: HYVideoDiffusionTransformer) -> Callable[[], HunyuanVideoTransformer3DModel]:
    weights = dit_from_official(dit.state_dict(), "diffusers")

    def make() -> HunyuanVideoTransformer3DModel:
        model = HunyuanVideoTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=32,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=48,
            pooled_projection_dim=24,
            rope_axes_dim=(4, 14, 14),
        )
        model.load_state_dict({name: tensor.clone() for name, tensor in weights.items()})
        return model

    return make


def copy_of(dit: HYVideoDiffusionTransformer) -> HYVideoDiffusionTransformer:
    model = HYVideoDiffusionTransformer(CONFIG)
    model.load_state_dict(dit.state_dict())
    return model


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(word in name for word in ("lora_A", "lora_B", "hada_", "lokr_")):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        elif "magnitude" in name:
            parameter.data *= 0.5 + torch.rand(parameter.shape, generator=generator)


def changes_by(model: nn.Module, before: dict[str, Tensor], naming: str) -> dict[str, Tensor]:
    """Official tensor name -> what the merged model has more than before, parts stacked."""
    after = model.state_dict()
    changes = {}
    for official, parts in DIT_TO_DIFFUSERS.items():
        names = [name.format(0) for name in (parts if naming == "diffusers" else [official])]
        for leaf in ("weight", "bias"):
            both = [
                (after[f"{name}.{leaf}"].double(), before[f"{name}.{leaf}"].double())
                for name in names
                if f"{name}.{leaf}" in after
            ]
            if both:
                change = torch.cat([new - old for new, old in both])
                swapped = naming == "diffusers" and official == "final_layer.adaLN_modulation.1"
                changes[f"{official.format(0)}.{leaf}"] = torch.cat(change.chunk(2)[::-1]) if swapped else change
    return changes


def check(lora: LoraWeights, changes: dict[str, Tensor], weights: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Every change is the expected one within `tolerance` of its largest entry; nothing is left over."""
    assert not lora.leftover
    found = lora.changes()
    for name, expected in changes.items():
        if not expected.any():
            continue
        change = found.pop(name)
        if isinstance(change, Tensor):
            actual = change
        else:
            # The library's W + dW is float64 too: in float32, the difference to W would lose the last digits of dW.
            dora = change.dora_scale is not None
            actual = change.apply(weights[name].double()) - weights[name] if dora else change.delta_weight()
        expected = expected.flatten(1) if expected.dim() > 1 else expected
        actual = actual.flatten(1) if actual.dim() > 1 else actual
        assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max(), name
    assert not found


PEFT = {
    "lora": lambda modules: LoraConfig(r=4, lora_alpha=6, target_modules=modules),
    "patterns and rslora": lambda modules: LoraConfig(
        r=4,
        lora_alpha=4,
        use_rslora=True,
        target_modules=modules,
        rank_pattern={modules[0]: 2, modules[1]: 3},
        alpha_pattern={modules[0]: 5, f"^{modules[-1]}": 1},
    ),
    "bias": lambda modules: LoraConfig(r=4, lora_alpha=6, target_modules=modules, lora_bias=True),
    "dora": lambda modules: LoraConfig(r=4, lora_alpha=6, target_modules=modules, use_dora=True),
    "loha": lambda modules: LoHaConfig(r=4, alpha=6, target_modules=modules),
    "lokr": lambda modules: LoKrConfig(r=2, alpha=6, target_modules=modules),
    "lokr, whole": lambda modules: LoKrConfig(r=200, alpha=300, target_modules=modules),
}


@pytest.mark.parametrize("naming", ["official", "diffusers"])
@pytest.mark.parametrize("kind", PEFT)
def test_a_folder_of_peft(tmp_path: Path, dit, twin, kind: str, naming: str) -> None:
    if naming == "diffusers" and kind.startswith("lokr"):
        pytest.skip("LoKr of q, k and v apart cannot be fused")
    model = copy_of(dit) if naming == "official" else twin()
    names = {official: [official] for official in OFFICIAL} if naming == "official" else DIFFUSERS
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = get_peft_model(model, PEFT[kind]([part for parts in names.values() for part in parts]))
    randomise(adapted)
    adapted.save_pretrained(tmp_path)
    lora = read_lora(tmp_path / "adapter_model.safetensors")
    merged = adapted.double().merge_and_unload()
    check(lora, changes_by(merged, before, naming), dit.state_dict())
    if kind == "lora":
        scale = 6 / 4
        module = "double_blocks.0.txt_mod.linear"
        factors = lora.modules[module]
        assert factors.scale == scale
        exact = scale * factors.up.double() @ factors.down.double()
        assert (factors.delta_weight() - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_without_its_config_the_alpha_of_peft_is_unknown(tmp_path: Path, dit, capsys) -> None:
    adapted = get_peft_model(copy_of(dit), PEFT["lora"](list(OFFICIAL)))
    adapted.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").rename(tmp_path / "elsewhere.json")
    assert {factors.scale for factors in read_lora(tmp_path / "adapter_model.safetensors").modules.values()} == {1.0}
    assert "no adapter_config.json beside it" in capsys.readouterr().err
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 1e999}')
    with pytest.raises(UserError, match="not finite"):
        read_lora(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("adapter", ["default", "style"])
def test_save_lora_adapter_of_diffusers(tmp_path: Path, dit, twin, adapter: str) -> None:
    model = twin()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.add_adapter(PEFT["lora"]([part for parts in DIFFUSERS.values() for part in parts]), adapter)
    randomise(model)
    model.save_lora_adapter(tmp_path, adapter_name=adapter)
    lora = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    model.double().fuse_lora()
    model.unload_lora()
    check(lora, changes_by(model, before, "diffusers"), dit.state_dict())


@pytest.mark.parametrize("with_metadata", [False, True])
def test_save_lora_weights_of_the_pipeline_as_simpletuner_calls_it(tmp_path: Path, dit, twin, with_metadata) -> None:
    model = twin()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alpha = 6 if with_metadata else 4  # without metadata it is lost, and taken to be the rank
    model.add_adapter(
        LoraConfig(r=4, lora_alpha=alpha, target_modules=[p for parts in DIFFUSERS.values() for p in parts])
    )
    randomise(model)
    config = {"transformer_lora_adapter_metadata": model.peft_config["default"].to_dict()} if with_metadata else {}
    HunyuanVideoPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(model), **config)
    lora = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    model.double().fuse_lora()
    model.unload_lora()
    check(lora, changes_by(model, before, "diffusers"), dit.state_dict())


@pytest.mark.parametrize("algo", ["locon", "dora", "full"])
def test_lycoris_as_simpletuner_uses_it(tmp_path: Path, dit, twin, algo: str) -> None:
    wrapper = pytest.importorskip("lycoris.wrapper")
    model = twin()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"algo": "locon", "dora_wd": True, "wd_on_output": True} if algo == "dora" else {"algo": algo}
    network = wrapper.create_lycoris(model, 1.0, linear_dim=4, linear_alpha=6, **options)
    network.apply_to()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        if "dora_scale" not in name:
            parameter.data = parameter.data + torch.randn(parameter.shape, generator=generator) * 0.1
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    network.restore()
    model.double()
    network.double().merge_to(1.0)
    lora = read_lora(tmp_path / "a.safetensors")
    check(lora, changes_by(model, before, "diffusers"), dit.state_dict())


# Spelling -> (names of a module's parts in the file, down, up, whether alpha is stored).
KOHYA, PLAIN, OLD = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight"), (
    ".lora.down.weight",
    ".lora.up.weight",
)  # fmt: skip
NAMINGS = {
    "official": lambda name: [name],
    "diffusers": diffusers_names,
    "ComfyUI": lambda name: [comfyui_name(name)],
}
WRITTEN = {
    "kohya": ("lora_unet_", "official", True, KOHYA, True),
    "kohya, diffusers names": ("lora_unet_", "diffusers", True, KOHYA, True),
    "LyCORIS, official names": ("lycoris_", "official", True, KOHYA, True),
    "LyCORIS, SimpleTuner": ("lycoris_", "diffusers", True, KOHYA, True),
    "LyCORIS, transformer": ("lycoris_transformer_", "diffusers", True, KOHYA, True),
    "OneTrainer legacy": ("lora_transformer_", "diffusers", True, KOHYA, True),
    "OneTrainer original": ("", "official", False, PLAIN, True),
    "HunyuanVideo-I2V of earlier versions": ("Hunyuan_video_I2V_lora_", "official", True, KOHYA, True),
    "ComfyUI extraction": ("diffusion_model.", "ComfyUI", False, KOHYA, False),
    "ComfyUI in a checkpoint": ("model.diffusion_model.", "ComfyUI", False, KOHYA, True),
    "ComfyUI, official in a checkpoint": ("model.diffusion_model.", "official", False, PLAIN, False),
    "unet": ("unet.", "diffusers", False, PLAIN, False),
    "unet, older diffusers": ("unet.", "diffusers", False, OLD, False),
    "peft in a transformer": ("transformer.base_model.model.", "official", False, OLD, False),
    "peft in a transformer, diffusers": ("transformer.base_model.model.", "diffusers", False, PLAIN, False),
    "no prefix, diffusers": ("", "diffusers", False, PLAIN, False),
    "adapter name": ("", "diffusers", False, (".lora_A.default_0.weight", ".lora_B.default_0.weight"), False),
    "adapter name, prefix": (
        "base_model.model.",
        "official",
        False,
        (".lora_A.my-style.weight", ".lora_B.my-style.weight"),
        True,
    ),
    "FastVideo": ("diffusion_model.", "official", False, (".lora_A", ".lora_B"), False),
    "FastVideo, diffusers": ("transformer.", "diffusers", False, (".lora_A", ".lora_B"), False),
    "compiled": ("_orig_mod.", "official", False, PLAIN, False),
    "DeepSpeed": ("module.", "official", False, PLAIN, True),
    "diffusers with alpha": ("transformer.", "diffusers", False, KOHYA, True),
}


def written(spelling: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a file, and dW in float64 by official tensor name."""
    prefix, naming, is_flat, (down, up), has_alpha = WRITTEN[spelling]
    generator = torch.Generator().manual_seed(2)
    tensors, changes = {}, {}
    for index, (official, (_, columns)) in enumerate(SHAPES.items()):
        blocks = []
        rows_of_parts = part_rows(official, "diffusers" if naming == "diffusers" else "default")
        for part, rows in zip(NAMINGS[naming](official), rows_of_parts, strict=True):
            rank = (2, 4, 8)[index % 3]
            a = torch.randn(rank, columns, generator=generator).to(dtype)
            b = torch.randn(rows, rank, generator=generator).to(dtype)
            name = prefix + (flat(part) if is_flat else part)
            tensors |= {f"{name}{down}": a, f"{name}{up}": b}
            alpha = (1.0, 2.5)[index % 2] if has_alpha else rank
            if has_alpha:
                tensors[f"{name}.alpha"] = torch.tensor(alpha)
            blocks.append(alpha / rank * b.double() @ a.double())
        dw = torch.cat(blocks)
        if official == "final_layer.adaLN_modulation.1" and naming == "diffusers":
            dw = torch.cat(dw.chunk(2)[::-1])
        changes[f"{official}.weight"] = dw
    return tensors, changes


@pytest.mark.parametrize("spelling", WRITTEN)
def test_written_by_the_rules(tmp_path: Path, spelling: str) -> None:
    tensors, changes = written(spelling)
    save_file(tensors, tmp_path / "a.safetensors")
    check(read_lora(tmp_path / "a.safetensors"), changes, {})


def test_a_pt_file(tmp_path: Path) -> None:
    tensors, changes = written("kohya")
    torch.save({"state_dict": tensors}, tmp_path / "a.pt")
    check(read_lora(tmp_path / "a.pt"), changes, {})


@pytest.mark.parametrize("naming", ["official", "diffusers", "ComfyUI"])
def test_whole_differences_and_biases(tmp_path: Path, naming: str) -> None:
    """ComfyUI's extraction of a full fine-tune: `diff`, `diff_b`, and `diff` of the weights of norms."""
    generator = torch.Generator().manual_seed(3)
    tensors, changes = {}, {}
    for official, (_, columns) in SHAPES.items():
        weights, biases = [], []
        rows_of_parts = part_rows(official, "diffusers" if naming == "diffusers" else "default")
        for part, rows in zip(NAMINGS[naming](official), rows_of_parts, strict=True):
            weights.append(torch.randn(rows, columns, generator=generator))
            biases.append(torch.randn(rows, generator=generator))
            tensors |= {f"diffusion_model.{part}.diff": weights[-1], f"diffusion_model.{part}.diff_b": biases[-1]}
        swapped = official == "final_layer.adaLN_modulation.1" and naming == "diffusers"
        for leaf, parts in (("weight", weights), ("bias", biases)):
            whole = torch.cat(parts)
            changes[f"{official}.{leaf}"] = (torch.cat(whole.chunk(2)[::-1]) if swapped else whole).double()
    norm = {"official": "double_blocks.7.img_attn_q_norm", "diffusers": "transformer_blocks.7.attn.norm_q"}
    norm["ComfyUI"] = "double_blocks.7.img_attn.norm.query_norm"
    tensors[f"diffusion_model.{norm[naming]}.diff"] = torch.ones(24)
    changes["double_blocks.7.img_attn_q_norm.weight"] = torch.ones(24).double()
    save_file(tensors, tmp_path / "a.safetensors")
    check(read_lora(tmp_path / "a.safetensors"), changes, {}, tolerance=0)


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    keys = ("lora_A.first.weight", "lora_A.second.weight")
    save_file({f"double_blocks.0.img_attn_proj.{key}": torch.ones(2, 8) for key in keys}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"has two lora_A.weight for double_blocks.0.img_attn_proj"):
        read_lora(tmp_path / "a.safetensors")
