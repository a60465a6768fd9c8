"""Options of the two caching scripts. They can be read and checked without importing torch."""

from dataclasses import dataclass
from pathlib import Path

from utils.cli import option
from utils.errors import UserError
from utils.files import require_output

DEFAULT_TEXT_WORKERS = 8


@dataclass(frozen=True, kw_only=True)
class CachingOptions:
    """caching"""

    dataset_config: Path = option(help="dataset config, a .toml or .json file", path="file")
    batch_size: int | None = option(None, help="upper limit for each dataset's batch_size while encoding", minimum=1)
    num_workers: int | None = option(
        None, help="threads that open and decode media, at least 1; one less than the processors when unset", minimum=0
    )
    skip_existing: bool = option(
        False, help="keep every cache file that is complete, without checking whether media, captions or models changed"
    )
    keep_cache: bool = option(
        False, help="accepted for old command lines; without --prune no cache file is ever deleted"
    )
    prune: bool = option(False, help="delete the cache files in the cache directories that belong to no item")
    strict: bool = option(False, help="stop at the first file that cannot be used, instead of skipping it")
    vram_gb: float | None = option(
        None,
        help="GPU memory in GiB that encoding may use, 0: all that is free; chooses the VAE's tile size",
        minimum=0,
    )
    dry_run: bool = option(False, help="show the dataset and the memory that encoding needs, and stop")

    def __post_init__(self) -> None:
        if self.prune and self.keep_cache:
            raise UserError("--prune deletes what --keep_cache keeps; give one of them")


@dataclass(frozen=True, kw_only=True)
class LatentCachingOptions(CachingOptions):
    """caching"""

    disable_cudnn_backend: bool = option(False, help="switch cuDNN off, which may help on AMD GPUs")


@dataclass(frozen=True, kw_only=True)
class TextCachingOptions(CachingOptions):
    """caching"""

    num_workers: int | None = option(
        None, help=f"threads that check existing cache files; {DEFAULT_TEXT_WORKERS} when unset", minimum=1
    )
    vram_gb: float | None = option(
        None,
        help="GPU memory in GiB that encoding may use, 0: all that is free; uses --fp8_llm only where it is needed",
        minimum=0,
    )


@dataclass(frozen=True, kw_only=True)
class PreviewOptions:
    """looking at the dataset instead of caching"""

    debug_mode: str | None = option(
        None, help="show the pixels that would be encoded, and stop", choices=("image", "console", "video", "html")
    )
    debug_output: Path = option(Path("dataset_preview.html"), help="the page that --debug_mode html writes")
    console_width: int = option(80, help="characters in a line of --debug_mode console", minimum=8)
    console_back: str | None = option(
        None, help="background colour of --debug_mode console, a name of ascii_magic.Back"
    )
    console_num_images: int | None = option(
        None, help="show this many items of each dataset, without waiting for keys", minimum=1
    )

    def __post_init__(self) -> None:
        if self.debug_mode == "html":
            require_output("--debug_output", self.debug_output, [])
