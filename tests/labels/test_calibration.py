import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

import relabel_datasets as rd
from relabel_datasets.labels import Calibration, View
from relabel_datasets.labels.calibration import covered_shares
from relabel_datasets.labels.view import to_rows
from tests.labels.paths import collated, in_a_pipeline, in_batches, one_by_one
from tests.labels.samples import CANVAS_SIZE, ENCODINGS, GAINS, random_map, set_calibration

OTHER_GAINS = Calibration((0.1, 1.0), ((2.0, 2.0),), num_crops=8, kl_before=1.0, kl_after=0.5)
HEIGHT, WIDTH = CANVAS_SIZE
VIEWS = {
    "whole": lambda one: one,
    "crop": lambda one: F.crop(one, 3, 2, 8, 5),
    "small crop": lambda one: F.crop(one, 3, 2, 3, 2),
    "flipped crop": lambda one: F.vertical_flip(F.horizontal_flip(F.crop(one, 3, 2, 8, 5))),
    "partly outside": lambda one: F.crop(one, -4, -3, 12, 9),
    "padded": lambda one: F.pad(one, [3, 5, 7, 1]),
    "outside": lambda one: F.crop(one, 40, 40, 5, 5),
    "translated after a crop": lambda one: F.affine(F.crop(one, 3, 2, 8, 5), 0, [2, 3], 1, [0]),
    "rotated": lambda one: F.rotate(one, 30),
    "crop of rotated": lambda one: F.crop(F.rotate(one, 70), 2, 2, 9, 7),
    "scaled down and sheared": lambda one: F.affine(one, 10, [1, 1], 0.5, [20, 5]),
}


def calibrated_map(encoding, calibration=GAINS):
    return rd.LabelMap.wrap(random_map(encoding).logits, like=random_map(encoding), calibration=calibration)


def share_by_points(view, cell=(0, 0), grid=(1, 1), points=400):
    """Return the share of the image that a cell covers, counted on points of the original image."""
    x, y = np.meshgrid(*[(np.arange(points) + 0.5) / points] * 2)
    matrix = np.array([[view.xx, view.xy], [view.yx, view.yy]])
    u, v = np.linalg.solve(matrix, np.stack([(x - view.x0).ravel(), (y - view.y0).ravel()]))
    left, top, right, bottom = view.visible_xyxy
    seen = (x.ravel() >= left) & (x.ravel() <= right) & (y.ravel() >= top) & (y.ravel() <= bottom)
    (row, column), (h, w) = cell, grid
    return float((seen & (u >= column / w) & (u < (column + 1) / w) & (v >= row / h) & (v < (row + 1) / h)).mean())


@pytest.mark.parametrize(
    ("share", "gain"),
    [(0.1, 0.5), (0.2, 1.0), (0.4, 1.5), (1.0, 3.0), (0.4 * 2.5**0.5, 2.25), (0.01, 0.5), (0.0, 0.5), (1.3, 3.0)],
)
def test_gains_are_linear_in_the_log_of_the_share_and_constant_outside_the_knots(share, gain):
    assert GAINS.gains_at([[share]]) == pytest.approx(gain)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
@pytest.mark.parametrize("change", VIEWS.values(), ids=VIEWS)
def test_a_cell_covers_the_visible_part_of_the_image_in_it(change, grid):
    view = change(random_map()).view
    (shares,) = covered_shares(to_rows([view]), grid)
    want = [share_by_points(view, (row, column), grid) for row in range(grid[0]) for column in range(grid[1])]
    assert shares == pytest.approx(want, abs=0.01)


