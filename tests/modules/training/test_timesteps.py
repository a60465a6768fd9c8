"""Every sampler against the distribution it names, against diffusers' densities, and against its own order."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from modules.training.timesteps import (
    IMAGE_NAME,
    LoraTimestepOptions,
    TimestepOptions,
    loss_weight,
    sample_sigmas,
    show_timesteps,
    sigma_at,
    stratified,
    timestep_shares,
)
from utils.errors import UserError

SAMPLES = 4000
# Kolmogorov-Smirnov: a right sampler exceeds 1.95 / sqrt(n) once in a thousand seeds; the seeds here are fixed.
LIMIT = 1.95 / math.sqrt(SAMPLES)


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + index) for index in range(count)]


def draw(options: TimestepOptions, count: int = SAMPLES) -> torch.Tensor:
    return sample_sigmas(options, generators(count), range(count), seed=7).double()


def normal_cdf(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def logit(s: torch.Tensor) -> torch.Tensor:
    return torch.log(s / (1 - s))


def distance(sigmas: torch.Tensor, cdf) -> float:
    """Largest gap between the empirical and the analytic distribution function."""
    expected = cdf(sigmas.sort().values)
    steps = torch.arange(len(sigmas) + 1) / len(sigmas)
    return max((steps[1:] - expected).max().item(), (expected - steps[:-1]).max().item())


def unshift(s: torch.Tensor, shift: float) -> torch.Tensor:
    return s / (shift - (shift - 1) * s)


ANALYTIC = {
    "uniform": (LoraTimestepOptions(timestep_sampling="uniform"), lambda s: s),
    "sigmoid": (
        LoraTimestepOptions(timestep_sampling="sigmoid", sigmoid_scale=1.4),
        lambda s: normal_cdf(logit(s) / 1.4),
    ),
    "shift": (
        LoraTimestepOptions(timestep_sampling="shift", discrete_flow_shift=7.0, sigmoid_scale=0.8),
        lambda s: normal_cdf(logit(unshift(s, 7.0)) / 0.8),
    ),
    "logsnr": (
        LoraTimestepOptions(timestep_sampling="logsnr", logit_mean=1.5, logit_std=2.0),
        lambda s: 1 - normal_cdf((-2 * logit(s) - 1.5) / 2.0),
    ),
    "window": (
        LoraTimestepOptions(timestep_sampling="sigmoid", min_timestep=200, max_timestep=700),
        lambda s: normal_cdf(logit((s - 0.2) / 0.5)),
    ),
    "cut": (
        LoraTimestepOptions(
            timestep_sampling="sigmoid", min_timestep=200, max_timestep=700, preserve_distribution_shape=True
        ),
        lambda s: (
            (normal_cdf(logit(s)) - normal_cdf(logit(torch.tensor(0.2, dtype=s.dtype))))
            / (normal_cdf(logit(torch.tensor(0.7))) - normal_cdf(logit(torch.tensor(0.2))))
        ),
    ),
}


@pytest.mark.parametrize("name", ANALYTIC)
def test_sampler_has_its_distribution(name: str) -> None:
    options, cdf = ANALYTIC[name]
    sigmas = draw(options)
    assert distance(sigmas, cdf) < LIMIT
    low, high = options.sigma_range
    assert low <= sigmas.min() and sigmas.max() <= high


@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "none"])
def test_sigma_sampler_is_diffusers_density_on_diffusers_schedule(scheme: str) -> None:
    options = LoraTimestepOptions(
        discrete_flow_shift=3.0, weighting_scheme=scheme, logit_mean=0.6, logit_std=1.3, mode_scale=1.1
    )
    schedule = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas[:1000].double()
    u = compute_density_for_timestep_sampling(
        scheme, 100_000, logit_mean=0.6, logit_std=1.3, mode_scale=1.1, generator=torch.Generator().manual_seed(3)
    )
    reference = schedule[(u * 1000).long()].sort().values
    # Both are discrete, so the empirical distribution of the reference stands in for a formula.
    sigmas = draw(options)
    gaps = torch.searchsorted(reference, sigmas.sort().values + 1e-7) / len(reference)
    assert (gaps - (torch.arange(SAMPLES) + 1) / SAMPLES).abs().max() < 1.5 * LIMIT
    assert (sigmas[:, None] - schedule).abs().min(dim=1).values.max() < 1e-6


def test_a_sigma_schedule_value_is_hit_exactly() -> None:
    schedule = FlowMatchEulerDiscreteScheduler(shift=5.0).sigmas[:1000].tolist()
    options = LoraTimestepOptions(discrete_flow_shift=5.0)
    # In the middle of each of the 1000 cells of u.
    ours = [sigma_at((index + 0.5) / 1000, options) for index in range(1000)]
    assert ours == pytest.approx(schedule[::-1], abs=1e-6)
    assert (sigma_at(0, LoraTimestepOptions()), sigma_at(1, LoraTimestepOptions())) == (0.001, 1)


@pytest.mark.parametrize("sampler", ["sigma", "uniform", "sigmoid", "shift", "logsnr"])
@pytest.mark.parametrize("scheme", ["logit_normal", "mode"])
@pytest.mark.parametrize("cut", [False, True])
def test_every_sampler_increases_and_stays_in_its_window(sampler: str, scheme: str, cut: bool) -> None:
    options = LoraTimestepOptions(
        timestep_sampling=sampler,
        weighting_scheme=scheme,
        discrete_flow_shift=4.0,
        mode_scale=1.75,
        min_timestep=100,
        max_timestep=900,
        preserve_distribution_shape=cut,
    )
    sigmas = [sigma_at(index / 500, options) for index in range(501)]
    assert sigmas == sorted(sigmas)
    assert 0.1 <= sigmas[0] < 0.2 and 0.8 < sigmas[-1] <= 0.9


def test_cutting_the_sigma_schedule_keeps_exactly_the_steps_of_the_window() -> None:
    options = LoraTimestepOptions(min_timestep=300, max_timestep=310, preserve_distribution_shape=True)
    reached = {round(1000 * sigma_at((index + 0.5) / 1100, options)) for index in range(1100)}
    assert reached == set(range(300, 311))


def test_a_sample_depends_on_its_own_generator_and_position_only() -> None:
    options = LoraTimestepOptions(timestep_sampling="shift", num_timestep_buckets=5)
    together = sample_sigmas(options, generators(6), range(6), seed=1)
    alone = [sample_sigmas(options, generators(1, index), [index], seed=1) for index in (3, 0, 5, 1, 4, 2)]
    assert torch.equal(together[[3, 0, 5, 1, 4, 2]], torch.cat(alone))
    assert together.dtype == torch.float32 and together.shape == (6,)


def test_buckets_are_filled_once_per_cycle_in_an_order_of_the_seed() -> None:
    def order(seed: int, cycle: int) -> list[int]:
        return [int(stratified(0.5, cycle * 8 + place, 8, seed) * 8) for place in range(8)]

    assert all(sorted(order(0, cycle)) == list(range(8)) for cycle in range(20))
    assert order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)
    assert order(0, 3) == order(0, 3)


def test_a_draw_keeps_its_place_within_its_bucket() -> None:
    """u = 0.3 in bucket b of 8 is (b + 0.3) / 8."""
    placed = [stratified(0.3, position, 8, seed=7) for position in range(16)]
    assert sorted(placed) == pytest.approx([(bucket + 0.3) / 8 for bucket in range(8) for _ in range(2)])
    assert placed[:8] != placed[8:]
    assert stratified(0.3, 5, None, seed=7) == 0.3


def test_buckets_keep_the_distribution_and_lower_its_scatter() -> None:
    options, cdf = ANALYTIC["shift"]
    plain = distance(draw(options, 400), cdf)
    bucketed = LoraTimestepOptions(
        timestep_sampling="shift", discrete_flow_shift=7.0, sigmoid_scale=0.8, num_timestep_buckets=100
    )
    assert distance(draw(bucketed, 400), cdf) < min(plain, 1 / 100)


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap", "logit_normal", "mode", "none"])
def test_loss_weight_is_that_of_diffusers(scheme: str) -> None:
    sigma = torch.linspace(0.001, 1, 500)
    torch.testing.assert_close(loss_weight(sigma, scheme), compute_loss_weighting_for_sd3(scheme, sigma).float())


def test_loss_weight_stays_finite_at_sigma_zero() -> None:
    assert loss_weight(torch.zeros(1), "sigma_sqrt").item() == pytest.approx(1e6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_timestep": 500, "max_timestep": 500}, "--min_timestep 500"),
        ({"discrete_flow_shift": 0.0}, "--discrete_flow_shift"),
        (
            {
                "timestep_sampling": "sigmoid",
                "sigmoid_scale": 0.01,
                "min_timestep": 900,
                "preserve_distribution_shape": True,
            },
            "never falls between timestep 900 and 1000",
        ),
    ],
)
def test_contradictions_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        LoraTimestepOptions(**settings)


def test_ignored_options_are_named() -> None:
    assert LoraTimestepOptions().ignored() == []
    options = LoraTimestepOptions(
        timestep_sampling="uniform", discrete_flow_shift=7.0, weighting_scheme="logit_normal", logit_mean=1.0
    )
    assert options.ignored() == ["discrete_flow_shift", "weighting_scheme", "logit_mean"]
    assert LoraTimestepOptions(timestep_sampling="uniform", weighting_scheme="cosmap").ignored() == []


def test_shares_of_a_known_distribution() -> None:
    assert timestep_shares(LoraTimestepOptions(timestep_sampling="uniform"), 4) == [0.25] * 4
    half = LoraTimestepOptions(timestep_sampling="uniform", min_timestep=500, max_timestep=1000)
    assert timestep_shares(half, 4) == [0, 0, 0.5, 0.5]


def test_console_shows_every_range(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    options = LoraTimestepOptions(weighting_scheme="cosmap", show_timesteps="console")
    show_timesteps(options, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if "%" in line]
    assert len(rows) == 25
    assert rows[0][:2] == ["0-40", "3.90%"] and rows[-1][:2] == ["960-1000", "4.10%"]  # sigma is 1/1000 to 1
    assert rows[12][2] == "1.273"  # 2 / (pi / 2) at sigma 0.5
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        show_timesteps(LoraTimestepOptions(show_timesteps="image"), tmp_path)


def test_image_goes_to_a_file_without_a_display(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "agg")
    show_timesteps(LoraTimestepOptions(show_timesteps="image"), tmp_path / "output")
    assert (tmp_path / "output" / IMAGE_NAME).read_bytes().startswith(b"\x89PNG")
