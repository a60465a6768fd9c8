"""Conversion from every format to every other and back; dW is compared with an independent implementation."""

import pytest
import torch

from networks.files.format_table import FORMATS, NATIVE
from networks.files.formats import from_tensors, to_tensors
from networks.files.lora_files import read_lora, write_lora
from networks.files.names import detect_format
from tests.networks.files.lora_reference import LAYOUTS, SPLIT, random_file, updates

PAIRS = [(source, target) for source in FORMATS for target in FORMATS]


def is_lossless(source: str, target: str) -> bool:
    """Whether nothing is folded: the target stores alpha, and q, k, v with different alphas are not fused."""
    stacks_alphas = FORMATS[source].alpha and source in SPLIT
    return not FORMATS[source].alpha or (FORMATS[target].alpha and not stacks_alphas)


def convert(tensors, target, metadata=None):
    return to_tensors(from_tensors(tensors, metadata or {}, "test"), FORMATS[target])


def worst(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[name] - dw).norm() / dw.norm()) for name, dw in expected.items())


def identical(first, second):
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
    )


def test_every_format_is_tested():
    assert FORMATS.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_is_recognised(name):
    """Two formats of OneTrainer have the same keys as other formats, so these are found instead."""
    twin = {"onetrainer-kohya": "default", "onetrainer-diffusers": "diffusers"}
    assert detect_format(list(random_file(name, seed=0))).name == twin.get(name, name)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_there_and_back(source, target):
    original = random_file(source, seed=PAIRS.index((source, target)))
    expected = updates(original, source)
    there = convert(original, target)
    assert worst(updates(there, target), expected) < 1e-6
    back = convert(there, source)
    assert worst(updates(back, source), expected) < 1e-6
    if is_lossless(source, target):
        assert identical(back, original)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_bfloat16(source, target):
    """alpha / rank is folded into one factor and rounded once on each way."""
    original = random_file(source, seed=PAIRS.index((source, target)), dtype=torch.bfloat16)
    expected = updates(original, source)
    there = convert(original, target)
    assert {tensor.dtype for tensor in there.values()} <= {torch.bfloat16, torch.float32}
    assert worst(updates(there, target), expected) < 2**-8
    back = convert(there, source)
    assert worst(updates(back, source), expected) < 2**-7
    if is_lossless(source, target):
        assert identical(back, original)


@pytest.mark.parametrize("target", [name for name in FORMATS if FORMATS[name].alpha])
def test_split_parts_with_the_same_scale_are_fused_without_loss(target):
    original = random_file("onetrainer-legacy", seed=5)
    for key in original:
        if key.endswith(".alpha"):
            original[key] = torch.tensor(0.5 * len(original[key.replace("alpha", "lora_down.weight")]))
    assert identical(convert(convert(original, target), "onetrainer-legacy"), original)


@pytest.mark.parametrize("target", FORMATS)
def test_an_untrained_lora_is_written_and_read(tmp_path, target):
    tensors = random_file("default", seed=1, missing=0)
    tensors |= {key: torch.zeros_like(up) for key, up in tensors.items() if key.endswith("lora_up.weight")}
    write_lora(from_tensors(tensors, {}, "test"), tmp_path / "a.safetensors", FORMATS[target])
    back = to_tensors(read_lora(tmp_path / "a.safetensors"), NATIVE)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items() if not key.endswith("alpha"))
