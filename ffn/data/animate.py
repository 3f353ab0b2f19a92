"""Recordings as pictures: a contact sheet or an animation, to look at before believing them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ffn.data.store import publishing
from ffn.errors import FFNError
from ffn.layouts import NTU25, Layout

_COLOURS = (("#1f6fb4", "#7db4dd"), ("#c4481c", "#f0a27c"))
"""Per person: the left half and the trunk, the right half."""


def _check(name: str, clip: NDArray[Any], layout: Layout) -> NDArray[Any]:
    if clip.ndim != 4 or clip.shape[2] != len(layout.joints) or clip.shape[3] < 2 or not clip.size:
        raise FFNError(f"{name}: keypoints {clip.shape}, expected (M, T, {len(layout.joints)}, 2 or 3) of layout {layout.name}")
    return clip


def _bones(layout: Layout) -> list[tuple[int, int, int]]:
    """(child, parent, 1 where the bone belongs to the right half)."""
    return [(v, p, int(layout.joints[v].startswith("right"))) for v, p in layout.edges]


def _draw(axes: Any, bodies: NDArray[Any], layout: Layout, shift: float = 0.0) -> None:
    """Draw bodies (M, V, C) from the front; a body that is all zero is absent."""
    for person, body in enumerate(bodies):
        if np.any(body):
            for v, p, half in _bones(layout):
                axes.plot(
                    body[[v, p], 0] + shift, body[[v, p], 1], color=_COLOURS[person % 2][half], lw=1.1, solid_capstyle="round"
                )


def _frame(axes: Any, clip: NDArray[Any], columns: int = 1, step: float = 0.0) -> None:
    """The same scale for the whole clip; image coordinates, whose values are large, run downwards."""
    shown = clip[np.any(clip != 0, axis=(2, 3))]
    low, high = (shown.reshape(-1, clip.shape[-1])[:, :2].min(0), shown.reshape(-1, clip.shape[-1])[:, :2].max(0))
    margin = 0.05 * (high - low).max()
    axes.set_xlim(low[0] - margin, high[0] + margin + step * (columns - 1))
    axes.set_ylim(low[1] - margin, high[1] + margin)
    if high[1] > 50:
        axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.axis("off")


def contact_sheet(clips: Mapping[str, NDArray[Any]], path: Path | str, *, layout: Layout = NTU25, poses: int = 8) -> Path:
    """Draw a row of `poses` evenly spaced frames for every named clip (M, T, V, 2 or 3) and write it as PNG.

    More than four clips stand in two columns. The right limbs are light. Raises `FFNError` where a clip does not fit the layout.
    """
    columns = 2 if len(clips) > 4 else 1
    figure = Figure(figsize=(0.62 * poses * columns, 1.25 * -(-len(clips) // columns)), dpi=80)
    FigureCanvasAgg(figure)
    grid = figure.subplots(-(-len(clips) // columns), columns, squeeze=False).ravel()
    for axes in grid[len(clips) :]:
        axes.axis("off")
    for axes, (name, clip) in zip(grid, clips.items(), strict=False):
        shown = _check(name, clip, layout)
        extent = np.ptp(shown[np.any(shown != 0, axis=-1)], axis=0)
        step = 1.05 * max(extent[0], 0.45 * extent[1])
        for column, t in enumerate(np.linspace(0, shown.shape[1] - 1, poses).round().astype(int)):
            _draw(axes, shown[:, t], layout, column * step)
        _frame(axes, shown, poses, step)
        axes.set_title(name, fontsize=7, loc="left", pad=1)
    figure.tight_layout(pad=0.3)
    with publishing(Path(path)) as partial:
        figure.savefig(partial, format="png")
    return Path(path)


def animation(clip: NDArray[Any], path: Path | str, *, layout: Layout = NTU25, fps: int = 15) -> Path:
    """Write a clip (M, T, V, 2 or 3), recorded at 30 frames per second, as an animated GIF of every second frame.

    Raises `FFNError` where the clip does not fit the layout.
    """
    shown = _check(str(path), clip, layout)[:, ::2]
    figure = Figure(figsize=(3.2, 3.2), dpi=80)
    FigureCanvasAgg(figure)
    axes = figure.subplots()

    def draw(t: int) -> list[Any]:
        axes.clear()
        _draw(axes, shown[:, t], layout)
        _frame(axes, shown)
        return []

    moving = FuncAnimation(figure, draw, frames=shown.shape[1])
    with publishing(Path(path)) as partial:
        moving.save(partial, writer=PillowWriter(fps=fps))
    return Path(path)
