"""Schedules against formulas written out here, their arguments, and their continuation."""

import math

import pytest
import torch
from diffusers.optimization import get_piecewise_constant_schedule

from modules.training.optimizers import OptimizerOptions, create_optimizer
from modules.training.schedulers import (
    SCHEDULES,
    SchedulerOptions,
    Steps,
    create_scheduler,
    parse_step_rules,
    scheduler_class,
    try_schedule,
)
from utils.errors import UserError

RATE, TOTAL, WARMUP = 0.5, 40, 8


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)


def rates(options: SchedulerOptions, steps: int = TOTAL, total: int = TOTAL) -> list[float]:
    """The rate that each step is made with, relative to the first rate."""
    optimizer = sgd()
    scheduler = create_scheduler(options, optimizer, total)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"] / RATE)
        optimizer.step()
        scheduler.step()
    return values


def progress(step: int) -> float:
    return (step - WARMUP) / (TOTAL - WARMUP)


def cosine(low: float, phase: float) -> float:
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * phase))


FORMULAS = {
    "constant": ({}, lambda step: 1.0),
    "linear": ({}, lambda step: 1 - progress(step)),
    "cosine": ({}, lambda step: cosine(0, progress(step))),
    "cosine_with_restarts": ({"lr_scheduler_num_cycles": 3}, lambda step: cosine(0, 3 * progress(step) % 1)),
    "cosine_with_min_lr": ({"lr_scheduler_min_lr_ratio": 0.2}, lambda step: cosine(0.2, progress(step))),
    "polynomial": (
        {"lr_scheduler_power": 2.0},
        lambda step: (1 - progress(step)) ** 2 * (1 - 1e-7 / RATE) + 1e-7 / RATE,
    ),
    "inverse_sqrt": ({"lr_scheduler_timescale": 5}, lambda step: 1 / math.sqrt(1 + (step - WARMUP) / 5)),
    "rex": (
        {"lr_scheduler_min_lr_ratio": 0.1},
        lambda step: 0.1 + 0.9 * (1 - progress(step)) / (0.1 + 0.9 * (1 - progress(step))),
    ),
    "warmup_stable_decay": (
        {"lr_decay_steps": Steps(10), "lr_scheduler_min_lr_ratio": 0.3},
        lambda step: 1.0 if step < 30 else cosine(0.3, (step - 30) / 10),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_schedule_is_its_formula_after_a_linear_warm_up(name: str) -> None:
    settings, formula = FORMULAS[name]
    warmup = 0 if name == "constant" else WARMUP
    first = 0.3 if name == "warmup_stable_decay" else 0.0  # this one rises from its lowest rate
    rise = [first + (1 - first) * step / WARMUP for step in range(warmup)]
    expected = rise + [formula(step) for step in range(warmup, TOTAL)]
    options = SchedulerOptions(lr_scheduler=name, lr_warmup_steps=Steps(warmup), **settings)
    assert rates(options) == pytest.approx(expected, abs=1e-6)


# Each rate of a run of ten steps, as a share of --learning_rate, with a warm-up of two steps where there is one.
TEN_STEPS = {
    "constant": ({}, [1] * 10),
    "piecewise_constant": (
        {"lr_scheduler_args": ["step_rules='1:3,0.1:7,0.01'"]},
        [1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01],
    ),
    "rex": (
        {"lr_scheduler_min_lr_ratio": 0.2},
        [0, 0.5, 1, 0.9887, 0.9742, 0.9547, 0.9273, 0.8857, 0.8154, 0.6706],
    ),
    "constant_with_warmup": ({}, [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1]),
    "linear": ({}, [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
    "cosine": ({}, [0, 0.5, 1, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381]),
    "cosine_with_restarts": (
        {"lr_scheduler_num_cycles": 2},
        [0, 0.5, 1, 0.8536, 0.5, 0.1464, 1, 0.8536, 0.5, 0.1464],
    ),
    "cosine_with_min_lr": (
        {"lr_scheduler_min_lr_ratio": 0.2},
        [0, 0.5, 1, 0.9696, 0.8828, 0.7531, 0.6, 0.4469, 0.3172, 0.2304],
    ),
    # This one counts its steps from 1.
    "cosine_warmup_with_min_lr": (
        {"lr_scheduler_min_lr_ratio": 0.2},
        [0.5, 1, 0.9696, 0.8828, 0.7531, 0.6, 0.4469, 0.3172, 0.2304, 0.2],
    ),
    "polynomial": (
        {"lr_scheduler_power": 2.0},
        [0, 0.5, 1, 0.7656, 0.5625, 0.3906, 0.25, 0.1406, 0.0625, 0.0156],
    ),
    "inverse_sqrt": (
        {"lr_scheduler_timescale": 4},
        [0, 0.5, 1, 0.8944, 0.8165, 0.7559, 0.7071, 0.6667, 0.6325, 0.603],
    ),
    "warmup_stable_decay": (
        {"lr_scheduler_min_lr_ratio": 0.2, "lr_decay_steps": Steps(4)},
        [0.2, 0.6, 1, 1, 1, 1, 1, 0.8828, 0.6, 0.3172],
    ),
}


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "adafactor"])
def test_the_rates_of_ten_steps(name: str) -> None:
    settings, expected = TEN_STEPS[name]
    warmup = Steps(0 if name in ("constant", "piecewise_constant") else 2)
    options = SchedulerOptions(lr_scheduler=name, lr_warmup_steps=warmup, **settings)
    assert rates(options, 10, 10) == pytest.approx(expected, abs=5e-5)


def test_piecewise_constant_is_that_of_diffusers() -> None:
    rules = "1:10,0.1:20,0.01:25,0.005"
    optimizer = sgd()
    reference = get_piecewise_constant_schedule(optimizer, rules)
    expected = [reference.lr_lambdas[0](step) for step in range(TOTAL)]
    options = SchedulerOptions(lr_scheduler="piecewise_constant", lr_scheduler_args=[f"step_rules='{rules}'"])
    assert rates(options) == pytest.approx(expected)
    assert parse_step_rules(rules) == (((10, 1.0), (20, 0.1), (25, 0.01)), 0.005)


def test_paper_rex_by_arguments() -> None:
    arguments = ["rex_alpha=0.5", "rex_beta=0.5"]
    options = SchedulerOptions(lr_scheduler="rex", lr_scheduler_args=arguments, lr_scheduler_min_lr_ratio=0)
    # Chen et al. 2021, table 1: (1 - z) / (1/2 + 1/2 (1 - z)) with z = step / total.
    assert rates(options) == pytest.approx([(1 - s / TOTAL) / (0.5 + 0.5 * (1 - s / TOTAL)) for s in range(TOTAL)])


def test_custom_scheduler_class() -> None:
    for name in ("CosineAnnealingLR", "torch.optim.lr_scheduler.CosineAnnealingLR"):
        options = SchedulerOptions(lr_scheduler_type=name, lr_scheduler_args=["T_max=40", "eta_min=0.1"])
        expected = [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * step / 40)) for step in range(TOTAL)]
        assert rates(options) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["8", "0.2", "20%", 8, 0.2])
