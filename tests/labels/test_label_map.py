import copy
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

import relabel_datasets as rd
from tests.versions import needs_wrap

from .samples import (
    CANVAS_SIZE,
    ENCODINGS,
    HEIGHT,
    NUM_CLASSES,
    SPARSE,
    WIDTH,
    assert_same_map,
    assert_same_metadata,
    random_classes,
    random_map,
)


def viewed_map(encoding: str) -> rd.LabelMap:
    return F.resized_crop(random_map(encoding), 2, 1, 9, 8, [5, 6])


COPIES = {
    "clone": torch.Tensor.clone,
    "detach": torch.Tensor.detach,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda label_map: pickle.loads(pickle.dumps(label_map)),
    "requires_grad_": lambda label_map: label_map.requires_grad_(False),
    "to its own device": lambda label_map: label_map.to("cpu"),
    "wrap": lambda label_map: rd.LabelMap.wrap(label_map.logits, like=label_map),
    "rebuild": lambda m: rd.LabelMap(
        **m.tensors, encoding=m.encoding, num_classes=m.num_classes, canvas_size=m.canvas_size, view=m.view,
        key=m.key, label=m.label,
    ),
}  # fmt: skip


@pytest.mark.parametrize("copying", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_copy_has_all_of_the_map(encoding, copying):
    label_map = viewed_map(encoding)
    assert_same_map(copying(label_map), label_map)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_floats_follow_the_dtype_and_class_indices_stay_integers(encoding, dtype):
    label_map = viewed_map(encoding)
    converted = label_map.to(dtype)
    assert_same_metadata(converted, label_map)
    for name, tensor in converted.tensors.items():
        assert tensor.dtype == (dtype if label_map.tensors[name].is_floating_point() else torch.int64)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "device",
    ["meta", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_all_tensors_follow_the_device(encoding, device):
    label_map = viewed_map(encoding)
    moved = label_map.to(device)
    assert_same_metadata(moved, label_map)
    assert {tensor.device.type for tensor in moved.tensors.values()} == {device}


@pytest.mark.parametrize("wrap", [rd.LabelMap.wrap, pytest.param(tv_tensors.wrap, marks=needs_wrap)])
def test_wrap_overrides_single_fields(wrap):
    label_map = random_map()
    assert_same_map(wrap(label_map.logits, like=label_map), label_map)
    wrapped = wrap(2 * label_map, like=label_map, canvas_size=(3, 4), key="b")
    assert (wrapped.canvas_size, wrapped.key, wrapped.label) == ((3, 4), "b", label_map.label)
    assert torch.equal(wrapped.logits, 2 * label_map.logits)
    assert (label_map.canvas_size, label_map.key) == (CANVAS_SIZE, "images/a_1")


def test_arithmetic_and_collation_give_plain_tensors():
    label_map = random_map()
    for result in (label_map + 1, label_map[0], torch.stack([label_map, label_map])):
        assert type(result) is torch.Tensor


class OneMapPerEncoding(Dataset):
    def __init__(self):
        self.label_maps = [viewed_map(encoding) for encoding in ENCODINGS]

    def __len__(self):
        return len(self.label_maps)

    def __getitem__(self, index):
        return self.label_maps[index]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_maps_cross_from_dataloader_workers_whole(context):
    dataset = OneMapPerEncoding()
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context=context)
    for got, want in zip(loader, dataset.label_maps, strict=True):
        assert_same_map(got, want)


def test_repr_shows_what_the_map_is():
    text = repr(random_map("topk"))
    assert text.startswith("LabelMap(3x7x5, encoding='topk', num_classes=13, canvas_size=(17, 11), view=(1.0,")
    assert "key='images/a_1', label=4" in text


def test_defaults_are_a_whole_image_as_large_as_the_map():
    label_map = rd.LabelMap(
        torch.zeros(2, HEIGHT, WIDTH),
        "topk",
        classes=random_classes(2, NUM_CLASSES, HEIGHT, WIDTH),
        num_classes=NUM_CLASSES,
    )
    assert label_map.canvas_size == (HEIGHT, WIDTH)
    assert label_map.view == rd.labels.View()
    assert label_map.view.box_xyxy == (0, 0, 1, 1)
    assert (label_map.key, label_map.label, label_map.encoding) == (None, None, "topk")


def test_plain_lists_and_numpy_arrays_are_taken_and_the_base_gets_the_dtype_of_the_logits():
    label_map = rd.LabelMap([[[1.5]], [[2.5]]], "heatmaps", classes=[[[0]], [[2]]], base=[0, 1, 2], num_classes=3)
    assert label_map.dense().flatten().tolist() == [1.5, 1.0, 2.5]
    assert label_map.base.dtype == torch.float32


@pytest.mark.parametrize("encoding", SPARSE)
def test_dense_is_the_stored_logit_where_there_is_one_and_the_base_elsewhere(encoding):
    label_map = random_map(encoding)
    dense = label_map.dense()
    assert dense.shape == (NUM_CLASSES, HEIGHT, WIDTH)
    classes = label_map.classes.expand(label_map.shape)
    for c in range(NUM_CLASSES):
        for y in range(HEIGHT):
            for x in range(WIDTH):
                stored = [label_map.logits[k, y, x] for k in range(3) if classes[k, y, x] == c]
                assert dense[c, y, x] == (stored or [0.0 if label_map.base is None else label_map.base[c]])[0]


def test_dense_does_not_write_to_the_base():
    label_map = random_map()
    base = label_map.base.clone()
    label_map.dense().zero_()
    assert torch.equal(label_map.base, base)


GOOD = {
    "logits": torch.zeros(2, 3, 4), "encoding": "heatmaps", "classes": torch.tensor([[[0]], [[1]]]), "base": torch.zeros(5),
    "num_classes": 5,
}  # fmt: skip
TOPK = {"encoding": "topk", "classes": torch.tensor([0, 1])[:, None, None].expand(2, 3, 4)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"logits": torch.zeros(3, 4)}, r"logits must be floating point \[K, H, W\]"),
        ({"logits": torch.zeros(1, 2, 3, 4)}, r"logits must be floating point \[K, H, W\]"),
        ({"logits": torch.zeros(2, 3, 4, dtype=torch.int64)}, "got torch.int64"),
        ({"classes": torch.zeros(2, 3, 4)}, "classes must be integers"),
        ({"classes": torch.tensor([0, 1])}, r"classes must be integers of shape \(2, 1, 1\)"),
        ({"classes": torch.zeros(2, 4, 3, dtype=torch.int64)}, r"got torch.int64 \(2, 4, 3\)"),
        ({"classes": torch.tensor([[[0]], [[5]]])}, r"class indices must be in 0 .. 4, got 0 .. 5"),
        ({"classes": torch.tensor([[[-1]], [[1]]])}, r"class indices must be in 0 .. 4, got -1 .. 1"),
        ({"base": torch.zeros(4)}, r"base must have shape \(5,\)"),
        ({"base": torch.zeros(1, 5)}, r"base must have shape \(5,\)"),
        ({"encoding": "svd"}, r"encoding must be one of \['heatmaps', .*'topk'\], got 'svd'"),
        ({"encoding": "topk"}, "topk maps are made of logits and classes, got logits and classes and base"),
        ({"bas": torch.zeros(5)}, "heatmaps maps are made of logits and classes and base, got .* and bas"),
        ({**TOPK, "classes": GOOD["classes"]}, r"logits and classes, got|integers of shape \(2, 3, 4\)"),
    ],
)
def test_what_does_not_fit_together_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        rd.LabelMap(**{**GOOD, **wrong})


def test_from_logits_wants_the_logits_of_one_image():
    with pytest.raises(ValueError, match=r"must be \[C, H, W\], got \(1, 5, 3, 4\)"):
        rd.LabelMap.from_logits(torch.zeros(1, 5, 3, 4))


def test_composed_views_map_points_like_one_view_after_the_other():
    outer, inner = rd.labels.View(*torch.randn(6).tolist()), rd.labels.View(*torch.randn(6).tolist())
    u, v = 0.3, 0.8
    x, y = inner.xx * u + inner.xy * v + inner.x0, inner.yx * u + inner.yy * v + inner.y0
    composed = outer.compose(inner)
    assert composed.xx * u + composed.xy * v + composed.x0 == pytest.approx(outer.xx * x + outer.xy * y + outer.x0)
    assert composed.yx * u + composed.yy * v + composed.y0 == pytest.approx(outer.yx * x + outer.yy * y + outer.y0)
