"""Optimizers by name: the right class, arguments checked early, one step equal to the formula."""

import copy
import gc
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from modules.training.optimizers import (
    OPTIMIZERS,
    OptimizerOptions,
    averaged_weights,
    create_optimizer,
    optimizer_class,
)
from utils.errors import UserError


def parameter(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values))


def create(**settings) -> tuple[torch.optim.Optimizer, torch.nn.Parameter]:
    weight = parameter(1.0, -2.0)
    weight.grad = torch.tensor([0.5, 0.25])
    return create_optimizer(OptimizerOptions(**settings), [{"params": [weight]}]), weight


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("", "torch.optim.AdamW"),
        ("adamw", "torch.optim.AdamW"),
        ("SGD", "torch.optim.SGD"),
        ("AdamW8bit", "bitsandbytes.optim.AdamW8bit"),
        ("PAGEDLION8BIT", "bitsandbytes.optim.PagedLion8bit"),
        ("AdaFactor", "transformers.Adafactor"),
        ("bitsandbytes.optim.AdEMAMix8bit", "bitsandbytes.optim.AdEMAMix8bit"),
    ],
)
def test_names_in_any_case(name: str, path: str) -> None:
    options = OptimizerOptions(optimizer_type=name)
    assert options.path == path
    assert optimizer_class(options).__name__ == path.rpartition(".")[2]


def test_every_listed_name_exists_in_its_package() -> None:
    for path in OPTIMIZERS.values():
        if not path.startswith(("prodigyopt", "schedulefree")):
            optimizer_class(OptimizerOptions(optimizer_type=path))


def test_adamw_step_is_the_formula() -> None:
    optimizer, weight = create(learning_rate=0.1, optimizer_args=["weight_decay=0.2", "betas=0.8,0.9", "eps=1e-6"])
    optimizer.step()
    # After bias correction the first step is the gradient over its own size, after decay by lr * weight_decay.
    gradient = torch.tensor([0.5, 0.25])
    expected = torch.tensor([1.0, -2.0]) * (1 - 0.1 * 0.2) - 0.1 * gradient / (gradient + 1e-6)
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("name", ["adamw8bit", "pagedadamw8bit", "lion8bit", "adafactor", "sgd"])
def test_optimizers_lower_a_loss_and_continue_from_their_state(name: str) -> None:
    def run(steps: int, optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            weight.square().sum().backward()
            optimizer.step()

    def fresh() -> tuple[torch.optim.Optimizer, torch.nn.Parameter]:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(64, 80))  # above the 4096 numbers from which states are 8 bit
        return create_optimizer(
            OptimizerOptions(optimizer_type=name, learning_rate=0.01), [{"params": [weight]}]
        ), weight

    optimizer, weight = fresh()
    before = weight.detach().square().sum()
    run(3, optimizer, weight)
    state, middle = copy.deepcopy(optimizer.state_dict()), weight.detach().clone()
    run(3, optimizer, weight)
    assert weight.detach().square().sum() < before

    resumed, other = fresh()
    resumed.load_state_dict(state)
    other.data.copy_(middle)
    run(3, resumed, other)
    assert torch.equal(weight, other)


@pytest.mark.parametrize(
    ("name", "dtype", "words", "chosen"),
    [
        ("AdamW", torch.float32, [], (None, True)),
        ("AdamW", torch.bfloat16, [], (False, None)),
        ("RMSprop", torch.float32, [], (False, None)),
        ("AdamW", torch.float32, ["foreach=True"], (True, None)),
    ],
)
def test_on_a_gpu_no_copy_of_all_states_is_made(name: str, dtype: torch.dtype, words: list, chosen: tuple) -> None:
    with FakeTensorMode():
        weights = [torch.nn.Parameter(torch.empty(8, 8, dtype=dtype, device="cuda"))]
        options = OptimizerOptions(optimizer_type=name, optimizer_args=words)
        (group,) = create_optimizer(options, [{"params": weights}]).param_groups
    assert (group["foreach"], group.get("fused")) == chosen
    (group,) = create_optimizer(OptimizerOptions(optimizer_type=name), [{"params": [parameter(1.0)]}]).param_groups
    assert (group["foreach"], group.get("fused")) == (None, None)


def test_a_groups_own_rate_wins() -> None:
    groups = [{"params": [parameter(1.0)], "lr": 0.3}, {"params": [parameter(1.0)]}]
    optimizer = create_optimizer(OptimizerOptions(learning_rate=0.1), groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.1]


