"""Cache files: their names and tensors, the provenance stored in them, and whether a file can still be used.

Names and layout are those of musubi-tuner (docs/formats.md: latent cache 1.0.1, text cache 1.0.1), so both tools read
each other's files. Ours add one metadata key, `made_from`: the file's provenance as JSON, which is everything that its
tensors depend on. A caching run compares it with the provenance of the file that it would write now, and need not open
any media for that. Latents are stored unscaled.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from utils.device_utils import dtype_word
from utils.errors import UserError
from utils.files import parse_json
from utils.safetensors_utils import TensorInfo, load_file, read_header, save_file

ARCHITECTURE = "hunyuan_video"
FORMAT_VERSION = "1.0.1"
# Part of every provenance; raised when this program would make different tensors from the same inputs.
CACHE_VERSION = 1
PROVENANCE_KEY = "made_from"
LATENT_SUFFIX = "_hv.safetensors"
TEXT_SUFFIX = "_hv_te.safetensors"
LATENT_CHANNELS = 16
# Unscaled latents have a standard deviation of about 2.1, scaled ones (x 0.476986) of about 1.
SCALED_STD_LIMIT = 1.45
# Unscaled latents of real media stay below 40. Larger ones come from a damaged file or are no latents.
LARGEST_LATENT = 1000.0
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def latent_cache_path(directory: Path, name: str, size: tuple[int, int]) -> Path:
    """Cache file of an image or clip; `size` is (width, height) of the original media."""
    return directory / f"{name}_{size[0]:04d}x{size[1]:04d}{LATENT_SUFFIX}"


def text_cache_path(directory: Path, name: str) -> Path:
    """Cache file of the caption of the source `name`; all clips of a video share it."""
    return directory / f"{name}{TEXT_SUFFIX}"


def require_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError, naming the tensor, if any value is infinite or NaN."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds values that are not finite")


def require_usable(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError, naming the tensor, if a cache file holds values that no training may see."""
    for name, tensor in tensors.items():
        if name.endswith("_mask"):
            if not ((tensor == 0) | (tensor == 1)).all():
                raise ValueError(f"{name} holds other values than 0 and 1")
            continue
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} holds {dtype_word(tensor.dtype)}, floating-point numbers are expected")
        require_finite({name: tensor})
        if name.startswith("latents_") and tensor.abs().max() > LARGEST_LATENT:
            raise ValueError(f"{name} holds values beyond {LARGEST_LATENT:g}, so these are no latents")


def write_latent_cache(
    path: Path,
    latents: torch.Tensor,
    size: tuple[int, int],
    frame_count: int | None,
    provenance: Mapping[str, Any],
) -> None:
    """Writes unscaled latents (16, f, h, w) in the tensor's own dtype.

    Args:
        size: (width, height) of the original media.
        frame_count: frames of a clip, None for an image.
        provenance: what the latents depend on, see `check_latents`.

    Raises:
        ValueError: the latents are not finite; nothing is written.
    """
    require_finite({"the latents": latents})
    _, f, h, w = latents.shape
    metadata = {
        "architecture": ARCHITECTURE,
        "width": str(size[0]),
        "height": str(size[1]),
        "format_version": FORMAT_VERSION,
        **({} if frame_count is None else {"frame_count": str(frame_count)}),
        PROVENANCE_KEY: json.dumps({"version": CACHE_VERSION, **provenance}),
    }
    save_file({f"latents_{f}x{h}x{w}_{dtype_word(latents.dtype)}": latents}, path, metadata)


