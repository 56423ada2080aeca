"""Pictures of a dataset: histograms of its actions and lengths, frames of its trajectories."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from openvla_lightning.data.report.facts import Facts, spread
from openvla_lightning.data.report.motion import Dimension, movement
from openvla_lightning.data.source import Source

COLUMNS = 4
INSIDE, OUTSIDE, PLAIN, MARK = "#4c78a8", "#e45756", "#72b7b2", "#333333"
MOMENTS, TILE, CAPTION = 5, 128, 22


def draw_actions(facts: Facts, path: Path) -> Path:
    """Draw a histogram of every action dimension, with q01 and q99 where it is normalised."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    rows = -(-len(facts.dimensions) // COLUMNS)
    figure = Figure(figsize=(3.1 * COLUMNS, 2.3 * rows + 0.2), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes, dimension in zip(grid, facts.dimensions, strict=False):
        _draw_dimension(axes, dimension)
    for axes in grid[len(facts.dimensions) :]:
        axes.set_axis_off()
    return _save(figure, path)


def _draw_dimension(axes: Any, dimension: Dimension) -> None:
    inside = (dimension.edges[1:] >= dimension.q01) & (dimension.edges[:-1] <= dimension.q99)
    colours = np.where(inside, INSIDE, OUTSIDE).tolist() if dimension.normalised else PLAIN
    axes.bar(dimension.edges[:-1], dimension.counts, np.diff(dimension.edges), align="edge", color=colours)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.8)
    axes.minorticks_off()
    note = f"{dimension.outside:.1%} clipped" if dimension.normalised else "not normalised"
    if dimension.normalised:
        for quantile in (dimension.q01, dimension.q99):
            axes.axvline(quantile, color=MARK, linewidth=0.8, linestyle="--")
    axes.set_title("constant" if dimension.constant else note, loc="right", fontsize=8, color="#666666")
    axes.set_title(dimension.name, loc="left", fontsize=9, fontweight="bold")
    axes.tick_params(labelsize=7)
    axes.locator_params(axis="x", nbins=5)
    axes.spines[["top", "right"]].set_visible(False)


def draw_lengths(facts: Facts, path: Path) -> Path:
    """Draw histograms of the trajectories' lengths, and of how long the robot stands still in them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * COLUMNS, 2.5), layout="constrained")
    titles = {
        f"steps in a trajectory ({facts.trajectories:,})": facts.lengths[facts.lengths > 0],
        f"steps in a stretch that stands still ({len(facts.idle.runs):,})": facts.idle.runs,
    }
    for axes, (title, lengths) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        if len(lengths):
            low, high = int(lengths.min()), int(lengths.max())
            width = max(1, -(-(high - low + 1) // 40))
            axes.hist(lengths, np.arange(low, high + width + 1, width) - 0.5, color=INSIDE)
            axes.locator_params(integer=True)
        else:
            axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes, color="#666666")
            axes.set_xticks([], [])
            axes.set_yticks([], [])
        axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def draw_contact_sheet(source: Source, path: Path) -> Path:
    """Draw one row of frames for each of some trajectories: the first camera over time, then one frame per other
    camera.

    Each frame shows the gripper's value in the action, as a number and as a bar, and the length of the action, as a bar
    that is full for the longest action of these trajectories, to compare them with the picture.

    Raises:
        BadShardError: an image cannot be decoded.
    """
    cameras = [role for role, key in source.spec.cameras.items() if key is not None]
    chosen = spread(source.index)
    columns = MOMENTS + len(cameras[1:])
    sheet = Image.new("RGB", (columns * TILE, len(chosen) * (TILE + CAPTION)), "white")
    draw, font = ImageDraw.Draw(sheet), _font(13)
    dim = source.index.action.shape[1]
    absolute, facts = np.array(source.spec.absolute_mask(dim)), source.statistics.action
    gripper = next(iter(source.spec.grippers(dim)), dim - 1)
    low, high = (float(facts[name][gripper]) for name in ("min", "max"))
    others = np.array(facts["std"]) * ~np.isin(np.arange(dim), [gripper, *source.spec.grippers(dim)])
    bounds = [source.index.bounds[one : one + 2].tolist() for one in chosen]
    moved = [movement(source.index.action[start:end], absolute, others) for start, end in bounds]
    farthest = max((float(one.max()) for one in moved if len(one)), default=0.0) or 1.0
    for row, trajectory in enumerate(chosen):
        start, end = bounds[row]
        moments = np.linspace(start, end - 1, MOMENTS).round().astype(int).tolist()
        frames = [(role, step) for role in cameras[:1] for step in moments]
        frames += [(role, (start + end) // 2) for role in cameras[1:]]
        top = row * (TILE + CAPTION)
        draw.text((4, top + 3), _caption(source, trajectory, end - start, font, sheet.width - 8), "black", font)
        for column, (role, step) in enumerate(frames):
            pixels = source.image(role, step, TILE - 2)
            tile = Image.new("RGB", (TILE - 2, TILE - 2)) if pixels is None else Image.fromarray(pixels)
            held = float(source.index.action[step, gripper])
            _draw_bar(tile, 14, f"grip {held:.2f}", (held - low) / (high - low) if high > low else 1.0, OUTSIDE)
            _draw_bar(tile, 28, "move", float(moved[row][step - start]) / farthest, PLAIN)
            sheet.paste(tile, (column * TILE + 1, top + CAPTION + 1))
    sheet.save(path, quality=88)
    return path


def _draw_bar(tile: Image.Image, above: int, text: str, share: float, colour: str) -> None:
    """Write `text` into a frame, so many pixels above its lower end, beside a bar that is full where `share` is 1."""
    draw, top = ImageDraw.Draw(tile), tile.height - above
    draw.rectangle((0, top, tile.width, top + 14), "black")
    draw.rectangle((58, top + 4, 58 + max(1, round(share * (tile.width - 64))), top + 10), colour)
    draw.text((3, top), text, "white", _font(11))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font with the letters of most languages; Pillow's own font lacks umlauts."""
    from matplotlib import font_manager

    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def _caption(source: Source, trajectory: int, steps: int, font: Any, width: int) -> str:
    index = source.index
    told = [index.instructions[i] for i in index.instruction[index.bounds[trajectory] : index.bounds[trajectory + 1]]]
    words = next((text for text in told if text.strip()), "(no words)")
    text = f"{index.splits[index.split[trajectory]]} {trajectory}, {steps} steps: {' '.join(words.split())}"
    if font.getlength(text) <= width:
        return text
    while font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    return path
