"""Cache files: names, tensors, what made them, and whether they can still be used.

Layout and names are those of musubi-tuner (FORMATS: latent cache 1.0.1, text cache 1.0.1), so both tools read each
other's files. One more metadata key, `made_from`, holds as JSON what a file was made from; a run compares it with what
it would make now, without opening any media. Latents are stored unscaled.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from utils.device_utils import dtype_word
from utils.errors import UserError
from utils.files import TEMPORARY_SUFFIX, write_text
from utils.safetensors_utils import TensorInfo, load_file, read_header, save_file

ARCHITECTURE = "hunyuan_video"
FORMAT_VERSION = "1.0.1"
# Raised when this program would make different tensors from the same inputs.
CACHE_VERSION = 1
LATENT_SUFFIX = "_hv.safetensors"
TEXT_SUFFIX = "_hv_te.safetensors"
# Kind of the manifests in which each caching process lists the items that it could not make.
FAILURES = "failures-"
LATENT_CHANNELS = 16
# Unscaled latents have a standard deviation of about 2.1, scaled ones (x 0.476986) of about 1.
SCALED_STD_LIMIT = 1.45


def latent_cache_path(directory: Path, name: str, size: tuple[int, int]) -> Path:
    """Cache file of an image or clip; `size` is (width, height) of the original media."""
    return directory / f"{name}_{size[0]:04d}x{size[1]:04d}{LATENT_SUFFIX}"


def text_cache_path(directory: Path, name: str) -> Path:
    """Cache file of the caption of the source `name`; all clips of a video share it."""
    return directory / f"{name}{TEXT_SUFFIX}"


def file_identity(path: str | os.PathLike, whole: bool = False) -> str:
    """Identity of a file or folder: sizes and a hash of the ends of each file, or of all that is in it when `whole`.

    Neither path nor modification time count, so models and media may be moved or copied.
    """
    path, ends = Path(path), 1 << 20
    digest, total = hashlib.blake2b(digest_size=16), 0
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        size = file.stat().st_size
        total += size
        with open(file, "rb") as stream:
            name = os.fsencode(file.name if path.is_dir() else "")
            digest.update(name + f":{size}:".encode() + stream.read(-1 if whole else ends))
            stream.seek(max(size - ends, 0))
            digest.update(stream.read(ends))
    return f"{total}-{digest.hexdigest()}"


def _require_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds values that are not finite")


def write_latent_cache(
    path: Path,
    latents: torch.Tensor,
    size: tuple[int, int],
    frame_count: int | None,
    made_from: Mapping[str, Any],
) -> None:
    """Writes unscaled latents (16, f, h, w) in the tensor's own dtype.

    Args:
        size: (width, height) of the original media.
        frame_count: frames of a clip, None for an image.
        made_from: what the latents depend on, see `check_latents`.

    Raises:
        ValueError: the latents are not finite; nothing is written.
    """
    _require_finite({"the latents": latents})
    _, f, h, w = latents.shape
    metadata = {
        "architecture": ARCHITECTURE,
        "width": str(size[0]),
        "height": str(size[1]),
        "format_version": FORMAT_VERSION,
        **({} if frame_count is None else {"frame_count": str(frame_count)}),
        "made_from": json.dumps({"version": CACHE_VERSION, **made_from}),
    }
    save_file({f"latents_{f}x{h}x{w}_{dtype_word(latents.dtype)}": latents}, path, metadata)


def write_text_cache(
    path: Path,
    llm: torch.Tensor,
    llm_mask: torch.Tensor,
    clip: torch.Tensor,
    clip_mask: torch.Tensor,
    caption: str,
    made_from: Mapping[str, Any],
) -> None:
    """Writes the embeddings of one caption: llm (256, D), llm_mask (256,), clip (D2,), clip_mask (77,).

    `made_from` is what they depend on besides the caption, see `check_text`.

    Raises:
        ValueError: an embedding is not finite; nothing is written.
    """
    tensors = {
        f"llm_{dtype_word(llm.dtype)}": llm,
        "llm_mask": llm_mask.to(torch.int64),
        f"clipL_{dtype_word(clip.dtype)}": clip,
        "clipL_mask": clip_mask.to(torch.int64),
    }
    _require_finite(tensors)
    metadata = {
        "architecture": ARCHITECTURE,
        "caption1": caption,
        "format_version": FORMAT_VERSION,
        "made_from": json.dumps({"version": CACHE_VERSION, **made_from}),
    }
    save_file(tensors, path, metadata)


def _tensor_called(path: Path, tensors: Mapping[str, torch.Tensor], prefix: str) -> torch.Tensor:
    for name, tensor in tensors.items():
        if name.startswith(prefix) and not name.endswith("_mask"):
            return tensor
    raise UserError(f"{path}: no tensor '{prefix}...' in this cache; run the caching script again")


def read_latent_cache(path: Path) -> torch.Tensor:
    """Unscaled latents (16, f, h, w) in float32."""
    return _tensor_called(path, load_file(path), "latents_").float()


def read_text_cache(path: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LLM states (256, D) float32, their mask (256,) int64, pooled CLIP (D2,) float32."""
    tensors = load_file(path)
    if "llm_mask" not in tensors:
        raise UserError(f"{path}: no tensor 'llm_mask' in this cache; run cache_text_encoder_outputs.py again")
    llm, clip = _tensor_called(path, tensors, "llm_"), _tensor_called(path, tensors, "clipL_")
    return llm.float(), tensors["llm_mask"].long(), clip.float()


