import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torchvision import ops
from torchvision.transforms.v2 import functional as F

import relabel_datasets as rd
from relabel_datasets.labels.encodings import Encoded, encode_logits
from relabel_datasets.labels.pooling import pool_label_map
from relabel_datasets.labels.view import to_rows

from .samples import ENCODINGS, HEIGHT, NUM_CLASSES, WIDTH, pool_boxes, random_dense

SIZES = [(HEIGHT, WIDTH), (15, 15), (1, 6), (1, 1)]
GRIDS = [1, (3, 4), 14]


class Batch(NamedTuple):
    encoded: Encoded
    dense: Tensor  # [B, C, H, W]: what the encoded logits stand for
    outside: Tensor  # [B, C]: logits outside of the image

    def pool(self, boxes: Tensor, output_size=1, **arguments) -> Tensor:
        return pool_boxes(self.encoded, boxes, output_size=output_size, **arguments)

    def pool_views(self, views, output_size=1) -> Tensor:
        return self.encoded.encoding.pool(self.encoded, to_rows(views), output_size)

    def label_map(self, i: int) -> rd.LabelMap:
        encoding, tensors, num_classes = self.encoded
        one = {name: tensor[i] for name, tensor in tensors.items()}
        return rd.LabelMap(**one, encoding=encoding.name, num_classes=num_classes)

    def changed(self, change) -> "Batch":
        return Batch(self.encoded.changed(change), change(self.dense), change(self.outside))

    def __getitem__(self, i: slice) -> "Batch":
        return self.changed(lambda part: part[i])