def test_steps_or_a_share_of_all_steps(text: object) -> None:
    assert Steps(text).of(40) == 8


@pytest.mark.parametrize("text", ["1.5", "-1", "-0.1", "120%", "many", "nan", "inf", ""])
def test_other_numbers_of_steps_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Steps(text)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "adafactor"])
def test_resumed_schedule_goes_on_exactly(name: str) -> None:
    options = SchedulerOptions(
        lr_scheduler=name,
        lr_warmup_steps=Steps("5%"),
        lr_decay_steps=Steps(6),
        lr_scheduler_min_lr_ratio=0.1,
        lr_scheduler_args=["step_rules='1:5,0.1:20,0.01'"] if name == "piecewise_constant" else [],
    )
    whole = rates(options)
    optimizer = sgd()
    scheduler = create_scheduler(options, optimizer, TOTAL)
    for _ in range(13):
        optimizer.step()
        scheduler.step()
    states = optimizer.state_dict(), scheduler.state_dict()

    optimizer = sgd()
    scheduler = create_scheduler(options, optimizer, TOTAL)
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    for step in range(13, TOTAL):
        assert optimizer.param_groups[0]["lr"] / RATE == whole[step]
        optimizer.step()
        scheduler.step()


def test_state_holds_plain_values_only(tmp_path) -> None:
    scheduler = create_scheduler(SchedulerOptions(lr_scheduler="rex"), sgd(), TOTAL)
    torch.save(scheduler.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["last_epoch"] == 0


def test_adafactor_shows_the_rate_that_the_optimizer_chose() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = create_optimizer(OptimizerOptions(optimizer_type="adafactor"), [{"params": [weight]}])
    scheduler = create_scheduler(SchedulerOptions(lr_scheduler="cosine"), optimizer, TOTAL)
    weight.square().sum().backward()
    optimizer.step()
    scheduler.step()
    # Shazeer & Stern 2018 (arXiv 1804.04235): 0.01 in the first 10,000 steps, times the weights' root mean square.
    assert scheduler.get_last_lr() == [pytest.approx(0.01, rel=0.05)]
    assert type(scheduler.get_last_lr()[0]) is float


def test_ignored_options_are_named() -> None:
    assert SchedulerOptions().ignored() == []
    assert SchedulerOptions(lr_warmup_steps=Steps(5)).ignored() == ["lr_warmup_steps"]
    assert SchedulerOptions(lr_scheduler="cosine").ignored() == []
    assert SchedulerOptions(lr_scheduler="cosine").ignored(own_rate=True) == ["lr_scheduler"]
    assert SchedulerOptions(lr_scheduler="adafactor").ignored(own_rate=True) == []
    assert SchedulerOptions(lr_scheduler_type="StepLR", lr_scheduler_power=2.0).ignored() == ["lr_scheduler_power"]
    assert SchedulerOptions(
        lr_scheduler="cosine", lr_scheduler_min_lr_ratio=0.1, lr_warmup_steps=Steps(5)
    ).ignored() == ["lr_scheduler_min_lr_ratio"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr_scheduler": "cosine_with_min_lr"}, "needs --lr_scheduler_min_lr_ratio"),
        ({"lr_scheduler": "piecewise_constant"}, "step_rules"),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules='1:ten,0.1'"]}, "step_rules"),
        ({"lr_scheduler_type": "no_such_package.Schedule"}, "pip install no_such_package"),
        ({"lr_scheduler_args": ["T_max"]}, "key=value"),
    ],
)
def test_mistakes_found_at_once(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        SchedulerOptions(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr_scheduler_type": "CosineAnnealing"}, "did you mean"),
        ({"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": ["T_mx=3"]}, "did you mean 'T_max'"),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, "validation loss"),
    ],
)
def test_mistakes_in_a_custom_scheduler(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        scheduler_class(SchedulerOptions(**settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr_scheduler": "adafactor"}, "needs --optimizer_type Adafactor"),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": Steps(41)}, "the run has 40 steps"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ["waves=3"]}, "unexpected keyword argument 'waves'"),
        ({"lr_scheduler": "rex", "lr_scheduler_args": ["waves=3"]}, "unexpected keyword argument 'waves'"),
    ],
)
def test_mistakes_found_when_the_steps_are_known(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        create_scheduler(SchedulerOptions(**settings), sgd(), TOTAL)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ["max_lr=0.1", "total_steps=2"]},
            "after step 3 of 4: Tried",
        ),
        ({"lr_scheduler": "rex", "lr_scheduler_args": ["rex_alpha=0", "rex_beta=0"]}, "division by zero"),
        ({"lr_scheduler": "rex", "lr_scheduler_args": ["rex_alpha=1e-320", "rex_beta=0"]}, "the rate is inf"),
    ],
)
def test_a_schedule_without_a_rate_for_every_step_is_one_line_before_the_first(options, problem):
    with pytest.raises(UserError, match=problem):
        try_schedule(SchedulerOptions(**options), sgd(), 4)


def test_a_schedule_as_long_as_the_run_is_long_enough():
    options = {"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ["max_lr=0.1", "total_steps=4"]}
    try_schedule(SchedulerOptions(**options), sgd(), 4)


def test_rex_ends_at_a_hundredth_of_the_rate_as_in_the_reference_tool():
    assert rates(SchedulerOptions(lr_scheduler="rex"), TOTAL + 1)[-1] == pytest.approx(0.01)
