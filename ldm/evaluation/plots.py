"""Plots of studies: panels of labelled lines of points, as PNG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.evaluation.report import pyplot

Points = Sequence[tuple[float, float]]
_WIDE = 8  # from this ratio of largest to smallest on, an axis of positive values is logarithmic


@dataclass(frozen=True)
class Panel:
    """One pair of axes with a line for each label; points of a line are joined in the order given."""

    x: str
    y: str
    lines: Mapping[str, Points]


def plot_panels(panels: Sequence[Panel], path: Path, columns: int = 2) -> None:
    """Draw panels in rows; the same label has the same colour everywhere."""
    plt = pyplot()
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    labels = list(dict.fromkeys(label for panel in panels for label in panel.lines))
    colours = {label: plt.get_cmap("viridis")(i / max(len(labels) - 1, 1) * 0.9) for i, label in enumerate(labels)}
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.6 * rows), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):  # the last row may have empty places
        for label, points in panel.lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label, color=colours[label])
        axis.set(xlabel=panel.x, ylabel=panel.y)
        values = [point for points in panel.lines.values() for point in points]
        axis.set_xscale("log" if _is_wide([x for x, _ in values]) else "linear")
        axis.set_yscale("log" if _is_wide([y for _, y in values]) else "linear")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _is_wide(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) >= _WIDE
