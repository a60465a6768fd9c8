"""LoRA, DoRA, LoHa and LoKr on a small DiT: trained, saved, loaded and merged; and the mathematics of each."""

import copy
import itertools

import pytest
import torch
from torch import nn

from hunyuan_model.models import HunyuanVideoConfig, HYVideoDiffusionTransformer
from hunyuan_model.quantization import Fp8Linear, quantize_linears
from networks import loha, lokr, lora
from networks.merging import float32_weight, weight_changes
from networks.targets import find_targets
from utils.errors import UserError
from utils.safetensors_utils import load_file

CONFIG = HunyuanVideoConfig(
    hidden_size=48,
    heads=2,
    mlp_hidden=192,
    depth_double=2,
    depth_single=2,
    text_dim=32,
    text_dim_2=16,
    rope_dims=(4, 10, 10),
)
KINDS = {
    "lora": (lora, {}),
    "dora": (lora, {"use_dora": "True"}),
    "loha": (loha, {}),
    "lokr": (lokr, {}),
    "lokr, factor 8": (lokr, {"factor": "8"}),
}


@pytest.fixture
def dit() -> HYVideoDiffusionTransformer:
    torch.manual_seed(0)
    model = HYVideoDiffusionTransformer(CONFIG).requires_grad_(False)
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.copy_(noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.5 + 0.2 * noise)
    return model.eval()


def run(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, 1, 4, 6, generator=generator)
    text = torch.randn(2, 7, 32, generator=generator)
    pooled = torch.randn(2, 16, generator=generator)
    mask = (torch.arange(7) < torch.tensor([[7], [4]])).long()
    return model(x, torch.tensor([100.0, 700.0]), text, mask, pooled, torch.tensor([6000.0, 1000.0]))


def create(module, dit, dim=4, alpha=3.0, dropout=None, **arguments):
    network = module.create_arch_network(1.0, dim, alpha, None, [], dit, neuron_dropout=dropout, **arguments)
    network.apply_to([], dit, False, True)
    network.prepare_grad_etc(dit)
    return network


def train(network, dit, steps=5):
    optimizer = torch.optim.AdamW(network.prepare_optimizer_params(unet_lr=2e-2)[0])
    network.on_epoch_start(dit)
    losses = []
    for _ in range(steps):
        network.on_step_start()
        loss = (run(dit) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    network.eval()
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_trained_saved_loaded_merged(dit, tmp_path, kind):
    module, arguments = KINDS[kind]
    plain, untouched = run(dit), copy.deepcopy(dit.state_dict())
    loaded_into, merged_into = copy.deepcopy(dit), copy.deepcopy(dit)
    network = create(module, dit, **arguments)
    assert torch.equal(run(dit), plain) or kind == "dora"
    assert torch.allclose(run(dit), plain, atol=1e-5)
    losses = train(network, dit)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = run(dit)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in dit.state_dict().items())
    path = tmp_path / "lora.safetensors"
    network.save_weights(path, None, {"ss_network_dim": "4"})

    weights = load_file(path)
    loaded = module.create_arch_network_from_weights(1.0, weights, unet=loaded_into, for_inference=True)
    loaded.apply_to([], loaded_into)
    loaded.eval()
    parameters = dict(merged_into.named_parameters())
    changes = weight_changes({name: weight.shape for name, weight in parameters.items()}, [(path, 1.0)])
    assert len(changes) == len(network.adapters)
    for name, change in changes.items():
        change(parameters[name].data)
    scale = (trained - plain).abs().max()
    assert scale > 1e-2
    with torch.no_grad():
        assert torch.equal(run(loaded_into), trained)
        assert (run(merged_into) - trained).abs().max() < 1e-4 * scale


