import numpy as np
import pytest
import torch
from PIL import Image

import relabel_datasets as rd
from relabel_datasets.report.overlay import draw_figure, draw_heatmap, save_overlays
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
    assert wider.width > drawn.width > 5 * 200
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