def write_text_cache(
    path: Path,
    llm: torch.Tensor,
    llm_mask: torch.Tensor,
    clip: torch.Tensor,
    clip_mask: torch.Tensor,
    caption: str,
    provenance: Mapping[str, Any],
) -> None:
    """Writes the embeddings of one caption.

    Args:
        llm: hidden states (256, D) of the LLM.
        llm_mask: (256,), 1 for valid tokens.
        clip: pooled output (D2,) of CLIP.
        clip_mask: (77,), 1 for valid tokens.
        provenance: everything that the embeddings depend on, except the caption; see `check_text`.

    Raises:
        ValueError: an embedding is not finite; nothing is written.
    """
    tensors = {
        f"llm_{dtype_word(llm.dtype)}": llm,
        "llm_mask": llm_mask.to(torch.int64),
        f"clipL_{dtype_word(clip.dtype)}": clip,
        "clipL_mask": clip_mask.to(torch.int64),
    }
    require_finite(tensors)
    metadata = {
        "architecture": ARCHITECTURE,
        "caption1": caption,
        "format_version": FORMAT_VERSION,
        PROVENANCE_KEY: json.dumps({"version": CACHE_VERSION, **provenance}),
    }
    save_file(tensors, path, metadata)


def _tensor_with_prefix(path: Path, tensors: Mapping[str, torch.Tensor], prefix: str) -> torch.Tensor:
    for name, tensor in tensors.items():
        if name.startswith(prefix) and not name.endswith("_mask"):
            return tensor
    raise UserError(f"{path}: no tensor '{prefix}...' in this cache; run the caching script again")


