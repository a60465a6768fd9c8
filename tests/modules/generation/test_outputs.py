"""Files of generation: which are there, and saved latents read back."""

import pytest
import torch
from safetensors.torch import save_file

from modules.generation.outputs import Job, OutputFolder, load_latents, sampled_stem
from modules.generation.requests import Request
from utils.errors import UserError


@pytest.mark.parametrize(
    ("output_type", "needed"),
    [
        ("video", [".mp4"]),
        ("images", [""]),
        ("latent", ["_latent.safetensors"]),
        ("both", [".mp4", "_latent.safetensors"]),
    ],
)
def test_finished_is_everything_that_was_asked_for_and_whole(tmp_path, output_type, needed):
    folder = OutputFolder(tmp_path / "out", output_type)

    def is_finished(key):
        return folder.is_finished(key, folder.by_key()[key])

    assert not is_finished("abc")
    folder.folder.mkdir()
    for suffix in needed:
        assert not is_finished("abc")
        (folder.folder / f"t_0_1_abc{suffix}.77.partial").touch()
        assert not is_finished("abc")
        (folder.folder / f"t_0_1_abc{suffix}").touch()
    assert is_finished("abc")
    assert not is_finished("bc")


def test_what_belongs_to_a_line_is_found_by_its_key_behind_an_underscore(tmp_path):
    names = ["t_1_2_abc", "t_1_2_abc.mp4.77.partial", "t_3_2_abc_latent.safetensors", "t_4_2_abcd.mp4", "abc.mp4"]
    for name in names:
        (tmp_path / name).touch()
    found = OutputFolder(tmp_path, "both").by_key()
    assert [path.name for path in found["abc"]] == names[:3]
    assert sampled_stem("abc", found["abc"]) == "t_3_2_abc" and sampled_stem("abcd", found["abcd"]) is None


def test_latents_come_back_bit_for_bit(tmp_path):
    folder, latents = OutputFolder(tmp_path, "latent"), torch.randn(1, 16, 2, 4, 4)
    job = Job(Request(seed=3), "t_0_3", {"fps": 12})
    folder.save_latents(job, latents)
    loaded, settings = load_latents(folder.latent_path(job))
    assert torch.equal(loaded, latents)
    assert settings == {"fps": 12, "seed": "3"}


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.safetensors", {"other": torch.zeros(1)}, "holds no saved latents"),
        ("b.safetensors", {"latent": torch.zeros(4, 4)}, r"one video \(C, f, h, w\)"),
        ("c.safetensors", {"latent": torch.zeros(2, 16, 1, 4, 4)}, "one video"),
        ("d.safetensors", {"latent": torch.full((16, 1, 4, 4), float("nan"))}, "NaN or infinity"),
        (
            "g.safetensors",
            {"latent": torch.ones(16, 1, 4, 4, dtype=torch.int32)},
            "floating-point numbers are expected",
        ),
        ("e.pt", {"state_dict": {}}, "holds no saved latents"),
        ("f.pt", b"no pickle", "cannot be read"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, name, content, complaint):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".pt":
        torch.save(content, path)
    else:
        save_file(content, path)
    with pytest.raises(UserError, match=rf"{name}: .*{complaint}"):
        load_latents(path)


@pytest.mark.parametrize("settings", ["{oops", "[1]", "7"])
def test_settings_that_are_none_are_refused_in_one_line(tmp_path, settings):
    save_file({"latent": torch.zeros(16, 1, 4, 4)}, tmp_path / "a.safetensors", {"settings": settings})
    with pytest.raises(UserError, match=r"a\.safetensors: its metadata 'settings' is no JSON object"):
        load_latents(tmp_path / "a.safetensors")
