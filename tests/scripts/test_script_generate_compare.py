"""hv_generate_video.py --compare: the page, its labels, and the latents that an interrupted run leaves."""

import numpy as np
import pytest
import torch
from PIL import Image

from modules.generation.compare import Page, Row
from modules.generation.outputs import read_settings
from tests.saved_files import frames, load, only, saved_latents


def test_compare_keeps_latents_with_their_settings_if_the_page_cannot_be_saved(generate, loras, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Page, "save_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate("--prompt=cat", "--compare", "--lora_weight", *loras, "--lora_multiplier", 0.5, "--seed=5")
    latents = sorted((tmp_path / "out").iterdir())  # and no frames
    settings = [read_settings(path) for path in latents]
    assert [each.get("lora_weight") for each in settings] == [None, [str(loras[0])], [str(loras[1])]]
    assert [each.get("lora_multiplier") for each in settings] == [None, [0.5], [0.5]]
    for each in settings:
        assert (each["prompt"], each["seed"], each["video_size"]) == ("cat", 5, [32, 48])
        assert "compare" not in each
    monkeypatch.undo()
    again = generate("--from_file", latents[2], "--output_type=latent", folder="again", size=["--device=cpu"])
    torch.testing.assert_close(saved_latents(again), load(latents[2]), rtol=1e-4, atol=1e-4)


def test_what_is_given_twice_to_compare_is_one_row_or_column_and_every_label_is_true(generate, loras, tmp_path):
    """The same page as without the repetition, and each video that of its multiplier alone."""
    same = loras[0].parent / ".." / loras[0].parent.name / loras[0].name
    words = ["--prompt=cat", "--seed=5", "--compare"]
    plain = ["--lora_weight", loras[0], "--lora_multiplier", 0.5, 1.0]
    pages = [
        generate(*words, *plain, folder="plain"),
        generate(*words, "--lora_weight", loras[0], same, "--lora_multiplier", 0.5, folder="files"),
        generate(*words, "--lora_weight", *[loras[0]] * 3, "--lora_multiplier", 0.5, 0.5, 1.0, folder="repeated"),
    ]
    plain, _, repeated = (Image.open(only(page, "*.png")).convert("RGB") for page in pages)
    assert repeated.size == plain.size and repeated.tobytes() == plain.tobytes()
    page = Page(["without LoRA", "multiplier 0.5"], [Row("", [np.zeros((1, 32, 48, 3), np.uint8)])])
    for column, lora in enumerate(
        ([], ["--lora_weight", loras[0], "--lora_multiplier", 0.5], ["--lora_weight", loras[0]])
    ):
        left, top = page.place(0, column)
        alone = generate("--prompt=cat", "--seed=5", "--output_type=images", *lora, folder=f"alone{column}")
        shown = np.asarray(plain.crop((left, top, left + 48, top + 32)), dtype=np.int16)
        own = np.asarray(Image.open(only(alone, "*") / "00002.png").convert("RGB"), dtype=np.int16)
        assert abs(shown - own).max() <= 1  # merged weights are rounded once more than those beside the DiT


def test_compare_writes_one_labelled_page(generate, loras, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat\na dog with a hat --f 9\n")
    words = ["--from_file", prompts, "--compare", "--lora_weight", *loras, "--lora_multiplier", 0.5, 1, "--seed", 5]
    out = generate(*words)
    video, sheet = only(out, "*_5_compare.mp4"), only(out, "*_5_compare.png")
    assert len(list(out.iterdir())) == 2
    width = Page(["without LoRA", "multiplier 0.5"], [Row("", [np.zeros((1, 32, 48, 3), np.uint8)])]).column_width
    size = (8 + 3 * (width + 8), 28 + 4 * (28 + 32 + 8))
    size = (size[0] + size[0] % 2, size[1])
    pixels = frames(video)
    assert pixels.shape == (3, 9, size[1], size[0])
    image = Image.open(sheet).convert("RGB")
    assert image.size == size
    cells = [
        image.crop((left, top, left + 48, top + 32)) for top in (56, 124) for left in (8, width + 16, 2 * width + 24)
    ]
    assert cells[0].tobytes() == cells[3].tobytes()  # without LoRA, both rows of the first prompt
    assert len({cell.tobytes() for cell in cells}) == 5
    alone = generate("--prompt=cat", "--seed=5", "--output_type=images", folder="alone")
    middle = Image.open(only(alone, "*") / "00004.png").convert("RGB")
    assert middle.tobytes() == cells[0].tobytes()
