"""Names and keys of jobs."""

from pathlib import Path

import pytest

from modules.generation.jobs import decoding_job, run_keys, stem
from modules.generation.requests import Request
from utils.errors import UserError

CAT, DOG = Request(prompt="cat"), Request(prompt="dog")


def test_keys_stay_when_other_lines_come_and_go_and_equal_lines_differ():
    first, second, dog = run_keys([CAT, CAT, DOG], "model")
    assert len({first, second, dog}) == 3
    assert run_keys([DOG, CAT], "model") == [dog, first]
    assert run_keys([CAT], "other model") != [first]
    assert run_keys([Request(prompt="cat", seed=1)], "model") != [first]


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