@dataclass(frozen=True)
class Verdict:
    """Whether a cache file can be used: `word` is new, changed or kept, `reason` says what changed."""

    word: str
    reason: str = ""
    by_musubi: bool = False

    @property
    def kept(self) -> bool:
        return self.word == "kept"


def _header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]] | Verdict:
    if not path.exists():
        return Verdict("new", "not cached")
    try:
        infos, metadata = read_header(path)
    except UserError:
        return Verdict("changed", "the cache file is damaged")
    if metadata.get("architecture") != ARCHITECTURE:
        return Verdict("changed", "the cache file is of another program or model")
    return infos, metadata


def _changes(metadata: Mapping[str, str], expected: Mapping[str, Any]) -> str:
    """Names of the things that differ from what the file was made from, empty if none."""
    try:
        found = json.loads(metadata["made_from"])
    except json.JSONDecodeError:
        return "its metadata are damaged"
    expected = {"version": CACHE_VERSION, **expected}
    return ", ".join(key for key, value in expected.items() if found.get(key) != value)


def check_latents(
    path: Path, shape: tuple[int, int, int], made_from: Mapping[str, Any], trust_name: bool = False
) -> Verdict:
    """Compares a latent cache with what would be written now; reads the header alone.

    Args:
        shape: (f, h, w) of the latents.
        made_from: only these keys are compared, so a trainer that does not know the VAE leaves it out.
        trust_name: the shape must fit, but what it was made from is not compared.
    """
    header = _header(path)
    if isinstance(header, Verdict):
        return header
    infos, metadata = header
    if not any(name.startswith("latents_") and info.shape == (LATENT_CHANNELS, *shape) for name, info in infos.items()):
        return Verdict("changed", "bucket or frames")
    if "made_from" not in metadata:
        if metadata.get("format_version") == "1.0.0" and _is_scaled(path):
            return Verdict("changed", "scaled latents of musubi-tuner before 2025-01-08")
        return Verdict("kept", by_musubi=True)
    changes = "" if trust_name else _changes(metadata, made_from)
    return Verdict("changed", changes) if changes else Verdict("kept")


def _is_scaled(path: Path) -> bool:
    """Whether a file of format 1.0.0 holds latents x 0.476986, as the first versions of musubi-tuner wrote them."""
    return read_latent_cache(path).std().item() < SCALED_STD_LIMIT


def check_text(path: Path, caption: str | None, made_from: Mapping[str, Any], trust_name: bool = False) -> Verdict:
    """Compares a text cache with what would be written now, by its header; a caption of None is not compared."""
    header = _header(path)
    if isinstance(header, Verdict):
        return header
    infos, metadata = header
    missing = [p for p in ("llm_mask", "llm_", "clipL_") if not any(name.startswith(p) for name in infos)]
    if missing:
        return Verdict("changed", "the cache file is not complete")
    if trust_name:
        return Verdict("kept", by_musubi="made_from" not in metadata)
    if caption is not None and metadata.get("caption1") != caption:
        return Verdict("changed", "caption")
    if "made_from" not in metadata:
        return Verdict("kept", by_musubi=True)
    changes = _changes(metadata, made_from)
    return Verdict("changed", changes) if changes else Verdict("kept")


