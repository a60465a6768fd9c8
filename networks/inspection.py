"""Rank, alpha and norm of every block of a LoRA, as a table and as a picture."""

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from networks.factors import Factors
from networks.files.formats import LoraWeights
from utils.files import atomic_path

# Of the picture, in pixels: the size of a cell, and the width of the names on the left.
CELL, MARGIN = 18, 170


def block_and_kind(name: str) -> tuple[str, str]:
    """(`double 3`, `img_attn_qkv`) of `double_blocks.3.img_attn_qkv`; (`elsewhere`, name) outside the blocks."""
    found = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", name)
    return (f"{found[1]} {int(found[2])}", found[3]) if found else ("elsewhere", name)


def _order(block: str) -> tuple[int, int]:
    """Sorts blocks: double blocks, single blocks, modules elsewhere."""
    kind, _, number = block.partition(" ")
    return ("double", "single", "elsewhere").index(kind), int(number or 0)


def by_block(lora: LoraWeights) -> dict[str, dict[str, Factors]]:
    """Block -> kind of module -> factors; blocks in the order of the model."""
    grouped: dict[str, dict[str, Factors]] = {}
    for name, factors in lora.modules.items():
        block, kind = block_and_kind(name)
        grouped.setdefault(block, {})[kind] = factors
    return {block: grouped[block] for block in sorted(grouped, key=_order)}


def block_table(lora: LoraWeights) -> list[tuple[str, ...]]:
    """One row per block: number of modules, ranks, alphas, norm of all updates, module with the largest norm."""
    rows = []
    for block, modules in by_block(lora).items():
        norms = {kind: factors.norm() for kind, factors in modules.items()}
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        largest = max(norms, key=norms.get)
        ranks = _values([factors.rank for factors in modules.values()])
        alphas = _values([factors.rank if factors.alpha is None else factors.alpha for factors in modules.values()])
        rows.append((block, str(len(modules)), ranks, alphas, f"{total:.4g}", f"{largest} ({norms[largest]:.4g})"))
    return rows


def _values(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(set(values)))


def draw_norms(lora: LoraWeights, path: str | Path) -> None:
    """Draws a PNG with a row per kind of module and a column per block; brighter means a larger norm."""
    grouped = by_block(lora)
    kinds = list(dict.fromkeys(kind for modules in grouped.values() for kind in modules))
    norms = {(block, kind): f.norm() for block, modules in grouped.items() for kind, f in modules.items()}
    largest = max(norms.values()) or 1.0
    image = Image.new("RGB", (MARGIN + CELL * (len(grouped) + 3), CELL * (len(kinds) + 4)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((6, 4), f"norm of the weight update, 0 (black) to {largest:.4g} (yellow)", fill="black")
    group = ""
    for column, block in enumerate(grouped):
        x = MARGIN + CELL * column
        previous, (group, _, number) = group, block.partition(" ")
        draw.text((x + 3, CELL), group if group != previous else "", fill="black")
        draw.text((x + 3, 2 * CELL), number, fill="black")
        for row, kind in enumerate(kinds):
            share = norms.get((block, kind))
            colour = (235, 235, 235) if share is None else _colour(share / largest)
            y = CELL * (row + 3)
            draw.rectangle((x, y, x + CELL - 2, y + CELL - 2), fill=colour)
    for row, kind in enumerate(kinds):
        draw.text((6, CELL * (row + 3) + 3), kind[-26:], fill="black")
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")


def _colour(share: float) -> tuple[int, int, int]:
    """A colour for 0 to 1: black, red, yellow."""
    return (min(255, int(share * 510)), max(0, int(share * 510) - 255), 0)