def test_adafactor_sets_its_own_rate_unless_told_otherwise() -> None:
    groups = [{"params": [parameter(1.0)], "lr": 0.3}]
    relative = create_optimizer(OptimizerOptions(optimizer_type="adafactor"), groups)
    assert relative.param_groups[0]["lr"] is None
    assert OptimizerOptions(optimizer_type="adafactor", learning_rate=0.1).ignored() == ["learning_rate"]
    fixed = OptimizerOptions(
        optimizer_type="adafactor", learning_rate=0.1, optimizer_args=["relative_step=False", "scale_parameter=False"]
    )
    assert create_optimizer(fixed, [{"params": [parameter(1.0)]}]).param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer_type": "adamw8bits"}, r"did you mean 'adamw8bit'"),
        ({"optimizer_type": "no_such_package.Adam"}, "pip install no_such_package"),
        ({"optimizer_type": "torch..AdamW"}, "dotted path"),
        ({"optimizer_args": ["weight_decay"]}, "key=value"),
        ({"optimizer_args": ["weight_decay=0.1", "weight_decay=0.2"]}, "given twice"),
        ({"optimizer_args": ["amsgrad=true"]}, "'true' is not a Python value"),
        ({"optimizer_args": ["weight_decay=__import__('os')"]}, "not a Python value"),
        ({"optimizer_args": ["lr=0.1"]}, "set by --learning_rate"),
    ],
)
def test_mistakes_found_without_the_package(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        OptimizerOptions(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer_args": ["weight_decy=0.1"]}, "AdamW has no argument 'weight_decy' .did you mean 'weight_decay'"),
        ({"optimizer_type": "torch.optim.AdamV"}, "no class AdamV .did you mean 'Adam'"),
        ({"optimizer_type": "torch.optimizers.AdamW"}, "cannot be imported"),
        ({"optimizer_type": "torch.optim.lr_scheduler"}, "no class lr_scheduler"),
    ],
)
def test_mistakes_found_before_a_model_is_needed(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        optimizer_class(OptimizerOptions(**settings))


@pytest.mark.parametrize("word", ["betas=3", "betas=0.9,7.0", "eps=-1"])
def test_values_that_the_optimizer_refuses(word: str) -> None:
    with pytest.raises(UserError, match="AdamW refuses"):
        create(optimizer_args=[word])


class _TwoModes(torch.optim.SGD):
    """Like a schedule-free optimizer: says which weights the parameters hold."""

    def __init__(self, params, lr: float, **settings) -> None:
        super().__init__(params, lr)
        self.mode, self.settings = "unset", settings

    def train(self) -> None:
        self.mode = "train"
        self.param_groups[0]["params"][0].data.sub_(1000)

    def eval(self) -> None:
        self.mode = "eval"
        self.param_groups[0]["params"][0].data.add_(1000)  # and back is not exact


def test_schedule_free_optimizers_are_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("third_party_optimizers")
    package.__spec__ = types.SimpleNamespace()
    package.TwoModes = _TwoModes
    monkeypatch.setitem(sys.modules, "third_party_optimizers", package)
    optimizer, weight = create(optimizer_type="third_party_optimizers.TwoModes", optimizer_args=["anything=1"])
    assert optimizer.settings == {"anything": 1}
    assert optimizer.mode == "train"
    weight.data.copy_(torch.tensor([0.1, 0.7]))
    with pytest.raises(KeyError), averaged_weights(optimizer):
        assert optimizer.mode == "eval"
        assert weight.tolist() == pytest.approx([1000.1, 1000.7])
        raise KeyError
    assert optimizer.mode == "train"
    assert torch.equal(weight.detach(), torch.tensor([0.1, 0.7]))


def test_the_trained_weights_wait_in_main_memory() -> None:
    """The meta device takes the place of a GPU."""
    with FakeTensorMode():
        weight = torch.nn.Parameter(torch.empty(8, 8, device="meta"))
        with averaged_weights(_TwoModes([weight], lr=0.1)):
            made = [each.device.type for each in gc.get_objects() if type(each) is FakeTensor and each is not weight]
    assert made == ["cpu"]


def test_other_optimizers_are_not_touched_by_it() -> None:
    optimizer, weight = create()
    with averaged_weights(optimizer):
        assert weight.tolist() == [1.0, -2.0]


def test_checking_options_imports_nothing_heavy() -> None:
    code = (
        "import sys; from modules.training.options import OptimizerOptions, SchedulerOptions, LoraTimestepOptions;"
        "OptimizerOptions(optimizer_type='AdamW8bit'); SchedulerOptions(); LoraTimestepOptions();"
        "assert not {'torch', 'transformers', 'bitsandbytes', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=True, timeout=60)


def test_the_real_schedule_free_optimizer_shows_its_average_and_goes_on() -> None:
    pytest.importorskip("schedulefree")
    optimizer, weight = create(optimizer_type="AdamWScheduleFree", learning_rate=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    trained = weight.detach().clone()
    with averaged_weights(optimizer):
        assert not torch.equal(weight, trained)
    assert torch.equal(weight.detach(), trained)


def test_prodigy_by_its_short_name() -> None:
    pytest.importorskip("prodigyopt")
    optimizer, weight = create(optimizer_type="prodigy", learning_rate=1.0, optimizer_args=["decouple=True"])
    optimizer.step()
    assert type(optimizer).__module__.startswith("prodigyopt") and torch.isfinite(weight).all()
