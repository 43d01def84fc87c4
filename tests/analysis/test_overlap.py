import numpy as np
import pytest

from relabel_datasets.analysis.overlap import overlaps, share_above, union_areas

SIDE = 24  # side of the grid on which boxes are painted


def _random_boxes(generator, count):
    corners = np.sort(generator.integers(0, SIDE + 1, (count, 2, 2)), 1)
    corners[:, 1] += (corners[:, 1] == corners[:, 0]) & (corners[:, 0] < SIDE)
    corners[:, 0] -= corners[:, 1] == corners[:, 0]
    return corners.reshape(count, 4).astype(float) / SIDE


def _painted(box):
    x1, y1, x2, y2 = (box * SIDE).round().astype(int)
    mask = np.zeros((SIDE, SIDE), bool)
    mask[y1:y2, x1:x2] = True
    return mask


def _iou(first, second):
    return (first & second).sum() / (first | second).sum()


@pytest.mark.parametrize("max_boxes", [1, 2, 7])
def test_overlaps_equal_those_of_painted_boxes(max_boxes):
    generator = np.random.default_rng(0)
    crops = _random_boxes(generator, 150)
    boxes = [_random_boxes(generator, generator.integers(1, max_boxes + 1)) for _ in crops]
    actual = overlaps(crops, boxes)
    for i, (crop, image_boxes) in enumerate(zip(crops, boxes, strict=True)):
        crop, masks = _painted(crop), [_painted(box) for box in image_boxes]
        low, high = image_boxes[:, :2].min(0), image_boxes[:, 2:].max(0)
        ious = [_iou(crop, mask) for mask in masks]
        largest = max(range(len(masks)), key=lambda j: masks[j].sum())  # the first of equal ones
        assert actual.largest[i] == pytest.approx(ious[largest])
        assert actual.best[i] == pytest.approx(max(ious))
        assert actual.union[i] == pytest.approx(_iou(crop, np.any(masks, 0)))
        assert actual.enclosing[i] == pytest.approx(_iou(crop, _painted(np.concatenate([low, high]))))


def test_areas_of_unions_are_exact_for_any_number_of_boxes(monkeypatch):
    generator = np.random.default_rng(1)
    counts = np.array([1, 30, 2, 1, 30, 8])
    boxes = [_random_boxes(generator, count) for count in counts]
    expected = [np.any([_painted(box) for box in image_boxes], 0).mean() for image_boxes in boxes]
    assert union_areas(np.concatenate(boxes), counts) == pytest.approx(expected)
    monkeypatch.setattr("relabel_datasets.analysis.overlap._MAX_CELLS", 1)  # one image at a time
    assert union_areas(np.concatenate(boxes), counts) == pytest.approx(expected)


def test_repeated_and_nested_boxes_do_not_change_the_union():
    outer, inner = [0.1, 0.1, 0.7, 0.9], [0.2, 0.3, 0.4, 0.5]
    for boxes in ([outer], [outer, outer], [outer, inner], [inner, outer, inner]):
        assert union_areas(np.array(boxes), np.array([len(boxes)])) == pytest.approx([0.6 * 0.8])


def test_disjoint_touching_and_equal_boxes():
    box = np.array([[0.25, 0.25, 0.5, 0.75]])
    crops = np.array([[0.6, 0, 1, 1], [0.5, 0.25, 0.75, 0.75], box[0]])
    for values in overlaps(crops, [box] * 3):
        assert values.tolist() == [0, 0, 1]


def test_share_above_excludes_the_threshold():
    assert share_above(np.array([0.4, 0.5, 0.6, 0.7])) == 0.5
    assert share_above(np.array([0.4, 0.5]), 0.3) == 1
    assert np.isnan(share_above(np.zeros(0)))


def test_no_crops_give_empty_overlaps_and_missing_boxes_raise_an_error():
    assert [len(values) for values in overlaps(np.zeros((0, 4)), [])] == [0] * 4
    with pytest.raises(ValueError, match="box for each of 2 crops, got 2 arrays, 1 empty"):
        overlaps(np.zeros((2, 4)), [np.zeros((0, 4)), np.ones((1, 4))])
    with pytest.raises(ValueError, match="of 2 crops, got 1 arrays"):
        overlaps(np.zeros((2, 4)), [np.ones((1, 4))])
