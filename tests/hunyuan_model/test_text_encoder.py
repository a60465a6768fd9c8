"""The text encoders against transformers, and their tokenizers against the failures that corrupt text silently."""

import base64
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import CLIPTextModel, CLIPTokenizer, LlamaForCausalLM, LlamaTokenizer

from examples.tiny_tokenizers import llama_bpe_tokenizer
from hunyuan_model.checkpoints import load_text_encoder_1, load_text_encoder_2
from hunyuan_model.checkpoints.tensors import Checkpoint
from hunyuan_model.text_encoder import (
    LlmTextEncoder,
    clip_config_from_shapes,
    empty_clip,
    empty_llm,
    llm_config_from_shapes,
)
from hunyuan_model.tokenizers import (
    CLIP_REPOSITORY,
    LLM_REPOSITORY,
    VIDEO_TEMPLATE,
    clip_tokenizer,
    find_tokenizer,
    llm_tokenizer,
)
from utils.errors import UserError
from utils.safetensors_utils import read_header

SHORT = "a cat walks on the grass"
LONG = "the camera pans slowly over the sea at night, a red ball moves from the left to the right"
PROMPTS = [SHORT, LONG]


@pytest.fixture(scope="module")
def single_files(tiny_models, tmp_path_factory) -> tuple[Path, Path]:
    """Both text encoders as one file each, without a config, their tokenizers in folders of the same names."""
    folder = tmp_path_factory.mktemp("single")
    files = []
    for name, encoder in [("llava", tiny_models.text_encoder1), ("clip_l", tiny_models.text_encoder2)]:
        files.append(Path(shutil.copy(encoder / "model.safetensors", folder / f"{name}.safetensors")))
        (folder / name).mkdir()
        shutil.copy(encoder / "tokenizer.json", folder / name)
    return tuple(files)


@pytest.fixture(scope="module")
def llm(tiny_models):
    return load_text_encoder_1(tiny_models.text_encoder1, dtype=torch.float32)


@pytest.fixture(scope="module")
def clip(tiny_models):
    return load_text_encoder_2(tiny_models.text_encoder2, dtype=torch.float32)


