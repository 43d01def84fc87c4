import io
import xml.etree.ElementTree as ET

import matplotlib as mpl
import pytest
from PIL import Image

from relabel_datasets.analysis import Analysis, Table
from relabel_datasets.report.plots import plot, save_plots, to_bytes

IOU = [(i / 10, (i + 1) / 10) for i in range(10)]
OVERLAPS = ("largest", "best", "union", "enclosing")


@pytest.fixture
def analysis():
    shares = {f"share above IoU 0.5, {name}": (0.25 + i / 100) for i, name in enumerate(OVERLAPS)}
    confused = [("n01440764", "n03000684", 7), ("a $5 bill", "one of $10", 2), ("n02012849", "<b>&amp;</b>" * 5, 1)]
    tables = {
        "overlap": Table(("iou_from", "iou_to", *OVERLAPS), [(*bounds, 1, 2, 3, 4) for bounds in IOU]),
        "by_overlap": Table(
            ("iou_from", "iou_to", "crops", "confidence", "agreement"),
            [(*bounds, 9, 0.9, 0.8) for bounds in IOU[:9]] + [(*IOU[9], 0, float("nan"), float("nan"))],
        ),
        "num_classes": Table(("classes", "images_shown", "crops_share_0.1"), [(0, 0, 0.1), (1, 0.7, 0.9), (2, 0.3, 0)]),
        "confused": Table(("label", "best", "images"), confused),
        "calibration": Table(("area_share", "gain"), [(0.08, 0.6), (0.2, 1.0), (1.0, 1.9)]),
        "suspects": Table(("key", "label", "suggestion", "margin"), []),
    }
    return Analysis({"crops and objects": shares}, tables)


def _texts(data):
    return [" ".join(element.itertext()) for element in ET.fromstring(data).iter() if element.tag.endswith("}text")]


def test_each_table_with_rows_is_plotted(analysis):
    assert list(plot(analysis)) == ["overlap", "by_overlap", "num_classes", "confused", "calibration"]
    empty = Analysis({}, {"confused": Table(("label", "best", "images"), [])})
    assert plot(empty) == {}


def test_files_are_reproducible_and_independent_of_the_users_style(analysis, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    paths = save_plots(analysis, first)
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black", "svg.fonttype": "path"}):
        again = save_plots(analysis, second)
    assert [path.name for path in paths] == [path.name for path in again]
    assert {path.suffix for path in paths} == {".png", ".svg"}
    assert len(paths) == 10
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    assert sorted(first.iterdir()) == sorted(paths)


def test_svg_text_is_kept_as_text(analysis):
    texts = {name: _texts(to_bytes(figure, "svg")) for name, figure in plot(analysis).items()}
    assert "largest box: 25.0% above 0.5" in texts["overlap"]
    assert "box around all: 28.0% above 0.5" in texts["overlap"]
    assert {"mean confidence", "agrees with the original label"} <= set(texts["by_overlap"])
    assert {"shown by an image", "of at least 0.1 in the label of a crop"} <= set(texts["num_classes"])


def test_class_names_are_legible_and_literal(analysis):
    texts = _texts(to_bytes(plot(analysis)["confused"], "svg"))
    assert "tench → chain saw" in texts
    assert "a $5 bill → one of $10" in texts  # not parsed as a formula
    assert any(text.startswith("crane → <b>&amp;</b><b>") and text.endswith("…") for text in texts)


def test_plots_are_not_clipped(analysis):
    for name, figure in plot(analysis).items():
        with Image.open(io.BytesIO(to_bytes(figure, "png"))) as image:
            gray = image.convert("L")
        edge = [gray.crop(box).getextrema()[0] for box in (
            (0, 0, gray.width, 1), (0, gray.height - 1, gray.width, gray.height),
            (0, 0, 1, gray.height), (gray.width - 1, 0, gray.width, gray.height),
        )]  # fmt: skip
        assert min(edge) == 255, name  # only background
