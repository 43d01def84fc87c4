"""Temperature and the weight of the class label: one formula on every path, against a slow float64 reference."""

import itertools

import pytest
import torch
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.labels import batch as batch_module
from relabel_datasets.labels import transforms as transforms_module
from relabel_datasets.labels.batch import LabelMapBatch
from relabel_datasets.labels.view import to_rows
from relabel_datasets.train.tokens import TokenLabelPooling

from .paths import collated, in_a_pipeline, in_batches, one_by_one
from .samples import ENCODINGS, NUM_CLASSES, SPARSE, pool_boxes, random_map
from .test_pooling import box_by_loops, view_by_loops

View = rd.labels.View
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
VIEWS = {
    "inside": View(0.5, 0.0, 0.2, 0.0, 0.6, 0.1),
    "mirrored": View(-0.5, 0.0, 0.9, 0.0, 0.6, 0.1),
    "leaving the image": View(1.2, 0.0, -0.3, 0.0, 0.7, 0.5),
    "outside the image": View(0.5, 0.0, 1.5, 0.0, 0.5, 0.0),
    "rotated": View(0.5, 0.1, 0.2, 0.2, 0.6, 0.1),
}
UPRIGHT = [name for name, view in VIEWS.items() if view.is_box]


def viewed(encoding, names=tuple(VIEWS)):
    maps = [random_map(encoding, key=name) for name in names]
    return [
        rd.LabelMap.wrap(label_map.logits, like=label_map, view=VIEWS[name], label=i)
        for i, (name, label_map) in enumerate(zip(names, maps, strict=True))
    ]


def reference(label_map, output_size, temperature, weight):
    """Return `(1 - w) * softmax(pooled / T) + w * one_hot` in float64, pooled by plain loops."""
    grid = (1, 1) if output_size == 1 else output_size
    dense = label_map.dense().double()
    outside = label_map.tensors.get("base", torch.zeros(NUM_CLASSES)).double()
    if label_map.view.is_box:
        soft = box_by_loops(dense, outside, label_map.view.box_xyxy, grid)
    else:
        soft = view_by_loops(dense, outside, label_map.view, grid)
    target = (1 - weight) * (soft.log() / temperature).softmax(0)
    target[label_map.label] += weight
    return target[:, 0, 0] if output_size == 1 else target


def on_the_gpu(maps, pooling):
    label_maps = rd.collate(maps).pin_memory().to("cuda", non_blocking=True)
    pooled = label_maps.pool(pooling.output_size, pooling.temperature, label_weight=pooling.label_weight)
    assert pooled.device.type == "cuda"
    return pooled.cpu()


def as_boxes(maps, pooling):
    return pool_boxes(
        rd.collate(maps).encoded,
        torch.tensor([label_map.view.box_xyxy for label_map in maps]),
        output_size=pooling.output_size,
        temperature=pooling.temperature,
        labels=torch.tensor([label_map.label for label_map in maps]),
        label_weight=pooling.label_weight,
    )


CASES = [
    *itertools.product(ENCODINGS, [one_by_one, in_a_pipeline, in_batches, collated]),
    *itertools.product(SPARSE, [as_boxes]),
]
CASES += [pytest.param(encoding, on_the_gpu, marks=GPU) for encoding in ENCODINGS]


@pytest.mark.parametrize("output_size", [1, (2, 3)])
@pytest.mark.parametrize(("encoding", "path"), CASES)
def test_every_path_gives_the_target_of_the_formula(encoding, path, output_size):
    maps = viewed(encoding, UPRIGHT if path is as_boxes else tuple(VIEWS))
    for temperature, weight in ((1.0, 0.0), (2.5, 0.0), (1.0, 0.3), (0.5, 0.3), (3, 1)):
        want = torch.stack([reference(label_map, output_size, temperature, weight) for label_map in maps])
        for surroundings in (
            torch.autocast("cpu", torch.bfloat16, enabled=False),
            torch.autocast("cpu", torch.bfloat16),
        ):
            with surroundings:
                got = path(maps, rd.LabelPooling(output_size, temperature, label_weight=weight))
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_float64_logits_are_blended_in_float64_and_gradients_reach_them(encoding):
    maps = [label_map.to(torch.float64) for label_map in viewed(encoding)]
    batch = LabelMapBatch.of(maps)
    batch.encoded.logits.requires_grad_()
    soft = batch.pool(1, 2.0, label_weight=0.25)
    want = torch.stack([reference(label_map, 1, 2.0, 0.25) for label_map in maps])
    torch.testing.assert_close(soft, want, rtol=0, atol=1e-9)
    (gradient,) = torch.autograd.grad(soft[:, 0].sum(), batch.encoded.logits)
    (unblended,) = torch.autograd.grad(batch.pool(1, 2.0)[:, 0].sum(), batch.encoded.logits)
    torch.testing.assert_close(gradient, 0.75 * unblended)


@pytest.mark.parametrize(("encoding", "path"), CASES)
def test_neutral_values_leave_every_bit_and_never_blend(encoding, path, monkeypatch):
    maps = viewed(encoding, UPRIGHT)
    want = path(maps, rd.LabelPooling())

    def fail(*args):
        raise AssertionError("labels were blended")

    for module in (batch_module, transforms_module, rd.labels.pooling):
        monkeypatch.setattr(module, "blend_labels", fail)
    assert torch.equal(path(maps, rd.LabelPooling(temperature=1.0, label_weight=0.0)), want)
    assert torch.equal(path(maps, rd.LabelPooling(temperature=1, label_weight=0)), want)
    if path is collated:
        label_maps = rd.collate(maps)
        assert torch.equal(want, label_maps.encoded.encoding.pool(label_maps.encoded, to_rows(label_maps.views)))


