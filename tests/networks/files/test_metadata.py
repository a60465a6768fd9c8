"""The metadata keys that other programs read, hashes computed by hand, and no secrets."""

import hashlib
import json
import struct

import pytest
import torch

from modules.options import LoraCheckpointingOptions
from modules.training.files import HuggingFaceOptions, LoraSaveOptions
from modules.training.optimizers import OptimizerOptions
from modules.training.options import LogOptions, LoraMemoryOptions, NetworkOptions, TrainingOptions
from modules.training.timesteps import LoraTimestepOptions
from networks.files.lora_files import model_hashes
from networks.files.metadata import (
    MINIMUM_KEYS,
    LoraMetadataOptions,
    RunFacts,
    checkpoint_metadata,
    modelspec_metadata,
)
from utils.errors import UserError
from utils.safetensors_utils import save_file

# The keys of docs/formats.md 2.5, except the hashes.
DOCUMENTED = """
session_id training_started_at training_finished_at output_name learning_rate num_train_items
num_batches_per_epoch num_epochs gradient_checkpointing gradient_checkpointing_cpu_offload
gradient_accumulation_steps max_train_steps lr_warmup_steps lr_scheduler base_model_version network_module
network_dim network_alpha network_args network_dropout mixed_precision seed training_comment optimizer
max_grad_norm fp8_base full_fp16 full_bf16 weighting_scheme logit_mean logit_std mode_scale guidance_scale
timestep_sampling sigmoid_scale discrete_flow_shift datasets steps epoch sd_model_name vae_name
"""
SECRET = "hf_do_not_write_me"


@pytest.fixture
def facts() -> RunFacts:
    return RunFacts(
        session_id=1234,
        training_started_at=1700000000.5,
        training_finished_at=1700003600.9,
        num_train_items=12,
        num_batches_per_epoch=6,
        num_epochs=3,
        max_train_steps=18,
        steps=9,
        epoch=2,
        seed=42,
        optimizer="torch.optim.AdamW(weight_decay=0.1)",
        lr_scheduler="cosine",
        lr_warmup_steps=2,
        mixed_precision="bf16",
        network_dim=8,
        network_alpha=4.0,
        network_args={"loraplus_lr_ratio": "4"},
        datasets=[{"caption": "ein Kätzchen", "batch_size": 2}],
        sd_model_name="models/hunyuan/mp_rank_00_model_states.pt",
        vae_name=None,
        validation={"loss": 0.125, "base_loss": 0.25},
    )


def everything(facts: RunFacts, **settings) -> dict[str, str]:
    groups = (
        TrainingOptions(seed=42),
        LoraCheckpointingOptions(),
        LoraMemoryOptions(),
        OptimizerOptions(),
        LoraTimestepOptions(timestep_sampling="shift", discrete_flow_shift=7.0, min_timestep=100),
        NetworkOptions(network_module="networks.lora"),
        LoraSaveOptions(output_name="cat"),
        LogOptions(wandb_api_key=SECRET),
        HuggingFaceOptions(huggingface_token=SECRET),
    )
    return checkpoint_metadata(facts, LoraMetadataOptions(**settings), *groups, title="cat")


def test_keys_and_values_of_kohyas_tools(facts: RunFacts) -> None:
    metadata = everything(facts, training_comment="a note")
    expected = {
        "ss_session_id": "1234",
        "ss_training_started_at": "1700000000.5",
        "ss_output_name": "cat",
        "ss_base_model_version": "hunyuan_video",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "8",
        "ss_network_alpha": "4.0",
        "ss_network_dropout": "None",
        "ss_optimizer": "torch.optim.AdamW(weight_decay=0.1)",
        "ss_lr_warmup_steps": "2",
        "ss_timestep_sampling": "shift",
        "ss_discrete_flow_shift": "7.0",
        "ss_gradient_checkpointing": "False",
        "ss_training_comment": "a note",
        "ss_seed": "42",
        "ss_steps": "9",
        "ss_epoch": "2",
        "ss_sd_model_name": "mp_rank_00_model_states.pt",
        "ss_vae_name": "None",
        "ss_validation_loss": "0.125",
    }
    assert expected.items() <= metadata.items()
    assert json.loads(metadata["ss_network_args"]) == {"loraplus_lr_ratio": "4"}
    assert json.loads(metadata["ss_datasets"])[0]["caption"] == "ein Kätzchen"
    assert {f"ss_{name}" for name in DOCUMENTED.split()} <= set(metadata)


