"""Plots of an analysis, as matplotlib figures: PNG or SVG, legible in grey and for the colour-blind."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..analysis.analysis import Analysis, Table
from ..storage.local import write_atomically
from .names import legible_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design", 2008.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_MARKERS = "osD^"
_SIZE = (5.2, 3.4)  # inches
_MOST_PAIRS = 12
FORMATS = ("png", "svg")


def plot(analysis: Analysis) -> dict[str, Figure]:
    """Return the plots that the tables of an analysis allow, by name."""
    from matplotlib.figure import Figure  # slow to import

    figures = {}
    for name, table, draw in (
        ("overlap", "overlap", _overlap),
        ("by_overlap", "by_overlap", _by_overlap),
        ("num_classes", "num_classes", _num_classes),
        ("confused", "confused", _confused),
    ):
        if table in analysis.tables and analysis.tables[table].rows:
            with _style():
                figures[name] = Figure(figsize=_SIZE, layout="constrained")
                axes = figures[name].subplots()
                draw(axes, analysis.tables[table], analysis)
                axes.spines[["top", "right"]].set_visible(False)
    return figures


def to_bytes(figure: Figure, kind: str) -> bytes:
    """Return a figure as a file of kind "png" or "svg", the same on every run."""
    data = io.BytesIO()
    with _style():
        figure.savefig(data, format=kind, dpi=120, metadata={"svg": {"Date": None}, "png": {"Software": None}}[kind])
    return data.getvalue()


def save_plots(analysis: Analysis, folder: Path) -> list[Path]:
    """Write the plots of an analysis as `<name>.png` and `<name>.svg`; return their paths."""
    paths = []
    for name, figure in plot(analysis).items():
        for kind in FORMATS:
            paths.append(folder / f"{name}.{kind}")
            write_atomically(paths[-1], to_bytes(figure, kind))
    return paths


@contextmanager
def _style() -> Iterator[None]:
    """Draw with settings of our own, whatever those of the user are."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams["font.size"] = 9
        mpl.rcParams["text.parse_math"] = False  # names of classes may have a $
        mpl.rcParams["svg.hashsalt"] = "relabel_datasets"  # names in SVG are else new on every run
        mpl.rcParams["svg.fonttype"] = "none"  # text stays text
        yield


def _column(table: Table, name: str) -> list[Any]:
    place = table.columns.index(name)
    return [row[place] for row in table.rows]


def _overlap(axes: Axes, table: Table, analysis: Analysis) -> None:
    numbers = analysis.summary["crops and objects"]
    middles = _middles(table)
    labels = {"largest": "largest box", "best": "best box", "union": "region of all", "enclosing": "box around all"}
    for (name, label), marker, color in zip(labels.items(), _MARKERS, _COLORS, strict=True):
        counts = _column(table, name)
        above = numbers[f"share above IoU 0.5, {name}"]
        shares = [100 * count / sum(counts) for count in counts]
        axes.plot(middles, shares, color=color, marker=marker, markersize=4, label=f"{label}: {above:.1%} above 0.5")
    axes.axvline(0.5, color="0.6", linewidth=1, linestyle=":")
    axes.set(xlabel="IoU of random crops and objects", ylabel="crops, %", xlim=(0, 1), ylim=(0, None))
    axes.legend(loc="lower left", edgecolor="none", framealpha=1)


def _by_overlap(axes: Axes, table: Table, analysis: Analysis) -> None:
    middles = _middles(table)
    labels = {"confidence": "mean confidence", "agreement": "agrees with the original label"}
    for (name, label), marker, color in zip(labels.items(), _MARKERS[:2], _COLORS[:2], strict=True):
        shares = [100 * value for value in _column(table, name)]
        axes.plot(middles, shares, color=color, marker=marker, markersize=4, label=label)
    axes.set(xlabel="IoU of random crops and objects", ylabel="%", xlim=(0, 1))
    axes.legend(frameon=False)


def _num_classes(axes: Axes, table: Table, analysis: Analysis) -> None:
    counts = [str(count) for count in _column(table, "classes")]
    places = range(len(counts))
    for shift, name, label, color in (
        (-0.2, table.columns[1], "images, confident somewhere", _COLORS[0]),
        (0.2, table.columns[2], "crops, share of the label", _COLORS[1]),
    ):
        shares = [100 * value for value in _column(table, name)]
        least = name.rpartition("_")[2]
        axes.bar([place + shift for place in places], shares, 0.4, color=color, label=f"{label} (at least {least})")
    axes.set_xticks(list(places), counts)
    axes.set(xlabel="classes", ylabel="%")
    axes.legend(frameon=False)


def _confused(axes: Axes, table: Table, analysis: Analysis) -> None:
    from matplotlib.ticker import MaxNLocator  # slow to import

    rows = list(table.rows[:_MOST_PAIRS])[::-1]
    classes = sorted({name for label, best, _ in rows for name in (label, best)})
    names = dict(zip(classes, map(_short, legible_names(classes)), strict=True))
    axes.barh(
        range(len(rows)),
        [count for *_, count in rows],
        color=_COLORS[0],
        tick_label=[f"{names[label]} → {names[best]}" for label, best, _ in rows],
    )
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set(xlabel="images")
    axes.set_title("label → class that the map ranks first", x=0)


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _middles(table: Table) -> list[float]:
    return [
        (low + high) / 2 for low, high in zip(_column(table, "iou_from"), _column(table, "iou_to"), strict=True)
    ]  # fmt: skip