@dataclass
class Manifest:
    """What the last run of a caching script knew of one dataset; `kind` is "latents" or "text".

    Attributes:
        sources: per source name what the script wants to remember.
        sound: per cache file its size and modification time when it was last read whole and found finite.
        trusted: per cache file what the last run took it for by its name alone, because the user said so.
    """

    directory: Path
    kind: str
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    sound: dict[str, list[int]] = field(default_factory=dict)
    trusted: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.directory / f"hv_{self.kind}.manifest.json"

    @classmethod
    def load(cls, directory: Path, kind: str) -> "Manifest":
        """The manifest of a directory with what all processes found sound; empty where none is or it is damaged."""
        manifest = cls._read(directory, kind)
        for share in manifest._shares().values():
            manifest.sound |= share.sound
        return manifest

    @classmethod
    def _read(cls, directory: Path, kind: str) -> "Manifest":
        manifest = cls(directory, kind)
        try:
            values = json.loads(manifest.path.read_text(encoding="utf-8"))
            if values["version"] == CACHE_VERSION:
                manifest.sources, manifest.sound = dict(values["sources"]), dict(values["sound"])
                manifest.trusted = dict(values.get("trusted", {}))
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return manifest

    def save(self) -> None:
        """Writes the manifest atomically."""
        values = {"version": CACHE_VERSION, "sources": self.sources, "sound": self.sound, "trusted": self.trusted}
        write_text(self.path, json.dumps(values, ensure_ascii=False, indent=1) + "\n")

    def share(self, rank: int) -> "Manifest":
        """The list, still empty, of what one process found sound: each has its own, so none writes another's file."""
        return Manifest(self.directory, f"{self.kind}-sound-{rank}")

    def save_share(self, rank: int, mine: Iterable[Path]) -> None:
        """Saves what a process knows to be sound of the cache files that are its part."""
        share = self.share(rank)
        share.sound = {path.name: self.sound[path.name] for path in mine if path.name in self.sound}
        if share.sound:
            share.save()
        else:
            share.path.unlink(missing_ok=True)

    def save_all(self, world_size: int) -> None:
        """Saves the manifest when process 0 is done; deletes the lists that no process renews, for it holds these."""
        self.save()
        for rank, share in self._shares().items():
            if rank == 0 or rank >= world_size:
                share.path.unlink(missing_ok=True)

    def _shares(self) -> dict[int, "Manifest"]:
        return _by_rank(self.directory, f"{self.kind}-sound-")

    def is_sound(self, path: Path) -> bool:
        """Whether a cache file is readable and finite throughout; read whole only if it changed since the last time."""
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        if self.sound.get(path.name) == stamp:
            return True
        try:
            _require_finite(load_file(path))
        except (UserError, ValueError):
            return False
        self.sound[path.name] = stamp
        return True

    def mark_sound(self, path: Path) -> None:
        """Notes that a file was just written, which the writers do with finite tensors only."""
        stat = path.stat()
        self.sound[path.name] = [stat.st_size, stat.st_mtime_ns]


def failed_items(directory: Path) -> dict[str, list[int]]:
    """Items that the last caching run could not make, with the stamp of the source they were to be made from."""
    manifests = failure_manifests(directory).values()
    return {name: entry["stamp"] for manifest in manifests for name, entry in manifest.sources.items()}


def failure_manifests(directory: Path) -> dict[int, Manifest]:
    """The lists of failed items by the rank of the process that wrote them."""
    return _by_rank(directory, FAILURES)


def _by_rank(directory: Path, stem: str) -> dict[int, Manifest]:
    found = [re.fullmatch(rf"hv_({stem}(\d+))\.manifest\.json", path.name) for path in directory.glob("hv_*.json")]
    return {int(match[2]): Manifest._read(directory, match[1]) for match in found if match}


@contextmanager
def kept_when_stopped(shares: Sequence[tuple[Manifest, Sequence[Path]]], rank: int) -> Iterator[None]:
    """Saves what is known to be sound when the run ends early, so that the next does not read it whole again.

    Args:
        shares: manifests with the cache files that are this process's part; the list may grow meanwhile.
    """
    try:
        yield
    except BaseException:
        for manifest, mine in shares:
            with suppress(OSError):  # a full disk must not hide why the run ended
                manifest.save_share(rank, mine)
        raise


def orphans(directory: Path, suffix: str, wanted: Iterable[Path]) -> list[Path]:
    """Cache files with this suffix that belong to no item; they are never used, and never deleted unasked."""
    names = {path.name for path in wanted}
    return sorted(path for path in directory.glob(f"*{suffix}") if path.name not in names)


def remove_leftovers(directory: Path, wanted: Iterable[Path]) -> None:
    """Removes what killed runs left beside the files `wanted`; no other process may be writing these."""
    targets = {path.name.encode()[:200].decode(errors="ignore") for path in wanted}
    for path in directory.glob(f"*{TEMPORARY_SUFFIX}"):
        if path.name.removesuffix(TEMPORARY_SUFFIX).rpartition(".")[0] in targets:
            path.unlink(missing_ok=True)
