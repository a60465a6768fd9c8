"""Names and keys of jobs."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from modules.generation.jobs import decoding_job, run_keys, stem, video_identity
from modules.generation.options import LoraOptions, SpeedOptions
from modules.generation.requests import Request
from modules.options import DitOptions, TextEncoderOptions, VaeOptions
from utils.content_hashes import ContentHashes
from utils.errors import UserError

CAT, DOG = Request(prompt="cat"), Request(prompt="dog")


@pytest.fixture
def hashes(tmp_path) -> ContentHashes:
    return ContentHashes(tmp_path / "hashes.json")


def test_keys_stay_when_other_lines_come_and_go_and_equal_lines_differ(hashes):
    def keys(requests, identity="model"):
        return run_keys(requests, identity, hashes)

    first, second, dog = keys([CAT, CAT, DOG])
    assert len({first, second, dog}) == 3
    assert keys([DOG, CAT]) == [dog, first]
    assert keys([CAT], "other model") != [first]
    assert keys([Request(prompt="cat", seed=1)]) != [first]


def test_a_key_depends_on_what_changes_the_pixels_and_on_nothing_else(hashes, tmp_path):
    """Sources count by content; the frame rate and a negative prompt without guidance do not count."""

    def key(**values):
        return run_keys([Request(prompt="cat", **values)], "model", hashes)[0]

    one, two = tmp_path / "one.mp4", tmp_path / "two.mp4"
    one.write_bytes(b"video")
    shutil.copy(one, two)
    before = key(video_path=str(one))
    assert before != key()
    assert before == key(video_path=str(two)) == key(video_path=os.path.relpath(one))
    stat = one.stat()
    one.write_bytes(b"other")
    os.utime(one, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert before != key(video_path=str(one))
    assert key(fps=12) == key() == key(negative_prompt="dog")
    assert key(cfg_scale=2.0, negative_prompt="dog") != key(cfg_scale=2.0)


def identity(models, hashes, **options):
    return repr(
        video_identity(
            SimpleNamespace(
                dit=DitOptions(dit=models.dit, dit_dtype=options.get("dit_dtype")),
                vae=VaeOptions(vae=models.vae),
                text=TextEncoderOptions(text_encoder1=models.text_encoder1, text_encoder2=models.text_encoder2),
                lora=LoraOptions(
                    lora_weight=options.get("lora", []),
                    lora_multiplier=options.get("multiplier", []),
                    exclude_single_blocks=options.get("exclude", False),
                ),
                speed=SpeedOptions(step_cache=options.get("cache"), fp8=options.get("fp8", False)),
            ),
            hashes,
        )
    )


def test_options_that_change_the_video_change_its_identity(tiny_models, hashes, tmp_path):
    lora, other = tmp_path / "lora", tmp_path / "other"
    lora.write_bytes(b"lora")
    other.write_bytes(b"other")
    changes = [
        {}, {"lora": [lora]}, {"lora": [other]}, {"lora": [lora, other]}, {"lora": [lora], "multiplier": [0.5]},
        {"exclude": True}, {"dit_dtype": "float16"}, {"cache": 0.1}, {"fp8": True},
    ]  # fmt: skip
    assert len({identity(tiny_models, hashes, **change) for change in changes}) == len(changes)


@pytest.fixture
def copied_models(tiny_models, tmp_path) -> SimpleNamespace:
    root = Path(os.path.commonpath([*vars(tiny_models).values()]))
    shutil.copytree(root, tmp_path / "models")
    return SimpleNamespace(
        **{name: tmp_path / "models" / Path(path).relative_to(root) for name, path in vars(tiny_models).items()}
    )


def test_models_are_known_by_their_contents(tiny_models, copied_models, tmp_path, monkeypatch):
    """Not by names, folders, times or files beside them. Every file that is read counts, wherever it is changed."""

    def now(models=copied_models):
        return identity(models, ContentHashes(tmp_path / "hashes.json"))

    plain = now()
    assert plain == now(tiny_models)
    monkeypatch.chdir(tmp_path)
    assert plain == now(SimpleNamespace(**{n: Path(os.path.relpath(path)) for n, path in vars(copied_models).items()}))
    files = [path for path in (tmp_path / "models").rglob("*") if path.is_file()]
    for path in files:
        os.utime(path)
        (path.parent / "notes.md").write_text("my notes")
    assert plain == now()
    weights = [path for path in files if path.suffix in (".pt", ".safetensors")]
    tokenizers = [path for path in files if path.name in ("tokenizer.json", "vocab.json", "merges.txt")]
    assert len(weights) >= 4 and len(tokenizers) >= 2
    for path in weights + tokenizers:
        content, stat = path.read_bytes(), path.stat()
        middle = len(content) * 3 // 4
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert now() != plain, path
        path.write_bytes(content)
    assert now() == plain


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