def module_type(kind: str) -> type:
    return {"lora": lora.LoraModule, "dora": lora.LoraModule, "loha": loha.LohaModule, "lokr": lokr.LokrModule}[
        kind[:4]
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_dropouts_in_every_combination(kind):
    torch.manual_seed(0)
    x = torch.randn(2, 30, 24)
    for dropout, rank_dropout, module_dropout in itertools.product((None, 0.3), repeat=3):
        given = {"rank_dropout": rank_dropout, "module_dropout": module_dropout, "use_dora": True}
        arguments = given if kind == "dora" else {name: given[name] for name in ("rank_dropout", "module_dropout")}
        adapter = module_type(kind)(nn.Linear(24, 36), 2, 2.0, dropout=dropout, **arguments)
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                if name != "dora_scale":
                    parameter.normal_()
            outputs = {tuple(adapter(adapter.target.forward, x).flatten().tolist()) for _ in range(20)}
            adapter.eval()
            assert torch.equal(adapter(adapter.target.forward, x), adapter(adapter.target.forward, x))
        # LoHa and LoKr have no values between factors that `dropout` could drop.
        drops = rank_dropout or module_dropout or (dropout and kind in ("lora", "dora"))
        assert (len(outputs) > 1) == bool(drops)
        if module_dropout:
            assert tuple(adapter.target(x).flatten().tolist()) in outputs


def test_rank_dropout_keeps_the_mean():
    torch.manual_seed(0)
    target = nn.Linear(6, 5)
    adapter = lora.LoraModule(target, 4, 4.0, rank_dropout=0.5)
    nn.init.normal_(adapter.lora_up.weight)
    x = torch.randn(1, 6).expand(20000, 1, 6)
    with torch.no_grad():
        mean = adapter.update(x, 1.0).mean(0)
        adapter.eval()
        assert torch.allclose(mean, adapter.update(x[:1], 1.0)[0], atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_pass_and_the_factors_have_the_same_update(kind):
    """Compared with x @ dW.T, where dW is computed here by the formulas of the papers."""
    torch.manual_seed(0)
    module_type = {"lora": lora.LoraModule, "loha": loha.LohaModule, "lokr": lokr.LokrModule}[
        kind[:4].replace("do", "lo")
    ]
    adapter = module_type(nn.Linear(24, 36), 2, 5.0, **({"factor": 8} if "8" in kind else {}))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
        x = torch.randn(3, 7, 24)
        named = dict(adapter.named_parameters())
        if kind in ("lora", "dora"):
            dw = 2.5 * named["lora_up.weight"] @ named["lora_down.weight"]
        elif kind == "loha":
            dw = 2.5 * (named["hada_w1_a"] @ named["hada_w1_b"]) * (named["hada_w2_a"] @ named["hada_w2_b"])
        else:
            dw = torch.zeros(36, 24)
            w1, w2 = named["lokr_w1"], named["lokr_w2_a"] @ named["lokr_w2_b"]
            for i, j in itertools.product(range(w1.shape[0]), range(w1.shape[1])):
                rows, columns = slice(i * len(w2), (i + 1) * len(w2)), slice(j * w2.shape[1], (j + 1) * w2.shape[1])
                dw[rows, columns] = 2.5 * w1[i, j] * w2
        assert torch.allclose(adapter.update(x, adapter.scale), x @ dw.T, atol=1e-4)
        assert torch.allclose(adapter.factors().delta_weight(), dw, atol=1e-5)
        assert adapter.factors().norm() == pytest.approx(dw.norm().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("size", "factor", "expected"), [(3072, -1, (48, 64)), (9216, -1, (96, 96)), (21504, 8, (8, 2688)), (7, -1, (1, 7))]
)
def test_factor_pair(size, factor, expected):
    assert lokr.factor_pair(size, factor) == expected


def test_lokr_of_a_high_rank_stores_whole_matrices(tmp_path, dit):
    """Alpha then has no effect, which the file states by alpha = rank."""
    network = create(lokr, dit, dim=64, alpha=1.0)
    train(network, dit, steps=2)
    network.save_weights(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    assert {key.rsplit(".", 1)[1] for key in tensors} == {"lokr_w1", "lokr_w2", "alpha"}
    assert {tensor.item() for key, tensor in tensors.items() if key.endswith("alpha")} == {64.0}
    adapter, x = network.adapters[0], torch.randn(2, 48)
    with torch.no_grad():
        expected = x @ torch.kron(adapter.lokr_w1, adapter.lokr_w2).T
        assert torch.allclose(adapter.update(x, adapter.scale), expected, atol=1e-5)


def test_dora_starts_unchanged_and_scales_rows():
    torch.manual_seed(0)
    target = nn.Linear(8, 6).requires_grad_(False)
    adapter = lora.LoraModule(target, 2, 1.0, use_dora=True)
    x = torch.randn(4, 8)
    with torch.no_grad():
        assert torch.allclose(adapter(target.forward, x), target(x), atol=1e-6)
        nn.init.normal_(adapter.lora_up.weight)
        adapter.dora_scale.mul_(3)
        direction = target.weight + 0.5 * adapter.lora_up.weight @ adapter.lora_down.weight
        weight = adapter.dora_scale * direction / direction.norm(dim=1, keepdim=True)
        assert torch.allclose(adapter(target.forward, x), x @ weight.T + target.bias, atol=1e-5)
        adapter.multiplier = 0.25
        assert torch.allclose(
            adapter(target.forward, x), x @ (0.75 * target.weight + 0.25 * weight).T + target.bias, atol=1e-5
        )
        assert torch.allclose(
            adapter.factors().apply(target.weight, adapter.multiplier), 0.75 * target.weight + 0.25 * weight, atol=1e-6
        )


def test_dora_under_autocast_has_norms_in_float32_and_a_gradient_for_every_factor():
    target = nn.Linear(64, 6, bias=False).requires_grad_(False)
    nn.init.zeros_(target.weight)
    adapter = lora.LoraModule(target, 4, 4.0, use_dora=True)
    nn.init.normal_(adapter.lora_up.weight)
    with torch.autocast("cpu", torch.bfloat16):
        length = adapter.direction_norm(target.forward, torch.float32)
        adapter.dora_scale.data += 1
        adapter(target.forward, torch.randn(2, 64)).sum().backward()
    update = adapter.lora_up.weight @ adapter.lora_down.weight
    torch.testing.assert_close(length, update.norm(dim=1).detach(), rtol=1e-5, atol=0)
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_keys_and_targets_are_those_of_the_reference_tool(dit, tmp_path):
    network = create(lora, dit)
    network.save_weights(tmp_path / "x.safetensors", torch.bfloat16, {})
    tensors = load_file(tmp_path / "x.safetensors")
    expected = [
        f"lora_unet_double_blocks_{i}_{stream}_{name}"
        for i in range(2)
        for stream in ("img", "txt")
        for name in ("attn_qkv", "attn_proj", "mlp_fc1", "mlp_fc2")
    ] + [f"lora_unet_single_blocks_{i}_{name}" for i in range(2) for name in ("linear1", "linear2")]
    assert {key.split(".")[0] for key in tensors} == set(expected)
    assert {key.split(".", 1)[1] for key in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_the_full_model_has_240_targets():
    with torch.device("meta"):
        model = HYVideoDiffusionTransformer(HunyuanVideoConfig())
    assert len(find_targets(model)) == 240
    assert len(find_targets(model, None, [".*(img_mod|txt_mod|modulation).*"])) == 320


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({"exclude_patterns": r"['.*single_blocks.*']"}, 16),
        ({"exclude_patterns": "['.*']", "include_patterns": r"['.*txt_mlp\\.fc[12]']"}, 4),
        ({"include_patterns": r"['double_blocks\\.0\\..*_mod\\.linear']"}, 22),
        ({"exclude_patterns": r"['single_blocks']"}, 20),
    ],
)
def test_patterns_match_whole_names(dit, arguments, count):
    assert len(create(lora, dit, **arguments).adapters) == count


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rank_dropot": "0.1"}, "rank_dropout"),
        ({"rank_dropout": "high"}, "rank_dropout=high"),
        ({"rank_dropout": "1.5"}, "below 1"),
        ({"exclude_patterns": "[.*]"}, "regular expressions"),
        ({"exclude_patterns": "['(']"}, "regular expressions"),
        ({"exclude_patterns": "__import__('os')"}, "regular expressions"),
        ({"exclude_patterns": "['.*']"}, "no module"),
        ({"loraplus_lr_ratio": "-1"}, "above 0"),
        ({"use_dora": "perhaps"}, "True or False"),
    ],
)
def test_wrong_arguments(dit, arguments, words):
    with pytest.raises(UserError, match="network_args") as caught:
        create(lora, dit, **arguments)
    assert words in str(caught.value)