def described(folder: Path) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """config.json and the shapes of a text encoder's folder."""
    infos, _ = read_header(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config, {name: info.shape for name, info in infos.items()}


def reference_inputs(tokenizer_file: Path, prompts: list[str], length: int, pad: str) -> dict[str, torch.Tensor]:
    """Ids and mask made by hand from the bare tokenizer: cut at `length`, padded right."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    rows = [tokenizer.encode(prompt).ids[:length] for prompt in prompts]
    pad_id = tokenizer.token_to_id(pad)
    ids = torch.tensor([row + [pad_id] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def test_llm_states_are_the_third_hidden_states_from_the_end_after_the_crop(tiny_models, llm):
    folder = tiny_models.text_encoder1
    prefix = len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(VIDEO_TEMPLATE.split("{}")[0]).ids)
    templated = [VIDEO_TEMPLATE.replace("{}", prompt) for prompt in PROMPTS]
    inputs = reference_inputs(folder / "tokenizer.json", templated, prefix + 256, "<pad>")
    with torch.no_grad():
        reference = LlamaForCausalLM.from_pretrained(folder)(**inputs, output_hidden_states=True).hidden_states[-3]

    states, mask = llm.encode(PROMPTS)

    assert states.shape == (2, 256, 64) and mask.shape == (2, 256) and mask.dtype == torch.int64
    assert torch.equal(mask, inputs["attention_mask"][:, prefix:])
    torch.testing.assert_close(states, reference[:, prefix:], rtol=1e-6, atol=1e-6)


def test_clip_is_the_pooler_output(tiny_models, clip):
    folder = tiny_models.text_encoder2
    inputs = reference_inputs(folder / "tokenizer.json", PROMPTS, 77, "<|endoftext|>")
    with torch.no_grad():
        reference = CLIPTextModel.from_pretrained(folder)(**inputs).pooler_output
    torch.testing.assert_close(clip.encode(PROMPTS), reference, rtol=1e-6, atol=1e-6)


def test_single_files_without_config_give_the_same(single_files, llm, clip):
    llava, clip_l = single_files
    assert torch.equal(load_text_encoder_1(llava, dtype=torch.float32).encode(PROMPTS)[0], llm.encode(PROMPTS)[0])
    assert torch.equal(load_text_encoder_2(clip_l, dtype=torch.float32).encode(PROMPTS), clip.encode(PROMPTS))


def test_only_the_needed_layers_are_read_and_exist(single_files, llm, monkeypatch):
    read = []
    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: read.append(name) or original(self, name))
    load_text_encoder_1(single_files[0], dtype=torch.float32)
    shapes = {name: info.shape for name, info in read_header(single_files[0])[0].items()}
    unneeded = ("model.layers.3.", "model.layers.4.", "model.norm.", "lm_head.")
    assert set(read) == {name for name in shapes if not name.startswith(unneeded)} and len(read) == len(set(read))
    assert len(llm.model.layers) == 3


def test_buffers_follow_the_parameters_to_their_device(tiny_models, llm, clip):
    for encoder, empty in [(llm, empty_llm), (clip, empty_clip)]:
        model = empty(encoder.model.config)  # parameters on the meta device, as if on a GPU
        assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}
        type(encoder)(model, encoder.tokenizer, "")
        assert {buffer.device.type for buffer in model.buffers()} == {"meta"}


def test_nothing_is_trained(llm, clip):
    assert not any(parameter.requires_grad for encoder in (llm, clip) for parameter in encoder.model.parameters())
    assert not llm.encode([SHORT])[0].requires_grad and not llm.model.training


def test_a_batch_of_two_lengths_equals_two_batches_of_one(llm, clip):
    states, mask = llm.encode(PROMPTS)
    single = [llm.encode([prompt]) for prompt in PROMPTS]
    torch.testing.assert_close(states, torch.cat([each for each, _ in single]), rtol=1e-5, atol=1e-5)
    assert torch.equal(mask, torch.cat([each for _, each in single]))
    torch.testing.assert_close(clip.encode(PROMPTS), torch.cat([clip.encode([prompt]) for prompt in PROMPTS]))


def test_the_mask_counts_the_prompt_and_the_end_of_turn(llm):
    _, mask = llm.encode(["", SHORT])
    assert mask.sum(1).tolist() == [1, 1 + 6]


def test_what_is_cut_at_256_tokens_is_reported(llm):
    words = 300 * ["grass"]
    (tail,) = llm.truncated([" ".join(words)])
    # 'grass' without a leading space is more than one token; each ' grass' is one
    first = int(llm.encode([words[0]])[1].sum()) - 1
    assert tail == " grass" * (300 - 1 - (256 - first))
    assert llm.truncated([SHORT, LONG]) == ["", ""]


def test_a_prompt_that_just_fits_loses_only_the_end_of_turn(llm):
    prompt = " grass" * 256
    assert llm.truncated([prompt]) == [""]
    assert llm.truncated([prompt + " grass"]) == [" grass"]


def test_clip_keeps_its_end_token_when_text_is_cut(clip):
    ids, mask = clip.tokenizer(["grass " * 100])
    assert mask.sum() == 77 and ids[0, -1] == clip.model.config.eos_token_id
    assert clip.tokenizer.truncated(["grass " * 100]) == [" grass" * 25 + " "]


def test_a_model_with_too_few_layers_is_refused(tiny_models):
    config, shapes = described(tiny_models.text_encoder1)
    with pytest.raises(UserError, match="at least 3"):
        empty_llm(llm_config_from_shapes(shapes, config | {"num_hidden_layers": 2}))


def test_the_language_part_of_a_llava_config_counts(tiny_models):
    """LLaVA's text_config leaves out the sizes that are Llama's defaults; the shapes tell them."""
    _, shapes = described(tiny_models.text_encoder1)
    text = {"model_type": "llama", "rms_norm_eps": 3e-5, "rope_theta": 10_000.0, "bos_token_id": 1}
    merged = llm_config_from_shapes(shapes, {"model_type": "llava", "hidden_size": 1024, "text_config": text})
    assert (merged.hidden_size, merged.num_attention_heads, merged.num_hidden_layers) == (64, 2, 5)
    assert merged.rms_norm_eps == 3e-5 and merged.rope_parameters["rope_theta"] == 10_000.0


def test_the_full_size_configs_follow_from_shapes():
    llm_shapes = {f"model.layers.{index}.input_layernorm.weight": (4096,) for index in range(32)} | {
        "model.embed_tokens.weight": (128_320, 4096),
        "model.layers.0.self_attn.q_proj.weight": (4096, 4096),
        "model.layers.0.self_attn.k_proj.weight": (1024, 4096),
        "model.layers.0.mlp.gate_proj.weight": (14_336, 4096),
    }
    config = llm_config_from_shapes(llm_shapes)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 8, 128)
    assert (config.num_hidden_layers, config.rms_norm_eps) == (32, 1e-5)
    assert config.rope_parameters["rope_theta"] == 500_000
    assert len(empty_llm(config).layers) == 30

    with pytest.raises(UserError, match=r"model\.embed_tokens"):
        llm_config_from_shapes({})
    with pytest.raises(UserError, match="text_model"):
        clip_config_from_shapes({})


# Tokenizers


@pytest.fixture(scope="module")
def llama_3(tmp_path_factory) -> Path:
    """A folder with the tokenizer.json of Llama 3, from its published ranks."""
    spec = importlib.util.find_spec("llama_models")
    if spec is None:
        pytest.skip("llama-models is not installed")
    ranks = Path(spec.submodule_search_locations[0]) / "llama3" / "tokenizer.model"
    tokens = [base64.b64decode(line.split()[0]) for line in ranks.read_bytes().splitlines()]
    rank = {token: index for index, token in enumerate(tokens)}
    unicode_of = byte_alphabet()
    merges = []
    for token in tokens:
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in splits if pair[0] in rank and pair[1] in rank]
        merges += sorted(known, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    words = ["".join(unicode_of[byte] for byte in token) for token in tokens]
    word_of = dict(zip(tokens, words, strict=True))
    tokenizer = llama_bpe_tokenizer(words, [(word_of[left], word_of[right]) for left, right in merges])
    folder = tmp_path_factory.mktemp("llama_3")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level BPE (as in GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def test_with_the_real_llama_3_the_template_takes_95_tokens(llama_3):
    assert llm_tokenizer(llama_3 / "tokenizer.json").prefix_length == 95


def with_more_tokens(folder: Path, target: Path, count: int) -> Path:
    """The tokenizer.json of `folder` with words that no text contains."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"] |= {f"unused {number}": 1000 + number for number in range(count)}
    target.write_text(json.dumps(content), encoding="utf-8")
    return target


