"""Labels do not depend on the precision that the surrounding training step uses."""

from contextlib import contextmanager

import pytest
import torch
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import ModuleAnnotator
from relabel_datasets.labels.batch import LabelMapBatch
from relabel_datasets.labels.compose import run_batch
from relabel_datasets.labels.encodings import encode_logits
from relabel_datasets.labels.precision import full_precision, pooling_dtype
from relabel_datasets.train.tokens import MixToken, TokenLabelPooling, token_label_loss
from tests.conftest import ColourNet, picture

from .samples import (
    CANVAS_SIZE,
    ENCODINGS,
    HEIGHT,
    NUM_CLASSES,
    WIDTH,
    pool_boxes,
    random_classes,
    random_dense,
    random_map,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
ROTATED = rd.labels.View(0.5, 0.1, 0.2, 0.2, 0.6, 0.1)
UPRIGHT = rd.labels.View(-0.5, 0.0, 0.9, 0.0, 0.6, 0.1)
BOXES = torch.tensor([[0.1, 0.2, 0.7, 0.9], [0.0, 0.0, 1.0, 1.0], [0.3, 0.3, 0.2, 0.9], [-1.0, 0.0, 0.5, 2.0]])
VIEWS = {"upright": [UPRIGHT] * 4, "rotated": [ROTATED] * 4, "both": [UPRIGHT, ROTATED] * 2}


def autocast(dtype):
    def context(device):
        return torch.autocast(device, dtype)

    return context


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS = {
    "autocast to bfloat16": autocast(torch.bfloat16),
    "autocast to float16": autocast(torch.float16),
    "default dtype float64": lambda device: default_dtype(torch.float64),
    "default dtype bfloat16": lambda device: default_dtype(torch.bfloat16),
    "inference mode": lambda device: torch.inference_mode(),
    "no_grad": lambda device: torch.no_grad(),
    "deterministic algorithms": lambda device: deterministic(),
    "another default device": lambda device: torch.device("meta"),
}


def label_maps(encoding, views, dtype=torch.float32, stored=False):
    maps = [random_map(encoding, key=str(i)) for i in range(len(views))]
    if stored:
        maps = [rd.LabelMap.from_safetensors(each.to_safetensors()) for each in maps]
    return [
        rd.LabelMap.wrap(each.logits.to(dtype), like=each, view=view) for each, view in zip(maps, views, strict=True)
    ]


@pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("device", DEVICES)
def test_pooled_labels_are_the_same_bits_whatever_surrounds_the_call(device, encoding, surroundings):
    for views in VIEWS.values():
        for stored in (False, True):
            batch = LabelMapBatch.of(label_maps(encoding, views, stored=stored)).to(device)
            for output_size in (1, (3, 2)):
                want = (
                    batch.pool(output_size, 1.5),
                    pool_boxes(batch.encoded, BOXES, output_size=output_size, temperature=1.5),
                )
                with surroundings(device):
                    got = (
                        batch.pool(output_size, 1.5),
                        pool_boxes(batch.encoded, BOXES, output_size=output_size, temperature=1.5),
                    )
                for ours, plain in zip(got, want, strict=True):
                    assert ours.dtype == torch.float32
                    assert ours.device.type == device
                    assert torch.equal(ours, plain)


TRANSFORMS = {
    "LabelPooling": lambda: rd.LabelPooling(temperature=1.5),
    "LabelPooling of cells": lambda: rd.LabelPooling((3, 2)),
    "best class": lambda: rd.LabelPooling(multi_label=False),
    "whole image": lambda: rd.LabelPooling(localized=False),
    "TokenLabelPooling": lambda: TokenLabelPooling(2),
}


def tensors_of(output):
    return [output] if isinstance(output, torch.Tensor) else list(output)


@pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_transforms_in_the_main_process_give_the_same_bits(encoding, transform, surroundings):
    maps = [each for views in VIEWS.values() for each in label_maps(encoding, views, stored=encoding == "heatmaps")]
    want = [transform()(each) for each in maps]
    with surroundings("cpu"):
        got = [transform()(each) for each in maps]
    for ours, plain in zip(got, want, strict=True):
        for a, b in zip(tensors_of(ours), tensors_of(plain), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_a_pipeline_of_a_batch_gives_the_same_bits(surroundings):
    # v2 itself needs values of the default device
    if surroundings is SURROUNDINGS["another default device"]:
        pytest.skip("torchvision draws its random numbers on the default device")
    pipeline = v2.Compose([v2.CenterCrop((9, 7)), v2.RandomRotation((20, 20)), rd.LabelPooling()])
    pairs = [(picture(i, CANVAS_SIZE), random_map(key=str(i))) for i in range(3)]
    want = [label for _, label in run_batch(pipeline, pairs)]
    with surroundings("cpu"):
        got = [label for _, label in run_batch(pipeline, pairs)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encoding_and_dense_logits_are_the_same_bits(encoding, surroundings):
    dense = random_dense(2, NUM_CLASSES, HEIGHT, WIDTH)
    want = encode_logits(dense, encoding)
    whole = rd.LabelMap.from_logits(dense[0], encoding)
    with surroundings("cpu"):
        got = encode_logits(dense, encoding)
        again = rd.LabelMap.from_logits(dense[0], encoding)
        expanded = again.dense()
    for name, tensor in got.tensors.items():
        assert torch.equal(tensor, want.tensors[name])
    assert again.to_safetensors() == whole.to_safetensors()
    assert torch.equal(expanded, whole.dense())


@pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_an_annotator_of_float32_gives_the_same_bits(surroundings):
    def logits():
        annotator = ModuleAnnotator(torch.nn.Sequential(conv, ColourNet()), (48, 64), device="cpu")
        return annotator(annotator.preprocess(picture(0))[None])

    conv = torch.nn.Conv2d(3, 3, 1)
    want = logits()
    with surroundings("cpu"):
        got = logits()
    assert torch.equal(got, want)


@pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_loss_of_tokens_is_computed_in_full_precision(surroundings, dtype):
    logits, tokens = random_dense(4, 5).to(dtype), random_dense(4, 5, 2, 3).to(dtype)
    soft, soft_tokens = random_dense(4, 5).softmax(1), random_dense(4, 5, 2, 3).softmax(1)
    wide = pooling_dtype(logits)
    want = -(soft.to(wide) * logits.to(wide).log_softmax(1)).sum(1).mean()
    want = want - 0.5 * (soft_tokens.to(wide) * tokens.to(wide).log_softmax(1)).sum(1).mean()
    plain = token_label_loss(logits, tokens, soft, soft_tokens)
    with surroundings("cpu"):
        got = token_label_loss(logits, tokens, soft, soft_tokens)
    assert got.dtype == wide
    assert torch.equal(got, plain)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in SURROUNDINGS if name != "another default device"])
def test_tokens_are_mixed_to_the_same_bits(name):
    import numpy as np

    images, targets = torch.rand(4, 3, 8, 8), (random_dense(4, 5).softmax(1), random_dense(4, 5, 4, 4).softmax(1))
    results = []
    for context in (lambda device: torch.enable_grad(), SURROUNDINGS[name]):
        np.random.seed(3)  # noqa: NPY002  timm's
        with context("cpu"):
            mixed, (soft, tokens) = MixToken()(images, targets)
        results.append((mixed, soft, tokens))
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_logits_of_every_dtype_are_pooled_in_float32_or_wider(encoding, views, dtype):
    maps = label_maps(encoding, views, dtype)
    batch = LabelMapBatch.of(maps)
    wide = LabelMapBatch.of([each.to(torch.float64) for each in maps]).pool((3, 2))
    for surroundings in (lambda: torch.enable_grad(), lambda: torch.autocast("cpu", torch.bfloat16)):
        with surroundings():
            got = batch.pool((3, 2))
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), wide, rtol=1e-4, atol=1e-6)