def test_lora_plus_trains_up_faster(dit):
    network = create(lora, dit, loraplus_lr_ratio="4")
    (down, up), _ = network.prepare_optimizer_params(unet_lr=1e-3)
    assert (down["lr"], up["lr"]) == (1e-3, 4e-3)
    assert {id(p) for p in up["params"]} == {id(adapter.lora_up.weight) for adapter in network.adapters}
    assert len(down["params"]) + len(up["params"]) == len(network.get_trainable_params())


def test_max_norm(dit):
    network = create(lora, dit)
    with torch.no_grad():
        for index, adapter in enumerate(network.adapters):
            adapter.lora_up.weight.normal_().mul_(10.0 if index == 0 else 1e-4)
    before = network.adapters[1].lora_up.weight.clone()
    count, mean, largest = network.apply_max_norm_regularization(1.0)
    assert count == 1 and largest == 1.0 and mean < 1.0
    assert network.adapters[0].factors().delta_weight().norm().item() == pytest.approx(1.0, rel=1e-4)
    assert torch.equal(network.adapters[1].lora_up.weight, before)


def test_multiplier_and_two_networks(dit):
    plain = run(dit)
    first, second = create(lora, dit), create(lora, dit)
    with torch.no_grad():
        for network in (first, second):
            for adapter in network.adapters:
                adapter.lora_up.weight.normal_(std=0.1)
    first.set_multiplier(0.0)
    second.set_multiplier(0.0)
    assert torch.equal(run(dit), plain)
    first.set_multiplier(0.7)
    changed = run(dit)
    assert not torch.equal(changed, plain)
    second.set_multiplier(0.7)
    assert not torch.equal(run(dit), changed)


