"""Plot an analysis with matplotlib, as PNG or SVG, in colors that are distinct in grayscale and for the colorblind."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..analysis.analysis import Analysis, Table
from ..extras import check_extra
from ..storage.local import write_atomically
from .names import legible_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design", 2008.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_MARKERS = "osD^"
_SIZE = (5.2, 3.4)  # inches
_MAX_PAIRS = 12
FORMATS = ("png", "svg")


def plot(analysis: Analysis) -> dict[str, Figure]:
    """Plot the tables of an analysis.

    Args:
        analysis: Result of `analyze`.

    Returns:
        The figures by name, one for each of the tables `overlap`, `by_overlap`, `num_classes`, `confused` and `calibration`
        that has rows.

    Raises:
        MissingExtraError: (an ImportError) matplotlib is not installed.
    """
    check_extra("plots", "plotting")
    from matplotlib.figure import Figure  # slow to import

    figures = {}
    for name, draw in (
        ("overlap", _overlap),
        ("by_overlap", _by_overlap),
        ("num_classes", _num_classes),
        ("confused", _confused),
        ("calibration", _calibration),
    ):
        if name in analysis.tables and analysis.tables[name].rows:
            with _style():
                figures[name] = Figure(figsize=_SIZE, layout="constrained")
                axes = figures[name].subplots()
                draw(axes, analysis.tables[name], analysis)
                axes.spines[["top", "right"]].set_visible(False)
    return figures


def to_bytes(figure: Figure, file_format: str) -> bytes:
    """Return a figure as a file in the format "png" or "svg". The bytes are the same on every run."""
    data = io.BytesIO()
    with _style():
        figure.savefig(
            data, format=file_format, dpi=120, metadata={"svg": {"Date": None}, "png": {"Software": None}}[file_format]
        )
    return data.getvalue()


def save_plots(analysis: Analysis, folder: Path) -> list[Path]:
    """Write the plots of an analysis as `<name>.png` and `<name>.svg`, see `plot`.

    Args:
        analysis: Result of `analyze`.
        folder: Existing folder for the files.

    Returns:
        The paths of the files.

    Raises:
        MissingExtraError: (an ImportError) matplotlib is not installed.
    """
    paths = []
    for name, figure in plot(analysis).items():
        for file_format in FORMATS:
            paths.append(folder / f"{name}.{file_format}")
            write_atomically(paths[-1], to_bytes(figure, file_format))
    return paths


@contextmanager
def _style() -> Iterator[None]:
    """Draw with fixed settings, independent of the user's matplotlib configuration."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams["font.size"] = 9
        mpl.rcParams["text.parse_math"] = False  # class names may contain $
        mpl.rcParams["svg.hashsalt"] = "relabel_datasets"  # otherwise, SVG ids are random
        mpl.rcParams["svg.fonttype"] = "none"  # text stays text
        yield


def _column(table: Table, name: str) -> list[Any]:
    position = table.columns.index(name)
    return [row[position] for row in table.rows]


def _overlap(axes: Axes, table: Table, analysis: Analysis) -> None:
    numbers = analysis.summary["crops and objects"]
    middles = _middles(table)
    labels = {
        "largest": "largest box",
        "best": "best box",
        "union": "union of all boxes",
        "enclosing": "box around all",
    }
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
    positions = range(len(counts))
    threshold = table.columns[2].rpartition("_")[2]
    for shift, name, label, color in (
        (-0.2, table.columns[1], "shown by an image", _COLORS[0]),
        (0.2, table.columns[2], f"of at least {threshold} in the label of a crop", _COLORS[1]),
    ):
        shares = [100 * value for value in _column(table, name)]
        axes.bar([position + shift for position in positions], shares, 0.4, color=color, label=label)
    axes.set_xticks(list(positions), counts)
    axes.set(xlabel="classes", ylabel="images or crops, %")
    axes.legend(frameon=False)


def _confused(axes: Axes, table: Table, analysis: Analysis) -> None:
    from matplotlib.ticker import MaxNLocator  # slow to import

    rows = list(table.rows[:_MAX_PAIRS])[::-1]
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
    axes.set_title("label → class that is ranked first", x=0)


def _calibration(axes: Axes, table: Table, analysis: Analysis) -> None:
    shares = [100 * share for share in _column(table, "area_share")]
    names = table.columns[1:]
    for name, color, marker in zip(names, cycle(_COLORS), cycle(_MARKERS)):
        size = name.removeprefix("gain_")
        axes.plot(shares, _column(table, name), color=color, marker=marker, markersize=4, label=f"{size} map")
    if len(names) > 1:
        axes.legend(frameon=False)
    axes.axhline(1, color="0.7", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{share:.0f}" for share in shares])
    axes.minorticks_off()
    axes.set(xlabel="share of the image area that a crop shows, %", ylabel="gain of pooled logits", ylim=(0, None))


def _short(name: str, max_length: int = 24) -> str:
    return name if len(name) <= max_length else f"{name[: max_length - 1]}…"


def _middles(table: Table) -> list[float]:
    return [
        (low + high) / 2 for low, high in zip(_column(table, "iou_from"), _column(table, "iou_to"), strict=True)
    ]  # fmt: skip
