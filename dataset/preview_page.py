"""One self-contained HTML page that shows what would be encoded: pixels, captions, buckets and warnings."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset.buckets import resize_crop
from dataset.items import Item
from dataset.media import MediaError, read_clips
from dataset.report import warnings_of
from dataset.scan import ScannedDataset, ScannedSource
from utils.files import write_text

THUMBNAIL_HEIGHT = 144
STRIP_FRAMES = 6

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --accent: #3b7dd8; --warn: #b8620b; --bad: #c0392b }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 0 auto; padding: 24px }
h1 { font-size: 24px; margin: 0 0 4px } h2 { font-size: 19px; margin: 40px 0 8px; overflow-wrap: anywhere }
h3 { font-size: 15px; margin: 20px 0 8px }
.quiet { opacity: .7 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; max-width: 760px }
td, th { padding: 3px 16px 3px 0; text-align: left; white-space: nowrap } th { font-weight: 600; opacity: .7 }
td.chart { width: 100% } .bar { height: 14px; min-width: 2px; border-radius: 3px; background: var(--accent) }
ul { margin: 8px 0; padding-left: 20px } li.warn { color: var(--warn) } li.bad { color: var(--bad) }
.source { border-top: 1px solid var(--line); padding: 14px 0; min-width: 0 }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 0 24px }
.source b { overflow-wrap: anywhere }
.caption { margin: 4px 0 8px; max-width: 90ch; overflow-wrap: anywhere; white-space: pre-wrap }
.items { display: flex; flex-wrap: wrap; gap: 12px 18px }
figure { margin: 0; max-width: 100% } figcaption { font-size: 13px; opacity: .7 }
.strip { display: flex; gap: 2px; overflow-x: auto }
.strip img { display: block; height: 144px; border-radius: 3px }
.strip img:not(:only-child) { height: 112px }
details { margin: 8px 0 } pre { overflow-x: auto; padding: 12px; background: var(--soft); border-radius: 6px }
"""


def _image_tag(pixels: np.ndarray) -> str:
    """A thumbnail of (H, W, 3) pixels as an <img> tag with the data inside."""
    height, width = pixels.shape[:2]
    scale = min(1.0, THUMBNAIL_HEIGHT * 2 / height)
    small = cv2.resize(
        pixels, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA
    )
    buffer = io.BytesIO()
    Image.fromarray(small).save(buffer, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _item_figure(item: Item, clip: np.ndarray | MediaError) -> str:
    """`clip` is (F, H, W, 3)."""
    if isinstance(clip, MediaError):
        return f"<ul><li class=bad>{html.escape(str(clip))}</li></ul>"
    shown = np.linspace(0, len(clip) - 1, min(len(clip), STRIP_FRAMES)).round().astype(int)
    strip = "".join(_image_tag(clip[frame]) for frame in shown)
    text = f"{item.bucket[0]}×{item.bucket[1]}"
    if item.span and item.span.length == 1:
        text += f", frame {item.span.start}"
    elif item.span:
        text += f", frames {item.span.start}–{item.span.start + item.span.length - 1} ({item.span.length})"
    return f"<figure><div class=strip>{strip}</div><figcaption>{text}</figcaption></figure>"


def _crop_text(scanned: ScannedSource) -> str:
    """Size, scale, crop and frame rate of a source in words."""
    size, bucket = scanned.info.size, scanned.plan.items[0].bucket
    crop = resize_crop(size, bucket)
    text = f"{size[0]}×{size[1]}"
    if size != bucket:
        lost = 1 - bucket[0] * bucket[1] / (crop.resized[0] * crop.resized[1])
        text += f" × {crop.scale:.2f} → {bucket[0]}×{bucket[1]}, {lost:.0%} of the picture cropped"
    if scanned.info.fps:
        text += f"; {scanned.info.frames} frames at {scanned.info.fps:.2f} fps"
    return "; ".join([text, *scanned.info.notes])


def _source_block(scanned: ScannedSource, dataset: ScannedDataset) -> str:
    clips = read_clips(scanned.source, scanned.plan.items, dataset.settings)
    by_item = {item: _item_figure(item, clip) for item, clip in clips}
    figures = "".join(by_item[item] for item in scanned.plan.items)
    caption = html.escape(scanned.source.caption) or "<i class=quiet>empty caption</i>"
    return (
        f"<div class=source><b>{html.escape(scanned.source.path.name)}</b> "
        f"<span class=quiet>{html.escape(_crop_text(scanned))}</span>"
        f"<div class=caption>{caption}</div><div class=items>{figures}</div></div>"
    )


def _bucket_chart(dataset: ScannedDataset) -> str:
    buckets = sorted(dataset.buckets().items())
    most = max(count for _, count in buckets)
    rows = "".join(
        f"<tr><td>{name.replace('x', '×')}<td>{count}<td class=chart>"
        f"<div class=bar style='width:{100 * count / most:.1f}%'></div>"
        for name, count in buckets
    )
    return f"<table><tr><th>bucket<th>items<th>{rows}</table>"


def _dataset_section(dataset: ScannedDataset, limit: int | None) -> str:
    usable = [scanned for scanned in dataset.sources if scanned.plan.items]
    shown = usable[:limit]
    bar = tqdm(shown, desc=f"{dataset.heading}: thumbnails", unit="file", leave=False)
    sources = "".join(_source_block(scanned, dataset) for scanned in bar)
    notes = "".join(f"<li class=warn>{html.escape(line)}</li>" for line in warnings_of(dataset))
    notes += "".join(f"<li class=bad>skipped: {html.escape(problem)}</li>" for problem in dataset.problems)
    settings = "\n".join(f"{key} = {value}" for key, value in dataset.settings.effective().items())
    more = (
        f"<p class=quiet>{len(usable) - len(shown)} more files are not shown.</p>" if len(shown) < len(usable) else ""
    )
    items = sum(dataset.buckets().values())
    return (
        f"<h2>{html.escape(dataset.heading)} {html.escape(str(dataset.settings.location))}</h2>"
        f"<p class=quiet>{len(dataset.sources)} files, {items} items, num_repeats {dataset.settings.num_repeats}</p>"
        f"<details><summary>settings</summary><pre>{html.escape(settings)}</pre></details>"
        f"<ul>{notes}</ul><h3>Buckets (width×height×frames)</h3>{_bucket_chart(dataset)}<h3>Items</h3>"
        f"<div class={'list' if dataset.settings.is_video else 'grid'}>{sources}</div>{more}"
    )


def write_page(datasets: Sequence[ScannedDataset], path: Path, limit: int | None) -> None:
    """Writes the page. It shows at most `limit` files of each dataset, all if None."""
    body = "".join(_dataset_section(dataset, limit) for dataset in datasets)
    write_text(
        path,
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Dataset preview</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>Dataset preview</h1>"
        f"<p class=quiet>The pixels below are what the VAE encodes.</p>{body}</body></html>\n",
    )