def test_golden_targets():
    """Logits whose softmax is exact: all equal, and all but two far below."""
    far = torch.tensor([0.0, 0.0, -1e4, -1e4])[:, None, None].expand(4, 2, 3)
    for encoding in ENCODINGS:
        label_map = rd.LabelMap.from_logits(far, encoding, k=4, label=2)
        assert rd.LabelPooling()(label_map).tolist() == [0.5, 0.5, 0.0, 0.0]
        assert rd.LabelPooling(temperature=7.0)(label_map).tolist() == [0.5, 0.5, 0.0, 0.0]
        assert rd.LabelPooling(label_weight=0.5)(label_map).tolist() == [0.25, 0.25, 0.5, 0.0]
        assert rd.LabelPooling(label_weight=1.0)(label_map).tolist() == [0.0, 0.0, 1.0, 0.0]
        assert rd.LabelPooling(label_weight=0.5, multi_label=False)(label_map).tolist() == [0.5, 0.0, 0.5, 0.0]
        assert rd.LabelPooling((1, 2), label_weight=0.5)(label_map)[:, 0].tolist() == [[0.25] * 2] * 2 + [
            [0.5] * 2,
            [0.0] * 2,
        ]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_labels_of_tokens_are_not_blended_but_those_of_crops_are(encoding):
    for label_map in viewed(encoding):
        crop, tokens = TokenLabelPooling((2, 3), 1.5, label_weight=0.4)(label_map)
        assert torch.equal(crop, rd.LabelPooling(temperature=1.5, label_weight=0.4)(label_map))
        assert torch.equal(tokens, rd.LabelPooling((2, 3), 1.5)(label_map))


@pytest.mark.parametrize("mix", [v2.CutMix(), v2.MixUp(alpha=0.4)])
def test_mixed_targets_are_mixtures_of_blended_targets(mix):
    maps = viewed("heatmaps")
    images = torch.arange(len(maps), dtype=torch.float32)[:, None, None, None].expand(-1, 3, 8, 10) / 8
    blended = rd.collate(maps).pool(label_weight=0.4)
    mixed_images, mixed = mix(images.clone(), blended.clone())
    first, second = images[:, 0, 0, 0], images.roll(1, 0)[:, 0, 0, 0]
    share = ((mixed_images.mean((1, 2, 3)) - second) / (first - second))[:, None]
    torch.testing.assert_close(mixed, share * blended + (1 - share) * blended.roll(1, 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("label", [None, NUM_CLASSES, -1])
@pytest.mark.parametrize("path", [one_by_one, in_batches, collated, pytest.param(on_the_gpu, marks=GPU)])
def test_a_sample_without_a_usable_class_label_is_an_error_that_names_it(path, label):
    maps = viewed("heatmaps")
    maps[1] = rd.LabelMap.wrap(maps[1].logits, like=maps[1], label=label)
    path(maps, rd.LabelPooling(label_weight=0.0))
    problem = "has no class label" if label is None else f"has class label {label} of 13 classes"
    with pytest.raises(ValueError, match=f"the label map of 'mirrored' {problem}, .*: set label_weight=0, or give"):
        path(maps, rd.LabelPooling(label_weight=0.1))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"label_weight": -0.1}, ValueError, "label_weight must be from 0 to 1, got -0.1"),
        ({"label_weight": 1.5}, ValueError, "label_weight must be from 0 to 1, got 1.5"),
        ({"label_weight": float("nan")}, ValueError, "label_weight must be from 0 to 1, got nan"),
        ({"label_weight": "0.5"}, TypeError, "label_weight must be a number, got '0.5'"),
    ],
)
def test_a_weight_out_of_range_is_an_error_everywhere(values, error, message):
    maps = viewed("heatmaps", UPRIGHT)
    batch = rd.collate(maps)
    boxes = torch.zeros(len(maps), 4)
    for call in (
        lambda: rd.LabelPooling(**values),
        lambda: TokenLabelPooling(2, **values),
        lambda: batch.pool(**values),
        lambda: rd.pool_labels(
            batch.encoded.logits, batch.encoded.tensors["classes"], boxes, num_classes=NUM_CLASSES, **values
        ),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (None, ValueError, "labels is None: pass labels, or label_weight=0"),
        ([1, 2], TypeError, "labels must be a torch.Tensor"),
        (torch.tensor([1, 2, 3]), ValueError, r"labels must be integers of shape \(2,\), got torch.int64 \(3,\)"),
        (torch.tensor([1.0, 2.0]), ValueError, r"labels must be integers of shape \(2,\), got torch.float32"),
        (torch.tensor([True, False]), ValueError, r"got torch.bool"),
        (torch.tensor([1, -1]), ValueError, r"labels must be in 0 .. 12, got -1 for image 1"),
        (torch.tensor([13, 1]), ValueError, r"labels must be in 0 .. 12, got 13 for image 0"),
    ],
)
def test_pool_labels_checks_class_labels(labels, error, message):
    batch = rd.collate(viewed("topk", UPRIGHT[:2]))
    arguments = {"num_classes": NUM_CLASSES, "labels": labels, "label_weight": 0.5}
    with pytest.raises(error, match=message):
        rd.pool_labels(batch.encoded.logits, batch.encoded.tensors["classes"], torch.rand(2, 4), **arguments)
