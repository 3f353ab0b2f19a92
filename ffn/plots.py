"""Figures: learning curves, confusion matrix, per-class recall, the table of results.

Every function returns a matplotlib `Figure` of its own; no global plotting state is touched.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ffn.report import Cells
from ffn.scores import Metrics

BLUE, ORANGE, INK, GRID = "#2563a8", "#c9631b", "#333333", "#d9d9d9"


def learning_curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Training loss, accuracy and learning rate over epochs; `history` as `checkpoint.read_history` gives it."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    epochs = [record["epoch"] for record in history]
    parts = (("loss", "training loss", 1), ("top1", "training accuracy, %", 100), ("lr", "learning rate", 1))
    for axes, (name, title, factor) in zip(figure.subplots(1, 3), parts, strict=True):
        axes.plot(epochs, [factor * record[name] for record in history], color=BLUE, marker="o", markersize=3)
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("epoch")
        axes.set_ylim(bottom=0, top=102 if name == "top1" else None)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _tidy(axes)
        axes.grid(axis="y", color=GRID, linewidth=0.6)
    return figure


def confusion_matrix(metrics: Metrics, classes: Sequence[str]) -> Figure:
    """Share of each class's samples (row) by predicted class (column), %; numbers where the classes are few."""
    count = len(classes)
    share = 100 * metrics.confusion / np.maximum(metrics.confusion.sum(1, keepdims=True), 1)
    size = min(4 + 0.32 * count, 22)
    figure = Figure(figsize=(size + 1.2, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    small = 9 if count <= 30 else 5
    axes.set_xticks(range(count), classes, rotation=90, fontsize=small)
    axes.set_yticks(range(count), classes, fontsize=small)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(
        f"top1 {100 * metrics.top1:.1f} %   mean class {100 * metrics.top1_mean_class:.1f} %", loc="left", fontsize=10, color=INK
    )
    if count <= 30:
        for row, column in zip(*np.nonzero(metrics.confusion), strict=True):
            color = "white" if share[row, column] > 55 else INK
            axes.text(column, row, f"{share[row, column]:.0f}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.8)
    return figure


def per_class(metrics: Metrics, classes: Sequence[str]) -> Figure:
    """Recall of every class that has samples, worst first, with the class it is taken for most often."""
    rows = sorted((row for row in metrics.per_class if row.samples), key=lambda row: (row.recall, row.name))
    figure = Figure(figsize=(9, 1.2 + 0.26 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [100 * row.recall for row in rows], color=BLUE, height=0.7)
    for place, row in zip(places, rows, strict=True):
        text = f"{100 * row.recall:.0f}" + (f"  taken for {row.mistaken_for}" if row.mistaken_for else "")
        axes.text(100 * row.recall + 1, place, text, va="center", fontsize=8, color=INK)
    axes.set_yticks(places, [f"{row.name} ({row.samples})" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 140)
    axes.set_xticks(range(0, 101, 20))
    axes.set_title(f"recall, % (samples); {len(classes)} classes", loc="left", fontsize=10, color=INK)
    _tidy(axes)
    return figure


def results_table(rows: Mapping[str, Mapping[str, float]]) -> Figure:
    """Top-1 per protocol (group) and stream or fusion (bar); `rows` is protocol -> {stream or fusion: fraction}."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    figure = Figure(figsize=(2.5 + 1.9 * len(rows), 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(len(columns), 1)
    for place, name in enumerate(columns):
        fused = name.endswith("s")
        x = np.arange(len(rows)) + (place - (len(columns) - 1) / 2) * width
        values = [100 * row.get(name, np.nan) for row in rows.values()]
        axes.bar(x, values, width * 0.9, color=ORANGE if fused else BLUE, alpha=0.55 if name == "2s" else 1)
        for left, value in zip(x, values, strict=True):
            if np.isfinite(value):
                axes.text(left, value + 0.8, f"{value:.0f}", ha="center", fontsize=8, color=INK)
                axes.text(left, 1.5, name, ha="center", fontsize=8, color="white")
    axes.set_xticks(range(len(rows)), list(rows))
    axes.set_ylim(0, 107)
    axes.set_yticks(range(0, 101, 20))
    axes.set_title("held-out top-1, %: single streams (blue) and fusions (orange)", loc="left", fontsize=10, color=INK)
    _tidy(axes)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    return figure


def comparison(cells: Cells) -> Figure:
    """Presets beside one another, a panel per protocol: every seed a dot, their mean and standard deviation, the paper's figure.

    Of each protocol the widest fusion or last stream that all its presets have.
    """
    presets = max(len(rows) for rows in cells.values())
    figure = Figure(figsize=(1.6 + len(cells) * (1.2 + 0.75 * presets), 4), layout="constrained")
    for axes, (protocol, rows) in zip(figure.subplots(1, len(cells), squeeze=False)[0], cells.items(), strict=True):
        shared = [column for column in next(iter(rows.values())) if all(column in row for row in rows.values())]
        for place, row in enumerate(rows.values()):
            if not shared:
                continue
            cell = row[shared[-1]]
            seeds = np.array(cell.values) * 100
            axes.plot(np.full(len(seeds), place), seeds, "o", color=BLUE, alpha=0.45, markersize=5, zorder=3)
            axes.errorbar(
                [place + 0.15], [100 * cell.mean], yerr=[100 * (cell.spread or 0)],
                fmt="_", color=INK, capsize=4, markersize=12, zorder=4,
            )  # fmt: skip
            axes.text(place + 0.15, 100 * cell.mean, f"  {100 * cell.mean:.1f}", va="center", fontsize=8, color=INK)
            if cell.paper is not None:
                axes.plot(
                    [place], [100 * cell.paper], "D", mfc="none", color=ORANGE, markersize=7, label=f"paper, {cell.paper_space}"
                )
        axes.set_xticks(range(len(rows)), list(rows), rotation=30 if max(map(len, rows)) > 5 else 0)
        axes.set_xlim(-0.5, len(rows) - 0.2)
        axes.set_title(f"{protocol}: {shared[-1] if shared else 'nothing in common'}, top1 %", loc="left", fontsize=10, color=INK)
        _tidy(axes)
        axes.grid(axis="y", color=GRID, linewidth=0.6)
    labelled = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if labelled:
        figure.legend(labelled.values(), labelled.keys(), loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    return figure


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3, color=GRID)