def test_a_tokenizer_of_llama_3_size_with_another_prefix_length_is_refused(tiny_models, tmp_path):
    broken = with_more_tokens(tiny_models.text_encoder1, tmp_path / "tokenizer.json", 128_000)
    with pytest.raises(UserError, match="takes 104 tokens, 95 with the original"):
        llm_tokenizer(broken)


def test_a_replaced_pre_tokenizer_is_refused(tiny_models, tmp_path):
    tokenizer = Tokenizer.from_file(str(tiny_models.text_encoder1 / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="broken tokenizer"):
        llm_tokenizer(tmp_path / "tokenizer.json")


def test_what_transformers_5_saves_of_a_llama_3_tokenizer_is_refused(tiny_models, tmp_path):
    LlamaTokenizer.from_pretrained(tiny_models.text_encoder1).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    if saved["pre_tokenizer"]["type"] != "Metaspace":
        pytest.skip("this version of transformers no longer replaces the pre-tokenizer")
    with pytest.raises(UserError, match="acatwalksonthegrass"):
        llm_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "not a tokenizer"), ("{}", "not a tokenizer"), ("no json", "not a tokenizer"), (None, "not found")],
)
def test_a_file_that_is_no_tokenizer_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        llm_tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_clip_tokenizer_in_two_files_is_that_of_transformers(tiny_models, tmp_path):
    """diffusers' folders hold vocab.json and merges.txt, in `tokenizer_2` beside `text_encoder_2`."""
    model = json.loads((tiny_models.text_encoder2 / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    folder = tmp_path / "tokenizer_2"
    folder.mkdir()
    (tmp_path / "text_encoder_2").mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")

    found = find_tokenizer(tmp_path / "text_encoder_2", None, CLIP_REPOSITORY)
    assert found == folder / "vocab.json"
    prompts = [SHORT, "It's  7 o'clock:\nCAFÉ 海", "#hash 'quoted' a-b_c", ""]
    expected = CLIPTokenizer.from_pretrained(folder)(prompts, padding="max_length", max_length=77).input_ids
    assert clip_tokenizer(found)(prompts)[0].tolist() == expected

    (folder / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"merges\.txt"):
        clip_tokenizer(found)


def test_exchanged_tokenizers_are_refused(tiny_models):
    with pytest.raises(UserError, match="not the tokenizer of this text encoder"):
        llm_tokenizer(tiny_models.text_encoder2 / "tokenizer.json")
    with pytest.raises(UserError, match="not the tokenizer of this text encoder"):
        clip_tokenizer(tiny_models.text_encoder1 / "tokenizer.json")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny_models, tmp_path, llm):
    larger = with_more_tokens(tiny_models.text_encoder1, tmp_path / "tokenizer.json", 100)
    with pytest.raises(UserError, match="the text encoder has 512"):
        LlmTextEncoder(llm.model, llm_tokenizer(larger), "")


def test_where_a_tokenizer_is_looked_for(tiny_models, tmp_path, monkeypatch):
    folder = tiny_models.text_encoder1
    assert find_tokenizer(folder, None, LLM_REPOSITORY) == folder / "tokenizer.json"
    assert find_tokenizer(tmp_path, folder, LLM_REPOSITORY) == folder / "tokenizer.json"
    assert find_tokenizer(tmp_path, folder / "tokenizer.json", LLM_REPOSITORY) == folder / "tokenizer.json"
    single = tmp_path / "llava.safetensors"
    (tmp_path / "llava").mkdir()
    shutil.copy(folder / "tokenizer.json", tmp_path / "llava")
    assert find_tokenizer(single, None, LLM_REPOSITORY) == tmp_path / "llava" / "tokenizer.json"
    with pytest.raises(UserError, match="tokenizer not found"):
        find_tokenizer(folder, tmp_path / "missing", LLM_REPOSITORY)


def test_without_tokenizer_and_network_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="--tokenizer1") as caught:
        find_tokenizer(tmp_path / "llava.safetensors", None, LLM_REPOSITORY)
    assert "\n" not in str(caught.value)