def _load_usable(path: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(path)
    try:
        require_usable(tensors)
    except ValueError as error:
        raise UserError(f"{path}: {error}; delete this cache and run the caching script again") from None
    return tensors


def read_latent_cache(path: Path) -> torch.Tensor:
    """Unscaled latents (16, f, h, w) in float32.

    Raises:
        UserError: the file holds no latents that can be used.
    """
    latents = _tensor_with_prefix(path, _load_usable(path), "latents_")
    if latents.ndim != 4 or latents.shape[0] != LATENT_CHANNELS:
        raise UserError(f"{path}: latents (16, f, h, w) are expected, found {tuple(latents.shape)}")
    return latents.float()


def read_text_cache(path: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LLM states (256, D) float32, their mask (256,) int64, pooled CLIP output (D2,) float32.

    Raises:
        UserError: the file holds no embeddings that can be used.
    """
    tensors = _load_usable(path)
    if "llm_mask" not in tensors:
        raise UserError(f"{path}: no tensor 'llm_mask' in this cache; run cache_text_encoder_outputs.py again")
    llm, clip = _tensor_with_prefix(path, tensors, "llm_"), _tensor_with_prefix(path, tensors, "clipL_")
    mask = tensors["llm_mask"]
    if llm.ndim != 2 or mask.shape != llm.shape[:1] or clip.ndim != 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (llm, mask, clip))
        raise UserError(f"{path}: (256, D), (256,) and (D2,) are expected, found {shapes}")
    return llm.float(), mask.long(), clip.float()


@dataclass(frozen=True)
class CacheStatus:
    """Whether a cache file can be used.

    Attributes:
        state: "new" (there is no file yet), "changed" (the file must be made again) or "kept" (it can be used).
        reason: why the state is "new" or "changed".
        by_musubi: the file was made by musubi-tuner.
    """

    state: str
    reason: str = ""
    by_musubi: bool = False

    @property
    def kept(self) -> bool:
        return self.state == "kept"


def _header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]] | CacheStatus:
    """Tensor infos and metadata of a cache file, or the status of a file that cannot be used at all."""
    if not path.exists():
        return CacheStatus("new", "not cached")
    try:
        infos, metadata = read_header(path)
    except UserError:
        return CacheStatus("changed", "the cache file is damaged")
    if metadata.get("architecture") != ARCHITECTURE:
        return CacheStatus("changed", "the cache file was made by another program or for another model")
    return infos, metadata


def _changes(metadata: Mapping[str, str], expected: Mapping[str, Any]) -> str:
    """The keys of `expected` whose values differ from the file's provenance, separated by commas."""
    try:
        found = parse_json(metadata[PROVENANCE_KEY])
    except ValueError:
        found = None
    if not isinstance(found, dict):
        return "its metadata is damaged"
    expected = {"version": CACHE_VERSION, **expected}
    return ", ".join(key for key, value in expected.items() if found.get(key) != value)


def check_latents(
    path: Path, shape: tuple[int, int, int], provenance: Mapping[str, Any], trust_name: bool = False
) -> CacheStatus:
    """Compares a latent cache with the one that would be written now; reads only its header.

    Args:
        shape: (f, h, w) of the latents.
        provenance: what is expected; keys that it lacks are not compared. The trainer, which has no VAE, leaves the
            VAE's keys out.
        trust_name: compare the shape only, not the provenance.
    """
    header = _header(path)
    if isinstance(header, CacheStatus):
        return header
    infos, metadata = header
    latents = [info for name, info in infos.items() if name.startswith("latents_")]
    if not any(info.shape == (LATENT_CHANNELS, *shape) for info in latents):
        return CacheStatus("changed", "bucket or frames")
    if not all(info.dtype in FLOATS for info in latents):
        return CacheStatus("changed", "the cache file holds no floating-point numbers")
    if PROVENANCE_KEY not in metadata:
        if metadata.get("format_version") == "1.0.0" and _is_scaled(path):
            return CacheStatus("changed", "scaled latents of musubi-tuner before 2025-01-08")
        return CacheStatus("kept", by_musubi=True)
    changes = "" if trust_name else _changes(metadata, provenance)
    return CacheStatus("changed", changes) if changes else CacheStatus("kept")


def _is_scaled(path: Path) -> bool:
    """Whether a file of format 1.0.0 holds latents x 0.476986, as the first versions of musubi-tuner wrote them."""
    return read_latent_cache(path).std().item() < SCALED_STD_LIMIT


def check_text(path: Path, caption: str | None, provenance: Mapping[str, Any], trust_name: bool = False) -> CacheStatus:
    """Compares a text cache with the one that would be written now; reads only its header.

    Args:
        caption: the caption that is expected; None: any.
        provenance: what else is expected; keys that it lacks are not compared.
        trust_name: check only that the file is complete.
    """
    header = _header(path)
    if isinstance(header, CacheStatus):
        return header
    infos, metadata = header
    if not all(any(name.startswith(prefix) for name in infos) for prefix in ("llm_mask", "llm_", "clipL_")):
        return CacheStatus("changed", "the cache file is not complete")
    if not _are_embeddings(infos):
        return CacheStatus("changed", "the cache file has tensors of another type or shape")
    if trust_name:
        return CacheStatus("kept", by_musubi=PROVENANCE_KEY not in metadata)
    if caption is not None and metadata.get("caption1") != caption:
        return CacheStatus("changed", "caption")
    if PROVENANCE_KEY not in metadata:
        return CacheStatus("kept", by_musubi=True)
    changes = _changes(metadata, provenance)
    return CacheStatus("changed", changes) if changes else CacheStatus("kept")


def _are_embeddings(infos: Mapping[str, TensorInfo]) -> bool:
    """Whether type and number of axes of all tensors are those that `write_text_cache` writes."""
    axes = {"llm_mask": 1, "clipL_mask": 1, "clipL_": 1, "llm_": 2}  # the first that fits counts
    for name, info in infos.items():
        prefix = next((prefix for prefix in axes if name.startswith(prefix)), None)
        if prefix is None:
            continue
        is_right_type = prefix.endswith("_mask") or info.dtype in FLOATS
        if not is_right_type or len(info.shape) != axes[prefix]:
            return False
    return True


def orphans(directory: Path, suffix: str, wanted: Iterable[Path]) -> list[Path]:
    """Cache files with this suffix that belong to no item: not in `wanted`. They are deleted only with --prune."""
    names = {path.name for path in wanted}
    return sorted(path for path in directory.glob(f"*{suffix}") if path.name not in names)