def test_modelspec(facts: RunFacts) -> None:
    metadata = everything(facts, metadata_author="A. N. Other", metadata_reso="960,544", metadata_tags="cat,video")
    specification = {key: value for key, value in metadata.items() if key.startswith("modelspec.")}
    assert specification == {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "hunyuan-video/lora",
        "modelspec.implementation": "https://github.com/Tencent/HunyuanVideo",
        "modelspec.title": "cat",
        "modelspec.date": "2023-11-14T23:13:20+00:00",
        "modelspec.resolution": "960x544",
        "modelspec.author": "A. N. Other",
        "modelspec.tags": "cat,video",
        "modelspec.timestep_range": "100,1000",
    }
    bare = modelspec_metadata(LoraMetadataOptions(metadata_title="T", metadata_arch="x/lora"), "cat", 0)
    assert (bare["modelspec.title"], bare["modelspec.architecture"]) == ("T", "x/lora")
    assert bare["modelspec.resolution"] == "1280x720" and "modelspec.timestep_range" not in bare


def test_no_metadata_keeps_what_is_needed_to_use_the_file(facts: RunFacts) -> None:
    metadata = everything(facts, no_metadata=True)
    assert {key for key in metadata if not key.startswith("modelspec.")} == set(MINIMUM_KEYS)
    assert "modelspec.title" in metadata


def test_secrets_never_get_in(facts: RunFacts) -> None:
    assert SECRET not in json.dumps(everything(facts))


@pytest.mark.parametrize(("text", "resolution"), [("1024", "1024x1024"), ("960x544", "960x544"), (None, "1280x720")])
def test_resolution(text: str | None, resolution: str) -> None:
    assert LoraMetadataOptions(metadata_reso=text).resolution == resolution


@pytest.mark.parametrize("text", ["big", "960,", "1,2,3", "-5"])
def test_wrong_resolution(text: str) -> None:
    with pytest.raises(UserError, match="--metadata_reso"):
        LoraMetadataOptions(metadata_reso=text)


def written_by_hand(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file by definition: header length, JSON header, tensors by falling dtype size and name."""
    header, data = {"__metadata__": metadata}, b""
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        raw = tensors[name].numpy().tobytes()
        dtype = {4: "F32", 2: "F16"}[tensors[name].element_size()]
        header[name] = {
            "dtype": dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def test_hashes_by_hand() -> None:
    torch.manual_seed(0)
    tensors = {"b": torch.randn(600, 500), "a": torch.randn(3, 4).half(), "c": torch.randn(7, 11)}
    metadata = {"ss_epoch": "1"}
    data = written_by_hand(tensors, metadata)
    start = 8 + struct.unpack("<Q", data[:8])[0]
    assert model_hashes(tensors, metadata) == {
        "sshs_model_hash": hashlib.sha256(data[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8],
    }


def test_model_hash_is_that_of_the_tensors_alone(tmp_path) -> None:
    tensors = {"x": torch.arange(12.0).reshape(3, 4).t()}  # not contiguous
    hashes = [model_hashes(tensors, metadata) for metadata in (None, {"ss_epoch": "1"}, {"modelspec.title": "x"})]
    assert len({entry["sshs_model_hash"] for entry in hashes}) == 1
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, hashes[0] | {"modelspec.title": "any"})
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    assert hashlib.sha256(data[start:]).hexdigest() == hashes[0]["sshs_model_hash"]


def test_legacy_hash_sees_the_training_metadata_only() -> None:
    tensors = {"x": torch.arange(400_000.0)}
    legacy = [
        model_hashes(tensors, metadata)["sshs_legacy_hash"]
        for metadata in (
            {"ss_a": "1"},
            {"ss_a": "1", "modelspec.title": "t", "sshs_model_hash": "h"},
            {"ss_a": "12345678"},
        )
    ]
    assert legacy[0] == legacy[1] != legacy[2]