@pytest.mark.parametrize("output_size", [1, (2, 3)])
@pytest.mark.parametrize("path", [one_by_one, collated])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_logits_of_each_cell_are_multiplied_by_its_gain(encoding, path, output_size):
    maps = [
        change(calibrated_map(encoding, calibration))
        for calibration in (GAINS, OTHER_GAINS)
        for change in VIEWS.values()
    ]
    for temperature, weight in ((1.0, 0.0), (2.0, 0.3)):
        got = path(maps, rd.LabelPooling(output_size, temperature, label_weight=weight, calibrated=True))
        for label_map, label in zip(maps, got, strict=True):
            grid = (1, 1) if output_size == 1 else output_size
            shares = covered_shares(to_rows([label_map.view]), grid)[0]
            gains = torch.tensor(label_map.calibration.gains_at(shares)).reshape(1, *grid)
            plain = rd.LabelPooling(grid)(label_map).double()
            want = (1 - weight) * (plain.log() * gains / temperature).softmax(0)
            want[label_map.label] += weight
            torch.testing.assert_close(label.double().reshape(want.shape), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("path", [in_a_pipeline, in_batches])
def test_pipelines_pool_calibrated_labels(path):
    maps = [calibrated_map("heatmaps", calibration) for calibration in (GAINS, OTHER_GAINS, GAINS)]
    pooling = rd.LabelPooling(calibrated=True)
    torch.testing.assert_close(path(maps, pooling), one_by_one(maps, pooling), rtol=0, atol=1e-6)
    assert not torch.allclose(path(maps, pooling), path(maps, rd.LabelPooling()), atol=1e-3)


def test_without_localization_the_gain_is_that_of_the_whole_image():
    whole = calibrated_map("heatmaps")
    got = rd.LabelPooling(calibrated=True, localized=False)(F.crop(whole, 3, 2, 8, 5))
    assert torch.equal(got, rd.LabelPooling(calibrated=True)(whole))


def test_gains_of_one_are_no_op():
    neutral = Calibration((1.0,), ((1.0,),), num_crops=1, kl_before=0.0, kl_after=0.0)
    for change in VIEWS.values():
        label_map = change(calibrated_map("heatmaps", neutral))
        assert torch.equal(rd.LabelPooling(calibrated=True)(label_map), rd.LabelPooling()(label_map))


@pytest.mark.parametrize("path", [one_by_one, in_a_pipeline, in_batches, collated])
def test_a_map_without_calibration_is_an_error_that_names_it_and_the_remedy(path):
    maps = [calibrated_map("heatmaps"), random_map(key="plain")]
    with pytest.raises(ValueError, match=r"'plain' has no calibration, which calibrated=True applies.*relabel build"):
        path(maps, rd.LabelPooling(calibrated=True))


def test_the_calibration_follows_the_map_and_is_shared():
    label_map = calibrated_map("heatmaps")
    for changed in [*(change(label_map) for change in VIEWS.values()), label_map.clone(), label_map.to(torch.float64)]:
        assert changed.calibration is GAINS
    first, second = pickle.loads(pickle.dumps([label_map, F.crop(label_map, 1, 1, 3, 3)]))
    assert first.calibration == GAINS
    assert first.calibration is second.calibration
    assert random_map().calibration is None


def test_loader_workers_send_the_calibration_with_their_batches(dataset_folder):
    transforms = v2.Compose([v2.RandomResizedCrop(16), v2.PILToTensor()])
    set_calibration(dataset_folder / "colours")
    dataset = rd.load_dataset(dataset_folder, "colours", "train", transforms=transforms)
    for _, label_maps in DataLoader(dataset, 5, num_workers=1, collate_fn=rd.collate):
        assert set(label_maps.calibrations) == {GAINS}
        assert label_maps.pool(calibrated=True).sum(1) == pytest.approx(1)


def test_calibrated_pooling_works_under_compile_and_in_float64():
    label_map = F.crop(calibrated_map("heatmaps"), 3, 2, 8, 5)
    pooling = rd.LabelPooling(calibrated=True)
    assert torch.equal(torch.compile(pooling, backend="eager")(label_map), pooling(label_map))
    wide = pooling(label_map.to(torch.float64))
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), pooling(label_map), rtol=0, atol=1e-5)


@pytest.mark.parametrize("calibrated", [False, True])
def test_views_that_are_not_finite_are_errors(calibrated):
    label_map = rd.LabelMap.wrap(random_map().logits, like=calibrated_map("heatmaps"), view=View(xx=float("nan")))
    with pytest.raises(ValueError, match="views must be finite"):
        rd.LabelPooling(calibrated=calibrated)(label_map)