LAYOUTS = {
    "channels last": lambda logits: logits.to(memory_format=torch.channels_last),
    "strided": lambda logits: torch.stack([logits, logits], -1)[..., 0],
    "transposed": lambda logits: logits.mT.contiguous().mT,
    "expanded": lambda logits: logits[:1].expand(4, -1, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_memory_layout_of_logits_does_not_matter(encoding, layout):
    encoded = encode_logits(random_dense(4, NUM_CLASSES, HEIGHT, WIDTH), encoding, 3)
    strided = encoded._replace(tensors={**encoded.tensors, "logits": layout(encoded.logits)})
    assert not strided.logits.is_contiguous()
    contiguous = strided.changed(torch.Tensor.contiguous)
    for boxes in (torch.tensor([[0.1, 0.2, 0.7, 0.9]] * 4), torch.tensor([[0.1, 0.2, 0.7, 0.9]]).expand(4, 4)):
        for output_size in (1, (3, 2)):
            got = pool_boxes(strided, boxes, output_size=output_size)
            want = pool_boxes(contiguous, boxes.contiguous(), output_size=output_size)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_training_step_under_autocast_learns_from_full_precision_labels(device, dtype):
    batch = LabelMapBatch.of(label_maps("heatmaps", VIEWS["both"])).to(device)
    model, images = torch.nn.Linear(6, NUM_CLASSES, device=device), torch.rand(4, 6, device=device)
    with torch.autocast(device, dtype):
        labels = batch.pool()
        logits = model(images)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
    loss.backward()
    assert logits.dtype == dtype
    assert torch.equal(labels, batch.pool())
    assert torch.isfinite(model.weight.grad).all()


def test_full_precision_is_free_where_there_is_nothing_to_switch_off():
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.is_autocast_enabled("cpu")
        with full_precision(torch.device("cpu")):
            assert not torch.is_autocast_enabled("cpu")
        with full_precision(torch.device("meta")):  # has no autocast
            assert torch.is_autocast_enabled("cpu")
    assert type(full_precision(torch.device("cpu"))).__name__ == "nullcontext"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_compiled_step_pools_what_an_eager_one_pools(encoding):
    def step(batch, images):
        labels = batch.pool() + pool_boxes(batch.encoded, BOXES, temperature=1.5)
        return torch.nn.functional.cross_entropy(images @ weights, labels / 2)

    weights, images = torch.rand(6, NUM_CLASSES), torch.rand(4, 6)
    compiled = torch.compile(step, backend="eager")
    for views in VIEWS.values():  # several kinds of views, which a compiler must not mistake for constants
        batch = LabelMapBatch.of(label_maps(encoding, views))
        torch.testing.assert_close(compiled(batch, images), step(batch, images), rtol=0, atol=0)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_compiled_function_of_one_map_pools_every_view_of_it(encoding):
    compiled = torch.compile(rd.LabelPooling(), backend="eager")
    for label_map in label_maps(encoding, [UPRIGHT, ROTATED, rd.labels.View(), rd.labels.View(x0=0.5)]):
        assert torch.equal(compiled(label_map), rd.LabelPooling()(label_map))


def test_classes_of_any_integer_dtype_are_pooled_alike():
    classes = random_classes(3, NUM_CLASSES, HEIGHT, WIDTH)[None]
    logits, box = random_dense(1, 3, HEIGHT, WIDTH), torch.tensor([[0.1, 0.2, 0.7, 0.9]])
    want = rd.pool_labels(logits, classes, box, num_classes=NUM_CLASSES)
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32):
        assert torch.equal(rd.pool_labels(logits, classes.to(dtype), box, num_classes=NUM_CLASSES), want)