def random_batch(num: int, encoding: str, size=(HEIGHT, WIDTH), dtype=torch.float64, num_classes=NUM_CLASSES) -> Batch:
    encoded = encode_logits(random_dense(num, num_classes, *size), encoding, 3)
    encoded = encoded.changed(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
    outside = encoded.tensors.get("base", encoded.logits.new_zeros(num, num_classes))
    return Batch(encoded, encoded.encoding.dense(encoded), outside)


def boxes_of(*corners: Tensor) -> Tensor:
    """Return `[B, 4]` boxes from two corners `[B, 2]`, put in order."""
    low, high = torch.stack(corners).sort(0).values
    return torch.cat([low, high], 1)


def on_cell_edges(num: int, size) -> Tensor:
    sides = torch.tensor([size[1], size[0]])
    first = (torch.rand(num, 2, dtype=torch.float64) * sides).floor()
    last = first + 1 + (torch.rand(num, 2, dtype=torch.float64) * (sides - first)).floor()
    return torch.cat([first / sides, last / sides], 1)


def at_the_border(num: int, size) -> Tensor:
    corners = torch.rand(2, num, 2, dtype=torch.float64)
    return boxes_of(corners[0].round(), corners[1])


def smaller_than_a_cell(num: int, size) -> Tensor:
    first = torch.rand(num, 2, dtype=torch.float64) * 0.9
    return torch.cat([first, first + torch.rand(num, 2, dtype=torch.float64) * 0.1 / max(size)], 1)


BOXES = {
    "inside": lambda num, size: boxes_of(*torch.rand(2, num, 2, dtype=torch.float64)),
    "on cell edges": on_cell_edges,
    "at the border": at_the_border,
    "smaller than a cell": smaller_than_a_cell,
    "the whole image": lambda num, size: torch.tensor([[0.0, 0, 1, 1]] * num, dtype=torch.float64),
}


def reference(dense: Tensor, boxes: Tensor, output_size) -> Tensor:
    height, width = dense.shape[2:]
    boxes = boxes.to(dense.dtype) * dense.new_tensor([width, height, width, height])
    soft = ops.roi_align(dense, list(boxes[:, None]), output_size, aligned=True).softmax(1)
    return soft[:, :, 0, 0] if output_size == 1 else soft


@pytest.mark.parametrize("boxes", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_pooling_is_softmax_of_roi_align_of_the_dense_map(encoding, boxes, dtype, tolerance):
    for size, output_size in itertools.product(SIZES, GRIDS):
        batch = random_batch(20, encoding, size, dtype)
        where = boxes(20, size).to(dtype)
        where = where[((where[:, 2:] - where[:, :2]) > 0).all(1)]  # roi_align pools nothing in a box without extent
        got, want = (
            batch[: len(where)].pool(where, output_size),
            reference(batch.dense[: len(where)], where, output_size),
        )
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


# A slow reference for all boxes and views: plain Python, one location at a time.


def bilinear(dense: Tensor, x: float, y: float) -> Tensor:
    """Return the `[C]` logits of one map at (x, y), in locations, 0 being the centre of the first."""
    height, width = dense.shape[1:]
    x, y = min(max(x, 0), width - 1), min(max(y, 0), height - 1)
    left, top = min(int(x), max(width - 2, 0)), min(int(y), max(height - 2, 0))
    right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
    x, y = x - left, y - top
    upper = (1 - x) * dense[:, top, left] + x * dense[:, top, right]
    lower = (1 - x) * dense[:, bottom, left] + x * dense[:, bottom, right]
    return (1 - y) * upper + y * lower


def mean_of_points(dense: Tensor, points, outside: Tensor) -> Tensor:
    values = [bilinear(dense, x, y) for x, y in points]
    if values:
        return torch.stack(values).mean(0).softmax(0)
    return outside.softmax(0)


def line_points(start: float, end: float, least: float, most: float, length: int) -> list[float]:
    """Return the sampling points of one side of a cell, given in 0..1, after cutting off what cannot be seen."""
    low, high = sorted((start, end))
    if low < least or high > most:
        low, high = max(low, least), min(high, most)
        if high <= low:
            return []
    num_points = max(1, math.ceil((high - low) * length - 1e-9))
    return [(low + (i + 0.5) / num_points * (high - low)) * length - 0.5 for i in range(num_points)]


def box_by_loops(dense: Tensor, outside: Tensor, box, grid, visible=(0.0, 0.0, 1.0, 1.0)) -> Tensor:
    x1, y1, x2, y2 = box
    left, top, right, bottom = visible
    rows, columns = grid
    cells = []
    for i, j in itertools.product(range(rows), range(columns)):
        xs = line_points(x1 + (x2 - x1) * j / columns, x1 + (x2 - x1) * (j + 1) / columns, left, right, dense.shape[2])
        ys = line_points(y1 + (y2 - y1) * i / rows, y1 + (y2 - y1) * (i + 1) / rows, top, bottom, dense.shape[1])
        cells.append(mean_of_points(dense, list(itertools.product(xs, ys)), outside))
    return torch.stack(cells, 1).reshape(-1, rows, columns)


def view_by_loops(dense: Tensor, outside: Tensor, view: rd.labels.View, grid) -> Tensor:
    height, width = dense.shape[1:]
    rows, columns = grid
    num_u = max(1, math.ceil(math.hypot(view.xx * width, view.yx * height) / columns - 1e-4))
    num_v = max(1, math.ceil(math.hypot(view.xy * width, view.yy * height) / rows - 1e-4))
    cells = []
    for i, j in itertools.product(range(rows), range(columns)):
        points = []
        for a, b in itertools.product(range(num_u), range(num_v)):
            u, v = (j + (a + 0.5) / num_u) / columns, (i + (b + 0.5) / num_v) / rows
            x, y = view.xx * u + view.xy * v + view.x0, view.yx * u + view.yy * v + view.y0
            left, top, right, bottom = view.visible_xyxy
            if left <= x <= right and top <= y <= bottom:
                points.append((x * width - 0.5, y * height - 0.5))
        cells.append(mean_of_points(dense, points, outside))
    return torch.stack(cells, 1).reshape(-1, rows, columns)


def random_shape(seed: int):
    """Return an encoding, the size of a map and of a grid, different for every seed."""
    torch.manual_seed(seed)
    height, width, rows, columns = torch.randint(1, 8, (4,)).tolist()
    return ENCODINGS[seed % len(ENCODINGS)], (height, width), (min(rows, 4), min(columns, 4))


@pytest.mark.parametrize("seed", range(30))
def test_any_box_inside_or_out_mirrored_or_not_pools_as_by_loops(seed):
    encoding, size, grid = random_shape(seed)
    batch = random_batch(3, encoding, size)
    boxes = torch.rand(3, 4, dtype=torch.float64) * 3 - 1
    got = batch.pool(boxes, grid)
    for i in range(3):
        want = box_by_loops(batch.dense[i], batch.outside[i], boxes[i].tolist(), grid)
        torch.testing.assert_close(got[i], want, rtol=0, atol=1e-9)


def random_visible() -> tuple[float, float, float, float]:
    """Return the whole image, a part of it, or nothing."""
    corners = torch.rand(2, 2, dtype=torch.float64)
    low, high = corners.sort(0).values.tolist()
    return [(0.0, 0.0, 1.0, 1.0), (*low, *high), (*high, *low)][int(torch.randint(3, ()))]


@pytest.mark.parametrize("seed", range(30))
def test_any_upright_view_pools_what_is_visible_of_it_as_by_loops(seed):
    encoding, size, grid = random_shape(seed)
    batch = random_batch(3, encoding, size)
    boxes = (torch.rand(3, 4, dtype=torch.float64) * 3 - 1).tolist()
    views = [rd.labels.View(x2 - x1, 0.0, x1, 0.0, y2 - y1, y1, random_visible()) for x1, y1, x2, y2 in boxes]
    got, labels = batch.pool_views(views, grid), batch.pool_views(views)
    for i in range(3):
        dense, outside = batch.dense[i], batch.outside[i]
        want = box_by_loops(dense, outside, boxes[i], grid, views[i].visible_xyxy)
        torch.testing.assert_close(got[i], want, rtol=0, atol=1e-9)
        want = box_by_loops(dense, outside, boxes[i], (1, 1), views[i].visible_xyxy)[:, 0, 0]
        torch.testing.assert_close(labels[i], want, rtol=0, atol=1e-9)
        in_float32 = pool_label_map(batch.label_map(i).to(torch.float32), views[i])
        torch.testing.assert_close(in_float32, want.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(30))
def test_any_rotated_or_sheared_view_pools_what_is_visible_of_it_as_by_loops(seed):
    encoding, size, grid = random_shape(seed)
    batch = random_batch(3, encoding, size)
    views = [rd.labels.View(*(torch.randn(6, dtype=torch.float64) * 0.7).tolist(), random_visible()) for _ in range(3)]
    got = batch.pool_views(views, grid)
    for i in range(3):
        want = view_by_loops(batch.dense[i], batch.outside[i], views[i], grid)
        torch.testing.assert_close(got[i], want, rtol=0, atol=1e-9)


def pooled_value(soft: Tensor) -> Tensor:
    """Undo the softmax of two classes, of which the second has logit 0."""
    return (soft[:, 0] / soft[:, 1]).log()


@pytest.mark.parametrize("axis", ["x", "y"])
def test_a_linear_ramp_pools_to_the_centre_of_the_box_minus_a_half(axis):
    height, width = 9, 14
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(14.0), indexing="ij")
    ramp = (x if axis == "x" else y).double()[None, None]
    boxes = torch.tensor([[0.2, 0.1, 0.5, 0.7], [0.11, 0.3, 0.62, 0.9], [0.5, 0.5, 0.52, 0.51]], dtype=torch.float64)
    classes, base = torch.zeros(3, 1, 1, 1, dtype=torch.long), torch.zeros(3, 2, dtype=torch.float64)
    soft = rd.pool_labels(ramp.expand(3, -1, -1, -1), classes, boxes, num_classes=2, base=base)
    centre = (boxes[:, 0] + boxes[:, 2]) / 2 * width if axis == "x" else (boxes[:, 1] + boxes[:, 3]) / 2 * height
    torch.testing.assert_close(pooled_value(soft), centre - 0.5)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_mirrored_box_mirrors_the_grid(encoding):
    batch = random_batch(5, encoding)
    boxes = BOXES["inside"](5, None)
    want = batch.pool(boxes, (3, 4))
    for order, axes in (([2, 1, 0, 3], [3]), ([0, 3, 2, 1], [2]), ([2, 3, 0, 1], [2, 3])):
        torch.testing.assert_close(batch.pool(boxes[:, order], (3, 4)), want.flip(axes))
        torch.testing.assert_close(batch.pool(boxes[:, order]), batch.pool(boxes))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_box_that_leaves_the_image_is_pooled_over_its_part_inside(encoding):
    batch = random_batch(200, encoding)
    boxes = boxes_of(*(torch.rand(2, 200, 2, dtype=torch.float64) * 2 - 0.5))
    clipped = boxes.clamp(0, 1)
    meets = ((clipped[:, 2:] - clipped[:, :2]) > 0).all(1)
    got = batch.pool(boxes)
    torch.testing.assert_close(got[meets], batch.pool(clipped)[meets], rtol=0, atol=1e-12)
    torch.testing.assert_close(got[~meets], batch.outside.softmax(1)[~meets], rtol=0, atol=1e-12)
    assert 10 < meets.sum() < 190


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_edge_rounded_across_the_border_is_no_leaving(encoding):
    batch = random_batch(1, encoding)
    whole, outwards = torch.tensor([[0.0, 0, 1, 1]]).double(), torch.tensor([[-1e-6, 0, 1 + 1e-6, 1]]).double()
    torch.testing.assert_close(batch.pool(outwards, (3, 4)), batch.pool(whole, (3, 4)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_box_without_extent_is_its_point_or_its_line(encoding):
    batch = random_batch(1, encoding)
    x, y = (2 + 0.5) / WIDTH, (4 + 0.5) / HEIGHT
    point = batch.pool(torch.tensor([[x, y, x, y]], dtype=torch.float64))
    torch.testing.assert_close(point, batch.dense[:, :, 4, 2].softmax(1))
    line = batch.pool(torch.tensor([[x, 0, x, 1]], dtype=torch.float64))
    torch.testing.assert_close(line, batch.dense[:, :, :, 2].mean(2).softmax(1))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_map_turned_by_quarters_pools_as_its_turned_logits(encoding, quarters):
    batch = random_batch(1, encoding, (6, 9))
    turned = F.crop(F.rotate(batch.label_map(0), 90 * quarters, expand=True), 1, 2, 4, 3)
    dense = batch.dense[0].rot90(quarters, (1, 2))
    height, width = dense.shape[1:]
    box = torch.tensor([[2 / width, 1 / height, 5 / width, 5 / height]], dtype=torch.float64)
    for output_size in (1, (2, 3)):
        got = pool_label_map(turned, turned.view, output_size)
        torch.testing.assert_close(got, reference(dense[None], box, output_size)[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_batch_of_upright_and_rotated_views_pools_as_one_by_one(encoding):
    batch = random_batch(6, encoding)
    views = [rd.labels.View(0.5, 0.1 * (i % 2), 0.2, 0.2 * (i % 3), 0.6, 0.1) for i in range(6)]
    assert {view.is_box for view in views} == {True, False}
    for output_size in (1, (2, 3)):
        together = batch.pool_views(views, output_size)
        for i in range(6):
            torch.testing.assert_close(together[i : i + 1], batch[i : i + 1].pool_views([views[i]], output_size))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_upright_view_inside_the_image_pools_alike_as_box_and_by_points(encoding):
    batch = random_batch(4, encoding)
    boxes = BOXES["inside"](4, None)
    views = [rd.labels.View(x2 - x1, 1e-8, x1, 0.0, y2 - y1, y1) for x1, y1, x2, y2 in boxes.tolist()]
    assert not views[0].is_box
    torch.testing.assert_close(batch.pool_views(views, (3, 4)), batch.pool(boxes, (3, 4)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("output_size", [1, (2, 3)])
def test_batches_of_one_and_of_none(encoding, output_size):
    batch, boxes = random_batch(3, encoding), BOXES["inside"](3, None)
    together = batch.pool(boxes, output_size)
    torch.testing.assert_close(batch[1:2].pool(boxes[1:2], output_size), together[1:2])
    assert batch[:0].pool(boxes[:0], output_size).shape == (0, *together.shape[1:])
    assert batch[:0].pool_views([], output_size).shape == (0, *together.shape[1:])


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (15, 15)])
def test_one_sample_at_a_time_gives_what_the_batch_gives(encoding, size):
    num = 1500
    one = random_batch(1, encoding, size, torch.float32)
    inside, anywhere = BOXES["inside"](num // 3, size), torch.rand(num // 3, 4, dtype=torch.float64) * 2 - 0.5
    boxes = torch.cat([inside, anywhere, on_cell_edges(num // 3, size)])
    batch = one.changed(lambda part: part.expand(num, *part.shape[1:]))
    label_map = one.label_map(0)
    views = [rd.labels.View(x2 - x1, 0.0, x1, 0.0, y2 - y1, y1) for x1, y1, x2, y2 in boxes.tolist()]
    singly = torch.stack([pool_label_map(label_map, view) for view in views])
    assert singly.dtype == torch.float32
    torch.testing.assert_close(singly, batch.pool_views(views), rtol=0, atol=3e-6)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_temperature_divides_the_pooled_logits(encoding):
    batch, boxes = random_batch(2, encoding), BOXES["inside"](2, None)
    want = (batch.pool(boxes).log() / 2.5).softmax(1)
    torch.testing.assert_close(batch.pool(boxes, temperature=2.5), want)
    label_map, view = batch[:1].label_map(0).float(), rd.labels.View()
    soft = pool_label_map(rd.LabelMap.wrap(label_map, like=batch.label_map(0)), view, 1, 2.5)
    whole = batch[:1].pool(torch.tensor([[0.0, 0, 1, 1]]), temperature=2.5)[0]
    torch.testing.assert_close(soft, whole.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_pooled_in_float32(encoding, dtype):
    batch, boxes = random_batch(4, encoding, dtype=dtype), BOXES["inside"](4, None)
    soft = batch.pool(boxes)
    assert soft.dtype == torch.float32
    torch.testing.assert_close(soft, reference(batch.dense.double(), boxes, 1).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_labels_sum_to_one_and_inputs_are_not_written_to(encoding):
    batch, boxes = random_batch(4, encoding), BOXES["inside"](4, None)
    inputs = [*batch.encoded.tensors.values(), boxes]
    versions = [part._version for part in inputs]
    label_map = batch.label_map(0).to(torch.float32)
    copies = {name: part.clone() for name, part in label_map.tensors.items()}
    for output_size in (1, (2, 3)):
        soft = batch.pool(boxes, output_size, temperature=2)
        torch.testing.assert_close(soft.sum(1), torch.ones_like(soft[:, 0]))
        batch.pool_views([rd.labels.View(xy=0.1)] * 4, output_size)
        pool_label_map(label_map, rd.labels.View(), output_size, 2)
    assert [part._version for part in inputs] == versions
    for name, part in label_map.tensors.items():
        assert torch.equal(part, copies[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_gpu_gives_what_the_cpu_gives(encoding):
    batch, boxes = random_batch(8, encoding, dtype=torch.float32), BOXES["inside"](8, None)
    on_gpu = batch.changed(Tensor.cuda)
    for output_size in (1, (3, 4)):
        got = on_gpu.pool(boxes, output_size)  # boxes may stay on the CPU
        assert got.device.type == "cuda"
        torch.testing.assert_close(got.cpu(), batch.pool(boxes, output_size), rtol=0, atol=1e-5)
        views = [rd.labels.View(0.5, 0.1, 0.2, 0.2, 0.6, 0.1)] * 8
        torch.testing.assert_close(on_gpu.pool_views(views, output_size).cpu(), batch.pool_views(views, output_size))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_image_needs_one_view(encoding):
    with pytest.raises(ValueError, match="expected 2 views, one per image, got 1"):
        random_batch(2, encoding).pool_views([rd.labels.View()])
