"""The step cache: full steps are unchanged, and skipped blocks are counted."""

import torch
from torch import nn

from modules.blocks.step_cache import StepCache, apply_step_cache
from modules.flow_matching import sigmas_for_steps
from modules.generation.sampler import denoise


class Pair(nn.Module):
    """A block with two token streams."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, a, b, scale):
        return a + scale * self.linear(a), b + scale * self.linear(b)


class Joint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, tokens, scale):
        return tokens + scale * self.linear(tokens)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pairs = nn.ModuleList(Pair() for _ in range(2))
        self.joints = nn.ModuleList(Joint() for _ in range(2))

    def forward(self, x, t):
        a, b = x.split(2, dim=1)
        for block in self.pairs:
            a, b = block(a, b, t)
        tokens = torch.cat((a, b), dim=1)
        for block in self.joints:
            tokens = block(tokens, t)
        return tokens


def sampled(threshold: float | None, calls: int = 1, steps: int = 12) -> tuple[torch.Tensor, StepCache]:
    model, cache = Model(), StepCache(threshold or 0.0)
    if threshold is not None:
        apply_step_cache([*model.pairs, *model.joints], [2, 2, 1, 1], cache)

    def velocity(x, timestep):
        return sum(model(x[0] * (call + 1), timestep.item() / 1000) for call in range(calls))[None] / calls

    torch.manual_seed(1)
    with torch.no_grad():
        x = denoise(velocity, torch.randn(1, 1, 4, 8), sigmas_for_steps(steps, 3.0), cache.begin_step)
    return x, cache


def test_threshold_zero_is_bit_identical_to_no_cache():
    for calls in (1, 2):
        plain, _ = sampled(None, calls)
        cached, cache = sampled(0.0, calls)
        assert torch.equal(plain, cached)
        assert cache.evaluated == cache.total == 12 * 4 * calls


def test_an_infinite_threshold_runs_only_the_first_and_last_step_in_full():
    for calls in (1, 2):
        plain, _ = sampled(None, calls)
        cached, cache = sampled(1e9, calls)
        assert cache.evaluated == calls * (2 * 4 + 10 * 1)  # first blocks always run
        assert not torch.equal(plain, cached)


def test_evaluations_fall_as_the_threshold_rises():
    counts = [sampled(threshold)[1].evaluated for threshold in (0.0, 0.1, 0.3, 1.0, 1e9)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[2] > counts[-1]


def test_a_skipped_step_adds_the_change_of_the_last_full_step():
    model, cache = Model(), StepCache(1e9)
    blocks = [*model.pairs, *model.joints]
    x, t = torch.randn(1, 4, 8), 0.5
    a, b = model.pairs[0](*x.split(2, dim=1), t)
    rest = model(x, t) - torch.cat((a, b), dim=1)
    apply_step_cache(blocks, [2, 2, 1, 1], cache)
    cache.begin_step(0, 3)
    model(x, t)
    cache.begin_step(1, 3)
    moved = x + 0.1
    expected = torch.cat((a + 0.1 + t * 0.1 * model.pairs[0].linear.weight.sum(1), b), dim=1)[:, :2]
    torch.testing.assert_close(model(moved, t)[:, :2], expected + rest[:, :2])


def test_a_new_run_forgets_the_last_one():
    model, cache = Model(), StepCache(1e9)
    plain = Model()
    apply_step_cache([*model.pairs, *model.joints], [2, 2, 1, 1], cache)
    for _ in range(2):
        x = torch.randn(1, 4, 8)
        cache.begin_step(0, 5)
        assert torch.equal(model(x, 0.5), plain(x, 0.5))


def test_the_threshold_that_halves_the_blocks_changes_the_small_dit_by_a_stated_amount(tiny_models, capsys):
    from hunyuan_model.checkpoints import load_dit
    from modules.generation.requests import Request
    from modules.generation.sampler import Conditioning, sample_latents

    request = Request(prompt="cat", width=32, height=48, frames=5, seed=5, steps=30)
    torch.manual_seed(0)

    def sampled(threshold: float | None) -> tuple[torch.Tensor, StepCache]:
        model, cache = load_dit(tiny_models.dit, dtype=torch.float32), StepCache(threshold or 0.0)
        config, generator = model.config, torch.Generator().manual_seed(0)
        text = torch.randn(1, 6, config.text_dim, generator=generator)
        prompt = Conditioning(text, torch.ones(1, 6), torch.randn(1, config.text_dim_2, generator=generator))
        if threshold is not None:
            apply_step_cache(model.blocks, [2] * config.depth_double + [1] * config.depth_single, cache)
        latents = sample_latents(model, request, prompt, device=torch.device("cpu"), before_step=cache.begin_step)
        return latents, cache

    plain, _ = sampled(None)
    unchanged, cache = sampled(0.0)
    assert torch.equal(unchanged, plain)
    cached, cache = sampled(0.55)
    change = ((cached - plain).norm() / plain.norm()).item()
    with capsys.disabled():
        print(f"\nstep cache: {cache.evaluated} of {cache.total} blocks evaluated, latents change by {change:.1%}")
    assert cache.evaluated <= cache.total / 2
    assert 0 < change < 0.1


def test_the_two_halves_of_guidance_remember_separately():
    x, steps = torch.randn(2, 1, 4, 8), 4
    alone = []
    for half in x:
        model, cache = Model(), StepCache(1e9)
        apply_step_cache([*model.pairs, *model.joints], [2, 2, 1, 1], cache)
        for step in range(steps):
            cache.begin_step(step, steps)
            alone.append(model(half + step, 0.5))
    model, cache = Model(), StepCache(1e9)
    apply_step_cache([*model.pairs, *model.joints], [2, 2, 1, 1], cache)
    for step in range(steps):
        cache.begin_step(step, steps)
        for index, half in enumerate(x):
            assert torch.equal(model(half + step, 0.5), alone[index * steps + step])