def test_two_networks_on_one_model_add_up():
    target = nn.Linear(6, 5)
    adapters = [lora.LoraModule(target, 2, 2.0) for _ in range(2)]
    x = torch.randn(3, 6)
    with torch.no_grad():
        plain = target(x)
        for adapter in adapters:
            adapter.lora_up.weight.normal_()
            adapter.apply_to_target()
        expected = plain + sum(adapter.update(x, adapter.scale) for adapter in adapters)
        assert torch.allclose(target(x), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_bfloat16_and_autocast(dit, kind):
    module, arguments = KINDS[kind]
    model = copy.deepcopy(dit).to(torch.bfloat16)
    network = create(module, model, **arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(model).float().square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in network.parameters())


def test_quantised_targets(dit):
    """An adapter around a float8 Linear gives the output of the same update merged into its weight."""
    quantize_linears(dit, lambda name: "blocks." in name and "mod" not in name and "refiner" not in name)
    network = create(lora, dit)
    assert isinstance(network.adapters[0].target, Fp8Linear)
    plain = run(dit)
    with torch.no_grad():
        for adapter in network.adapters:
            adapter.lora_up.weight.normal_(std=0.3)
        changed = run(dit)
        network.set_multiplier(0.0)
        assert torch.equal(run(dit), plain)
        network.set_multiplier(1.0)
        for adapter in network.adapters:
            adapter.target.set_weight(adapter.factors().apply(float32_weight(adapter.target)))
        network.set_multiplier(0.0)
        merged = run(dit)
    assert (merged - changed).abs().mean() < 0.2 * (changed - plain).abs().mean()


def test_weights_of_another_network_are_refused(dit, tmp_path):
    network = create(lora, dit)
    network.save_weights(tmp_path / "a.safetensors")
    other = create(lora, copy.deepcopy(dit), dim=8)
    with pytest.raises(UserError, match="--dim_from_weights"):
        other.load_weights(tmp_path / "a.safetensors")
    fewer = create(lora, copy.deepcopy(dit), exclude_patterns="['single.*']")
    with pytest.raises(UserError, match="unknown 12 of"):
        fewer.load_weights(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="--network_module"):
        loha.create_arch_network_from_weights(1.0, load_file(tmp_path / "a.safetensors"), unet=dit)


def test_lora_keeps_little_for_backward():
    """For one Linear only x, which the model keeps anyway, and the values between the factors; not the output."""
    target = nn.Linear(256, 1024).requires_grad_(False)
    adapter = lora.LoraModule(target, 4, 4.0)
    x = torch.randn(1, 512, 256, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapter(target.forward, x)
    parameters = {p.data_ptr() for p in [*target.parameters(), *adapter.parameters(), x]}
    assert sum(t.numel() for t in kept if t.data_ptr() not in parameters) <= 512 * 4


def test_an_alpha_of_zero_means_the_rank(dit):
    network = create(lora, dit, dim=4, alpha=0.0)
    assert {(adapter.alpha.item(), adapter.scale) for adapter in network.adapters} == {(4.0, 1.0)}
