"""Every argument of pooling is either pooled correctly or refused by a documented error."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torchvision import tv_tensors

import relabel_datasets as rd
from relabel_datasets.labels.batch import LabelMapBatch
from relabel_datasets.labels.encodings import encode_logits
from relabel_datasets.labels.pooling import pool_label_map

from .samples import ENCODINGS, HEIGHT, NUM_CLASSES, SPARSE, WIDTH, random_dense, random_map

BOXES = torch.tensor([[0.1, 0.2, 0.7, 0.9], [0.3, 0.3, 0.8, 0.9]])
NAN, INF = float("nan"), float("inf")


def arguments(encoding="heatmaps", **changes) -> dict:
    encoded = encode_logits(random_dense(2, NUM_CLASSES, HEIGHT, WIDTH), encoding, 3)
    good = {
        "logits": encoded.logits,
        "classes": encoded.tensors["classes"],
        "base": encoded.tensors.get("base"),
        "boxes_xyxy": BOXES,
        "num_classes": NUM_CLASSES,
    }
    return {**good, **changes}


def classes(*shape: int, start: int = 0, dtype=torch.long) -> torch.Tensor:
    return torch.arange(start, start + shape[1])[None, :, None, None].expand(*shape).to(dtype)


GRID, SIZE = (2, 3, 1, 1), (2, 3, HEIGHT, WIDTH)

WRONG_VALUES = {
    "logits of three dimensions": ({"logits": torch.zeros(3, 4, 5)}, r"logits must be dense floating point \[B, K, H"),
    "integer logits": ({"logits": torch.zeros(SIZE).long()}, r"got torch.int64 \(2, 3, 7, 5\)"),
    "complex logits": ({"logits": torch.zeros(SIZE) + 1j}, "floating point"),
    "sparse logits": ({"logits": torch.zeros(SIZE).to_sparse()}, "dense"),
    "no rows": ({"logits": torch.zeros(2, 3, 0, 5)}, "at least one location"),
    "no columns": ({"logits": torch.zeros(2, 3, 7, 0)}, "at least one location"),
    "classes of two dimensions": ({"classes": classes(2, 3, 1, 1)[..., 0, 0]}, r"\(2, 3, 7, 5\) or \(2, 3, 1, 1\)"),
    "classes of another K": ({"classes": classes(2, 4, 1, 1)}, "classes must have shape"),
    "classes of another B": ({"classes": classes(3, 3, 1, 1)}, "classes must have shape"),
    "floating point classes": ({"classes": classes(*GRID).float()}, "classes must be integers, got torch.float32"),
    "boolean classes": ({"classes": classes(*GRID).bool()}, "classes must be integers, got torch.bool"),
    "complex classes": ({"classes": classes(*GRID) + 0j}, "classes must be integers"),
    "class index too high": ({"classes": classes(*GRID, start=11)}, r"indices must be in 0 \.\. 12, got 11 \.\. 13"),
    "negative class index": ({"classes": classes(*GRID, start=-1)}, r"got -1 \.\. 1"),
    "huge class index": ({"classes": classes(*SIZE, start=2**40)}, r"must be in 0 \.\. 12"),
    "class index too high, topk": ({"classes": classes(*SIZE, start=11), "base": None}, r"got 11 \.\. 13"),
    "negative class index, topk": ({"classes": classes(*SIZE, start=-1), "base": None}, r"got -1 \.\. 1"),
    "uint64 class index too high": ({"classes": classes(*GRID, start=11).to(torch.uint64)}, r"got 11 \.\. 13"),
    "base without batch": ({"base": torch.zeros(13)}, r"shape \(2, 13\), got torch.float32 \(13,\)"),
    "complex base": ({"base": torch.zeros(2, 13) + 1j}, "base must be real"),
    "base elsewhere": ({"base": torch.zeros(2, 13, device="meta")}, "device of the logits, cpu, got meta"),
    "classes elsewhere": ({"classes": classes(*GRID).to("meta")}, "device of the logits, cpu, got meta"),
    "one box without batch": ({"boxes_xyxy": BOXES[0]}, r"boxes_xyxy must have shape \(2, 4\), one per image, got \(4,\)"),
    "too few boxes": ({"boxes_xyxy": BOXES[:1]}, "one per image"),
    "boxes with an image index": ({"boxes_xyxy": torch.zeros(2, 5)}, r"got \(2, 5\)"),
    "boolean boxes": ({"boxes_xyxy": BOXES > 0}, "real numbers, got torch.bool"),
    "complex boxes": ({"boxes_xyxy": BOXES + 1j}, "real numbers"),
    "NaN in a box": ({"boxes_xyxy": BOXES * torch.tensor([1, 1, 1, NAN])}, r"finite, got \[0.1.*nan\] for image 0"),
    "infinity in a box": ({"boxes_xyxy": torch.stack([BOXES[0], BOXES[1] / 0])}, "for image 1 of the batch"),
    "a box beyond float32": ({"boxes_xyxy": BOXES.double() * 1e300}, "must be finite"),
    "no classes": ({"num_classes": 0, "base": None}, "num_classes must be at least 1, got 0"),
    "negative number of classes": ({"num_classes": -3, "base": None}, "num_classes must be at least 1"),
    "no cells": ({"output_size": 0}, "output_size must be at least 1, got 0"),
    "negative cells": ({"output_size": (2, -1)}, "output_size must be at least 1"),
    "three sides": ({"output_size": (1, 2, 3)}, r"two of them \(h, w\), got \(1, 2, 3\)"),
    "temperature 0": ({"temperature": 0}, "temperature must be positive and finite, got 0"),
    "NaN temperature": ({"temperature": NAN}, "temperature must be positive"),
    "infinite temperature": ({"temperature": INF}, "temperature must be positive and finite"),
}  # fmt: skip

WRONG_TYPES = {
    "list of logits": ({"logits": [[[[1.0]]]]}, "logits must be a torch.Tensor, got list"),
    "array of logits": ({"logits": np.zeros(SIZE)}, "logits must be a torch.Tensor, got ndarray"),
    "array of classes": ({"classes": np.zeros(GRID, int)}, "classes must be a torch.Tensor"),
    "list of base": ({"base": [[0.0] * 13] * 2}, "base must be a torch.Tensor"),
    "list of boxes": ({"boxes_xyxy": BOXES.tolist()}, "boxes_xyxy must be a torch.Tensor, got list"),
    "no boxes": ({"boxes_xyxy": None}, "boxes_xyxy must be a torch.Tensor"),
    "meta boxes": ({"boxes_xyxy": BOXES.to("meta")}, "must have values that can be read, got a tensor on meta"),
    "fractional number of classes": ({"num_classes": 13.0}, "num_classes must be an int, got 13.0"),
    "text as number of classes": ({"num_classes": "13"}, "num_classes must be an int"),
    "fractional cells": ({"output_size": 2.5}, "output_size must be an int, got 2.5"),
    "fractional side": ({"output_size": (2, 2.5)}, "output_size must be an int, got 2.5"),
    "text as temperature": ({"temperature": "1"}, "temperature must be a number, got '1'"),
    "tensor as temperature": ({"temperature": torch.tensor(1.0)}, "temperature must be a number"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_values_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        rd.pool_labels(**arguments(**wrong))


@pytest.mark.parametrize(("wrong", "message"), WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_types_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(TypeError, match=message):
        rd.pool_labels(**arguments(**wrong))


@pytest.mark.parametrize("name", ["logits", "boxes_xyxy", "base"])
@pytest.mark.parametrize("encoding", SPARSE)
def test_vmap_is_refused(encoding, name):
    inputs = arguments(encoding, base=torch.zeros(2, NUM_CLASSES))
    several = torch.stack([inputs[name]] * 3)
    with pytest.raises(TypeError, match=f"{name} is inside a transform of torch.func"):
        torch.vmap(lambda value: rd.pool_labels(**{**inputs, name: value}))(several)


TRACKED = {
    "grad": lambda function, x: torch.func.grad(lambda x: function(x).sum())(x),
    "jacrev": lambda function, x: torch.func.jacrev(function)(x),
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x,)),
    "functionalize": lambda function, x: torch.func.functionalize(function)(x),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # torch warns of its own rules for derivatives
@pytest.mark.parametrize("transform", TRACKED.values(), ids=TRACKED)
@pytest.mark.parametrize("name", ["logits", "boxes_xyxy"])
@pytest.mark.parametrize("encoding", SPARSE)
def test_other_transforms_of_torch_func_are_refused(encoding, name, transform):
    inputs = arguments(encoding)
    with pytest.raises(TypeError, match=r"torch\.func"):
        transform(lambda value: rd.pool_labels(**{**inputs, name: value}), inputs[name])


@pytest.mark.parametrize("encoding", SPARSE)
def test_fake_tensors_are_refused(encoding):
    inputs = arguments(encoding)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
        with pytest.raises(TypeError, match="FakeTensorMode"):
            rd.pool_labels(**fake)


@pytest.mark.parametrize("output_size", [1, (3, 2)])
@pytest.mark.parametrize("encoding", SPARSE)
def test_meta_logits_give_a_meta_label_of_the_right_shape(encoding, output_size):
    inputs = arguments(encoding, output_size=output_size)
    on_meta = {name: inputs[name].to("meta") for name in ("logits", "classes", "base") if inputs[name] is not None}
    got = rd.pool_labels(**{**inputs, **on_meta})
    assert got.device.type == "meta"
    assert got.shape == rd.pool_labels(**inputs).shape


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0], ids=["inside", "across the border", "outside"])
@pytest.mark.parametrize("output_size", [1, (3, 2)])
@pytest.mark.parametrize("encoding", SPARSE)
def test_gradients_reach_logits_and_base_and_not_boxes(encoding, output_size, shift):
    boxes = (BOXES.double() + shift).requires_grad_()
    inputs = arguments(encoding, output_size=output_size, boxes_xyxy=boxes)
    names = [name for name in ("logits", "base") if inputs[name] is not None]
    for name in names:
        inputs[name] = inputs[name].double().requires_grad_()

    def pool(*values):
        return rd.pool_labels(**{**inputs, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(pool, tuple(inputs[name] for name in names))
    pool(*(inputs[name] for name in names)).square().sum().backward()
    assert inputs["boxes_xyxy"].grad is None


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("encoding", SPARSE)
def test_forward_mode_derivatives_are_those_of_reverse_mode(encoding):
    inputs = arguments(encoding)
    logits = inputs["logits"].double()
    tangent = torch.randn_like(logits)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits, tangent)
        change = forward_ad.unpack_dual(rd.pool_labels(**{**inputs, "logits": dual})).tangent
    jacobian = torch.autograd.functional.jacobian(lambda x: rd.pool_labels(**{**inputs, "logits": x}), logits)
    torch.testing.assert_close(change, (jacobian * tangent).sum((2, 3, 4, 5)))


SAME_LABEL = {
    "boxes that require grad": {"boxes_xyxy": BOXES.clone().requires_grad_()},
    "float64 boxes": {"boxes_xyxy": BOXES.double()},
    "boxes as a tv_tensor": {"boxes_xyxy": tv_tensors.BoundingBoxes(BOXES, format="XYXY", canvas_size=(1, 1))},
    "numpy integers": {"num_classes": np.int64(NUM_CLASSES), "output_size": np.int64(1)},
    "numpy temperature": {"temperature": np.float32(1)},
}


@pytest.mark.parametrize("change", SAME_LABEL.values(), ids=SAME_LABEL)
@pytest.mark.parametrize("encoding", SPARSE)
def test_other_types_of_the_same_values_give_the_same_label(encoding, change):
    inputs = arguments(encoding)
    got = rd.pool_labels(**{**inputs, **change})
    assert torch.equal(got, rd.pool_labels(**inputs))
    assert not got.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_boxes_of_lower_precision_are_pooled_as_their_values(dtype):
    inputs = arguments(boxes_xyxy=torch.tensor([[0.0, 0.25, 0.5, 1.0], [0, 0, 1, 1]]).to(dtype))
    want = rd.pool_labels(**{**inputs, "boxes_xyxy": inputs["boxes_xyxy"].float()})
    assert torch.equal(rd.pool_labels(**inputs), want)


@pytest.mark.parametrize("output_size", [1, (3, 2)])
@pytest.mark.parametrize("encoding", SPARSE)
def test_an_empty_batch_has_no_labels(encoding, output_size):
    inputs = arguments(encoding, output_size=output_size)
    empty = {name: None if inputs[name] is None else inputs[name][:0] for name in ("logits", "classes", "base")}
    got = rd.pool_labels(**{**inputs, **empty, "boxes_xyxy": BOXES[:0]})
    assert got.shape == (0, NUM_CLASSES, *([] if output_size == 1 else output_size))


def test_without_stored_logits_the_label_is_the_base():
    base = random_dense(2, NUM_CLASSES)
    inputs = arguments(logits=torch.zeros(2, 0, HEIGHT, WIDTH), classes=torch.zeros(2, 0, 1, 1).long(), base=base)
    torch.testing.assert_close(rd.pool_labels(**inputs), base.softmax(1))


BAD_VIEWS = {
    "NaN": rd.labels.View(x0=NAN),
    "infinite": rd.labels.View(xx=INF),
    "NaN and rotated": rd.labels.View(xy=0.3, y0=NAN),
    "NaN in what is visible": rd.labels.View(visible_xyxy=(0.0, NAN, 1.0, 1.0)),
    "infinities that cancel": rd.labels.View(xx=INF, x0=-INF),
}


@pytest.mark.parametrize("view", BAD_VIEWS.values(), ids=BAD_VIEWS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_view_that_is_not_finite_is_refused(encoding, view):
    label_map = random_map(encoding)
    for output_size in (1, (2, 3)):
        with pytest.raises(ValueError, match=r"views must be finite, got .* for image 0"):
            pool_label_map(label_map, view, output_size)
    good, bad = (rd.LabelMap.wrap(label_map.logits, like=label_map, view=v) for v in (rd.labels.View(xy=view.xy), view))
    with pytest.raises(ValueError, match="for image 1 of the batch"):
        LabelMapBatch.of([good, bad]).pool()


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"output_size": 0}, ValueError), ({"output_size": (1, 2, 3)}, ValueError), ({"output_size": 2.5}, TypeError),
        ({"temperature": INF}, ValueError), ({"temperature": NAN}, ValueError), ({"temperature": "1"}, TypeError),
    ],
)  # fmt: skip
def test_the_transform_refuses_what_the_function_refuses(wrong, kind):
    with pytest.raises(kind, match=next(iter(wrong))):
        rd.LabelPooling(**wrong)
    with pytest.raises(kind, match=next(iter(wrong))):
        rd.pool_labels(**arguments(**wrong))
