import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import relabel_datasets as rd
from relabel_datasets.report import overlay
from relabel_datasets.report.overlay import contact_sheet, draw_figure, draw_heatmap, save_overlays
from relabel_datasets.report.tiles import CLASS_COLORS, GAP, INK, TILE, Line, draw_tag, legend, panel, tag_size
from tests.conftest import picture

NAMES = ("cat", "dog", "a class with a name that is far too long to be shown in a tile")


@pytest.fixture
def label_map():
    """A map of 4 x 6 locations: class 1 in the upper right one, class 0 elsewhere."""
    dense = torch.zeros(3, 4, 6)
    dense[0] = 8
    dense[:, 0, 5] = torch.tensor([0.0, 8, 0])
    return rd.LabelMap.from_logits(dense, canvas_size=(80, 120), label=0)


def test_a_heatmap_is_bright_where_the_class_is_probable(label_map):
    gray = Image.new("RGB", (120, 80), (128, 128, 128))
    brightness = np.asarray(draw_heatmap(gray, label_map, 1).convert("L"), float)
    assert brightness.shape == (80, 120)
    row, column = np.unravel_index(brightness.argmax(), brightness.shape)
    assert row < 20
    assert column >= 100
    inverse = np.asarray(draw_heatmap(gray, label_map, 0).convert("L"), float)
    assert inverse[:20, 100:].mean() < inverse[40:, :60].mean()


def test_strength_0_returns_the_image(label_map):
    image = picture(0, (80, 120))
    assert draw_heatmap(image, label_map, 1, strength=0).tobytes() == image.tobytes()


def test_a_figure_is_reproducible_and_does_not_change_its_inputs(label_map):
    image = picture(0, (80, 120))
    before, state = image.tobytes(), torch.get_rng_state()
    drawn = draw_figure(image, label_map, NAMES, num_heatmaps=2, num_crops=3)
    wider = draw_figure(image, label_map, NAMES, num_heatmaps=3, num_crops=3)
    assert wider.width > drawn.width > 4 * TILE
    assert image.tobytes() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn.tobytes() == draw_figure(image, label_map, NAMES, num_heatmaps=2, num_crops=3).tobytes()


def test_save_overlays_names_files_after_keys(dataset_folder, tmp_path):
    dataset = rd.load_dataset(dataset_folder, "colours", "train")
    paths = save_overlays(dataset, tmp_path / "figures", count=4)
    assert len(paths) == 4
    assert {path.stem for path in paths} <= set(dataset.keys)
    for path in paths:
        with Image.open(path) as drawn:
            assert drawn.width > 500
    with pytest.raises(ValueError, match="without transforms"):
        save_overlays(rd.load_dataset(dataset_folder, "colours", "train", transforms=rd.LabelPooling()), tmp_path)


def test_save_overlays_writes_a_file_per_sample_also_where_case_is_ignored(dataset_folder, tmp_path, monkeypatch):
    dataset = rd.load_dataset(dataset_folder, "colours", "train")
    keys = ["a/b", "a_b", "A_B", "a_b_", "c"]
    figures = [(key, Image.new("RGB", (2, 2))) for key in keys]
    monkeypatch.setattr("relabel_datasets.report.overlay.draw_figures", lambda *_: figures)
    names = [path.name for path in save_overlays(dataset, tmp_path)]
    assert names == ["a_b.png", "a_b_.png", "A_B__.png", "a_b___.png", "c.png"]
    assert len({name.lower() for name in names}) == len(keys)


def pixels_of(picture, color):
    """Return whether each pixel has the color."""
    return (np.asarray(picture) == color).all(-1)


def test_the_box_of_a_crop_has_the_color_of_its_most_probable_class(label_map, monkeypatch):
    crops = [(10, 10, 40, 40), (0, 100, 20, 20)]  # of class 0 in the middle, of class 1 in the corner
    monkeypatch.setattr(overlay, "_random_crops", lambda *_: crops)
    colors = {index: CLASS_COLORS[rank] for rank, (index, _) in enumerate(overlay.strongest_classes(label_map, 3))}
    gray = Image.new("RGB", (120, 80), (128, 128, 128))
    drawn = np.asarray(draw_figure(gray, label_map, NAMES))
    scale, heading = TILE / 120, 20
    for (top, left, height, width), color in zip(crops, (colors[0], colors[1]), strict=True):
        edge = drawn[GAP + heading + round(scale * (top + height)) - 3, GAP + round(scale * (left + width / 2))]
        assert edge.tolist() == list(color)
    bottom = drawn[GAP + heading + round(scale * 80) + 60 :]  # the row of the crops
    for number, color in enumerate((colors[0], colors[1])):
        frame = pixels_of(bottom[:, GAP + number * (TILE + GAP) :][:, :TILE], color)
        assert frame.any(0)[[1, TILE - 2]].all()  # both crops are squares: frames at the left and at the right
    assert colors[0] != colors[1]


def test_numbers_of_boxes_do_not_cover_each_other():
    boxes = [(10, 10, 100, 100), (12, 12, 90, 90), (10, 14, 95, 99), (14, 11, 99, 92)]
    taken = []
    for number, box in enumerate(boxes, 1):
        taken.append(overlay._free_corner(box, str(number), taken))
    width, height = tag_size("1")
    assert all(abs(a - c) > width or abs(b - d) > height for (a, b), (c, d) in itertools.combinations(taken, 2))
    assert overlay._free_corner(boxes[0], "5", taken) == (10, 10)  # no corner is free


def test_numbers_are_legible_on_every_color():
    for color in (*CLASS_COLORS, (128, 128, 128)):
        tag = Image.new("RGB", (40, 30))
        draw_tag(ImageDraw.Draw(tag), (0, 0), "8", color)
        inside = np.asarray(tag)[1:18, 1 : tag_size("8")[0]].reshape(-1, 3).astype(float)
        linear = np.where(inside <= 10.0, inside / 3294, ((inside / 255 + 0.055) / 1.055) ** 2.4)
        luminance = linear @ (0.2126, 0.7152, 0.0722)
        assert (luminance.max() + 0.05) / (luminance.min() + 0.05) > 3, color  # WCAG 2, graphical objects


def test_panels_have_headings_in_bold_letters():
    plain, bold = panel(picture(0), "", [Line("heading")]), panel(picture(0), "heading")
    caption, heading = np.asarray(plain)[-20:], np.asarray(bold)[:20]
    assert (heading < 100).sum() > (caption < 100).sum() > 0
    assert pixels_of(panel(picture(0), "", color=CLASS_COLORS[4]), CLASS_COLORS[4]).sum() > 3 * TILE


@pytest.mark.parametrize("width", [250, 500])
def test_the_legend_shows_every_class_in_its_color(width):
    names = [Line(f"class_{i}", color) for i, color in enumerate(CLASS_COLORS)]
    drawn = legend(names, width)
    assert drawn.width == width
    assert all(pixels_of(drawn, color).sum() >= 80 for color in CLASS_COLORS)
    assert legend(names[:1], width).height < drawn.height
    assert not pixels_of(legend(names[:1], width), CLASS_COLORS[1]).any()


def test_contact_sheets_name_their_figures(dataset_folder):
    dataset = rd.load_dataset(dataset_folder, "colours", "train")
    one, two = (contact_sheet(dataset, count) for count in (1, 2))
    first = np.asarray(two)[: 20 + GAP]  # the row of the first key
    assert (first == INK).all(-1).any()
    assert two.height > 1.5 * one.height
