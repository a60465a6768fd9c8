"""Names and keys of jobs."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from modules.generation.jobs import decoding_job, run_keys, stem, video_identity
from modules.generation.options import LoraOptions, SpeedOptions
from modules.generation.requests import Request
from modules.options import DitOptions, TextEncoderOptions, VaeOptions
from utils.errors import UserError

CAT, DOG = Request(prompt="cat"), Request(prompt="dog")


def test_keys_stay_when_other_lines_come_and_go_and_equal_lines_differ():
    first, second, dog = run_keys([CAT, CAT, DOG], "model")
    assert len({first, second, dog}) == 3
    assert run_keys([DOG, CAT], "model") == [dog, first]
    assert run_keys([CAT], "other model") != [first]
    assert run_keys([Request(prompt="cat", seed=1)], "model") != [first]


def test_whatever_changes_the_video_changes_its_identity(tmp_path):
    """Model and LoRA files by path, size and date; the options that only save memory are not part of it."""
    files = {name: tmp_path / name for name in ("dit", "vae", "one", "two", "lora", "other")}
    for number, path in enumerate(files.values()):
        path.write_bytes(b"x" * (number + 1))

    def identity(lora=("lora",), multiplier=(), exclude=False, vae="vae", dit_dtype=None, cache=None, fp8=False):
        return video_identity(
            SimpleNamespace(
                dit=DitOptions(dit=files["dit"], dit_dtype=dit_dtype),
                vae=VaeOptions(vae=files[vae]),
                text=TextEncoderOptions(text_encoder1=files["one"], text_encoder2=files["two"]),
                lora=LoraOptions(
                    lora_weight=[files[name] for name in lora],
                    lora_multiplier=list(multiplier),
                    exclude_single_blocks=exclude,
                ),
                speed=SpeedOptions(step_cache=cache, fp8=fp8),
            )
        )

    plain = identity()
    changed = [
        identity(lora=["other"]), identity(lora=[]), identity(multiplier=[0.5]), identity(exclude=True),
        identity(vae="other"), identity(dit_dtype="float16"), identity(cache=0.1), identity(fp8=True),
    ]  # fmt: skip
    for name in ("dit", "vae", "one", "two", "lora"):
        stat = files[name].stat()
        os.utime(files[name], ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
        changed.append(identity())
        os.utime(files[name], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert identity() == plain
    assert len({repr(each) for each in [plain, *changed]}) == len(changed) + 1


def test_stems():
    assert stem("t", 0, 5) == "t_0_5"
    assert stem("t", 3, None, "key") == "t_3_key"


def test_a_decoded_video_has_the_saved_frame_rate_or_the_given_one():
    path = Path("t_0_3_latent.safetensors")
    job = decoding_job(path, {"fps": 12, "seed": "3"}, 1, None, metadata=True)
    assert job.request.fps == 12
    assert job.stem.endswith("_1_3_t_0_3")
    assert decoding_job(path, {}, 0, None, metadata=True).request.fps == 24
    assert decoding_job(path, {"fps": 29.97}, 0, 30, metadata=True).request.fps == 30
    assert "/" not in decoding_job(path, {"seed": "../1"}, 0, None, metadata=True).stem
    for fps in (29.97, 0, "fast", None):
        with pytest.raises(UserError, match=r"t_0_3_latent\.safetensors: its settings say fps .*; give --fps"):
            decoding_job(path, {"fps": fps}, 0, None, metadata=True)
