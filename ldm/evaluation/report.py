"""Reports: one HTML page that needs no network, panels of curves, sheets of images."""

import base64
import csv
import html
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from einops import rearrange
from torch import Tensor

from ldm.errors import UserError

Points = Sequence[tuple[float, float]]
_FEW = 10  # places on an axis that each have room for a tick
_MANY = 30  # points of a line without marks
_WIDE = 8  # from this ratio of largest to smallest on, an axis of positive values is logarithmic
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: left; }
img { max-width: 100%; image-rendering: pixelated; } code { background: #f3f3f3; padding: 0 .2rem; }
"""


@dataclass(frozen=True)
class Section:
    """A heading of a report with text, lines, an optional table (first row = header) and images (PNG files)."""

    title: str
    text: str = ""
    table: Sequence[Sequence[str]] = ()
    images: Sequence[Path] = ()
    lines: Sequence[str] = ()

    def items(self) -> list[str]:
        """Return the lines."""
        return list(self.lines)

    def plain(self) -> str:
        """Return the section as a terminal shows it; of images it names the files."""
        widths = [max(map(len, column)) for column in zip(*self.table, strict=True)]
        rows = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in self.table]
        paragraphs = [" ".join(paragraph.split()) for paragraph in self.text.split("\n\n") if paragraph]
        inside = [*paragraphs, *self.items(), *rows, *(f"see {image}" for image in self.images)]
        return "\n".join([self.title, *(f"  {line}" for line in inside)])

    def html(self) -> str:
        """Return the section as HTML; images are embedded."""
        parts = [f"<h2>{html.escape(self.title)}</h2>"]
        parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in self.text.split("\n\n") if paragraph]
        if items := self.items():
            parts.append("<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>")
        if self.table:
            parts.append("<table>" + "".join(map(_table_row, self.table, _cell_tags(len(self.table)))) + "</table>")
        parts += [f'<p><img src="data:image/png;base64,{_base64(image)}" alt=""></p>' for image in self.images]
        return "\n".join(parts)


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write `sections` as one self-contained HTML page."""
    body = "\n".join(section.html() for section in sections)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = f"<h1>{html.escape(title)}</h1>\n{body}"
    path.write_text(f"<!doctype html><html><head>{head}</head><body>{body}</body></html>", encoding="utf-8")


def read_curve(metrics: Path, column: str) -> list[tuple[float, float]]:
    """Return the points (step, value) of one column of `metrics.csv`; rows where it is empty are left out."""
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or column not in rows[0]:
        raise UserError(f"{metrics}: no column {column!r}; it has {', '.join(rows[0]) if rows else 'no rows'}")
    return [(float(row["step"]), float(row[column])) for row in rows if row[column]]


@dataclass(frozen=True)
class Panel:
    """Axes named x and y with a line for each label, through its points in the order given.

    bars: half the lengths of the intervals around these points, for the labels that have some.
    """

    x: str
    y: str
    lines: Mapping[str, Points]
    title: str = ""
    bars: Mapping[str, Sequence[float]] = field(default_factory=dict)


def plot_panels(panels: Sequence[Panel], path: Path, columns: int = 2) -> None:
    """Plot panels in rows; the same label has the same colour in all, and what y names the same scale."""
    plt = pyplot()
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    labels = list(dict.fromkeys(label for panel in panels for label in panel.lines))
    colours = {label: plt.get_cmap("viridis")(i / max(len(labels) - 1, 1) * 0.9) for i, label in enumerate(labels)}
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.6 * rows), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):  # the last row may have empty places
        for label, points in panel.lines.items():
            marker = "o" if len(points) < _MANY else None
            style = {"marker": marker, "markersize": 4, "capsize": 2, "elinewidth": 1, "color": colours[label]}
            axis.errorbar(*zip(*points, strict=True), yerr=panel.bars.get(label), label=label, **style)
        axis.set(xlabel=panel.x, ylabel=panel.y, title=panel.title)
        places = sorted({x for points in panel.lines.values() for x, _ in points})
        if _is_wide(places):
            axis.set_xscale("log")
            if len(places) <= _FEW:  # the ticks that a logarithmic axis chooses for itself run into each other
                axis.set_xticks(places, [f"{place:g}" for place in places])
                axis.minorticks_off()
        heights = [y for one in panels if one.y == panel.y for points in one.lines.values() for _, y in points]
        axis.set(yscale="log" if _is_wide(heights) else "linear", ylim=_limits(heights))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _is_wide(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) >= _WIDE


def _limits(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the ends of an axis around values, however long the bars of their intervals are."""
    if not values:
        return None
    low, high = min(values), max(values)
    if _is_wide(values):
        return low / 1.3, high * 1.3
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def image_sheet(images: Tensor, titles: Sequence[str], path: Path, columns: int) -> None:
    """Draw images (N, 3, H, W) in [-1, 1] in rows, each below its title."""
    plt = pyplot()
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.2 * columns, 2.7 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):  # the last row may have empty places
        axis.imshow(rearrange((image + 1) / 2, "c h w -> h w c").clamp(0, 1).numpy(), interpolation="nearest")
        axis.set_title(textwrap.fill(title, 26), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def pyplot() -> ModuleType:
    """Import matplotlib, which only reports need. UserError says how to install it."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise UserError("images of a report need matplotlib: pip install 'latent-diffusion[demo]'") from error
    return plt


def _table_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"


def _cell_tags(num_rows: int) -> list[str]:
    return ["th"] + ["td"] * (num_rows - 1)


def _base64(image: Path) -> str:
    return base64.b64encode(image.read_bytes()).decode()
