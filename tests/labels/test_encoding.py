import math

import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.labels.encoding import crop_probabilities, encode_logits, quantize_heatmaps

from .samples import ENCODINGS, HEIGHT, NUM_CLASSES, WIDTH, random_dense


def softmax(logits):
    powers = [math.exp(value - max(logits)) for value in logits]
    return [power / sum(powers) for power in powers]


def reference_crop_probabilities(dense):
    """Plain loops over the crops of one `[C, H, W]` map."""
    num_classes, height, width = dense.shape
    total = [0.0] * num_classes
    for share in (0.2, 0.33, 0.53, 0.73):
        crop_height, crop_width = max(1, round(height * share)), max(1, round(width * share))
        labels = [
            softmax(dense[:, top : top + crop_height, left : left + crop_width].mean((1, 2)).tolist())
            for top in range(0, height - crop_height + 1, max(1, height // 7))
            for left in range(0, width - crop_width + 1, max(1, width // 7))
        ]
        total = [t + sum(label[c] for label in labels) / len(labels) / 4 for c, t in enumerate(total)]
    return total


def reference_heatmaps(dense, k):
    """Return classes, heatmaps and base of one map by the words of the docstrings, in float64."""
    weight = torch.tensor(reference_crop_probabilities(dense), dtype=torch.float64)
    classes = weight.argsort(descending=True)[:k]
    base = dense.mean((1, 2))
    rest = weight.clone()
    rest[classes] = 0
    if rest.sum() > 0:
        rest /= rest.sum()
    common = sum(rest[c] * (dense[c] - base[c]) for c in range(len(dense)))
    return classes, torch.stack([dense[c] - common for c in classes]), base


@pytest.mark.parametrize("shape", [(NUM_CLASSES, HEIGHT, WIDTH), (6, 15, 14), (6, 1, 9), (4, 1, 1)])
def test_crop_probabilities_are_those_of_plain_loops(shape):
    dense = random_dense(2, *shape, dtype=torch.float64)
    for one, got in zip(dense, crop_probabilities(dense), strict=True):
        assert got.tolist() == pytest.approx(reference_crop_probabilities(one))
        assert got.sum() == pytest.approx(1)


@pytest.mark.parametrize("shape", [(NUM_CLASSES, HEIGHT, WIDTH), (6, 15, 14), (4, 1, 1), (2, 3, 5)])
@pytest.mark.parametrize("k", [1, 3])
def test_heatmaps_are_those_of_the_slow_reference(shape, k):
    dense = random_dense(*shape, dtype=torch.float64)
    encoded = encode_logits(dense[None], "heatmaps", k)
    classes, heatmaps, base = reference_heatmaps(dense, min(k, shape[0]))
    assert encoded.classes[0, :, 0, 0].tolist() == classes.tolist()
    torch.testing.assert_close(encoded.logits[0].double(), heatmaps, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoded.base[0].double(), base, rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [None, 1, 4, NUM_CLASSES, 99])
def test_the_mean_of_a_heatmaps_map_is_the_mean_of_the_dense_logits(k):
    dense = random_dense()
    label_map = rd.LabelMap.from_logits(dense, k=k)
    torch.testing.assert_close(label_map.dense().mean((1, 2)), dense.mean((1, 2)), rtol=0, atol=1e-5)


def test_heatmaps_keep_the_logits_up_to_a_constant_of_each_location():
    dense = random_dense()
    label_map = rd.LabelMap.from_logits(dense, k=4)
    common = dense[label_map.classes[:, 0, 0]] - label_map.logits
    torch.testing.assert_close(common, common[:1].expand_as(common), rtol=0, atol=1e-5)
    assert common[0].mean().abs() < 1e-5


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_all_classes_kept_give_the_dense_logits_back(encoding):
    dense = random_dense()
    label_map = rd.LabelMap.from_logits(dense, encoding, k=NUM_CLASSES)
    torch.testing.assert_close(label_map.dense(), dense, rtol=0, atol=1e-5)


def test_topk_keeps_the_best_classes_of_each_location_best_first():
    dense = random_dense()
    encoded = encode_logits(dense[None], "topk")
    assert encoded.base is None
    for y in range(HEIGHT):
        for x in range(WIDTH):
            best = sorted(range(NUM_CLASSES), key=lambda c: -dense[c, y, x])[:5]
            assert encoded.classes[0, :, y, x].tolist() == best
            assert encoded.logits[0, :, y, x].tolist() == dense[best, y, x].tolist()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 1, 1), (3, 1, 6)])
def test_no_more_classes_are_kept_than_there_are(encoding, shape):
    encoded = encode_logits(random_dense(2, *shape), encoding, 10)
    assert encoded.logits.shape == (2, *shape)
    assert encoded.classes.sort(1).values[:, :, 0, 0].tolist() == [list(range(shape[0]))] * 2
    assert torch.isfinite(encoded.logits).all()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_what_is_kept_is_float32_logits_and_int64_classes_of_any_dtype(encoding, dtype):
    encoded = encode_logits(random_dense(1, NUM_CLASSES, HEIGHT, WIDTH).to(dtype), encoding)
    assert (encoded.logits.dtype, encoded.classes.dtype) == (torch.float32, torch.int64)
    assert encoded.classes.shape[2:] == ((HEIGHT, WIDTH) if encoded.base is None else (1, 1))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_batch_is_its_images_one_by_one_and_the_same_on_every_run(encoding):
    dense = random_dense(4, NUM_CLASSES, HEIGHT, WIDTH)
    encoded, again = encode_logits(dense, encoding, 3), encode_logits(dense.clone(), encoding, 3)
    for part, same in zip(encoded[:2], again[:2], strict=True):
        assert torch.equal(part, same)
    for i in range(4):
        single = encode_logits(dense[i : i + 1], encoding, 3)
        assert torch.equal(single.classes[0], encoded.classes[i])
        torch.testing.assert_close(single.logits[0], encoded.logits[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_empty_batch_gives_an_empty_batch(encoding):
    encoded = encode_logits(random_dense(0, NUM_CLASSES, HEIGHT, WIDTH), encoding, 3)
    assert encoded.logits.shape == (0, 3, HEIGHT, WIDTH)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_dense_logits_are_not_written_to(encoding):
    dense = random_dense(1, NUM_CLASSES, HEIGHT, WIDTH)
    version = dense._version
    encode_logits(dense, encoding)
    assert dense._version == version


@pytest.mark.parametrize(
    ("dense", "arguments", "message"),
    [
        (torch.zeros(2, 3, 4), (), r"must be \[B, C, H, W\]"),
        (torch.zeros(1, 2, 0, 4), (), "with no empty side"),
        (torch.zeros(1, 2, 3, 4), ("svd",), r"encoding must be one of \['heatmaps', .*'topk'\], got 'svd'"),
        (torch.zeros(1, 2, 3, 4), ("topk", 0), "k must be at least 1, got 0"),
        (torch.full((1, 2, 3, 4), torch.nan), (), "must be finite"),
        (torch.full((1, 2, 3, 4), -torch.inf), ("topk",), "must be finite"),
    ],
)
def test_what_cannot_be_encoded_is_refused(dense, arguments, message):
    with pytest.raises(ValueError, match=message):
        encode_logits(dense, *arguments)


def reference_dither(heatmap, low, high, levels):
    """Floyd and Steinberg's error diffusion of one `[H, W]` heatmap, in reading order."""
    height, width = heatmap.shape
    target = ((heatmap - low) / ((high - low) / (levels - 1))).tolist()
    out = torch.zeros(height, width, dtype=torch.uint8)
    for y in range(height):
        for x in range(width):
            level = min(max(round(target[y][x]), 0), levels - 1)
            error = target[y][x] - level
            out[y, x] = level
            for dy, dx, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if y + dy < height and 0 <= x + dx < width:
                    target[y + dy][x + dx] += error * share / 16
    return out


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (5, 9), (1, 8), (8, 1), (1, 1)])
@pytest.mark.parametrize("levels", [16, 256])
def test_quantisation_passes_errors_on_like_floyd_and_steinberg(size, levels):
    heatmaps = random_dense(2, 3, *size, dtype=torch.float64)
    low, high = heatmaps.amin((2, 3)) - 0.1, heatmaps.amax((2, 3)) + 0.1
    got = quantize_heatmaps(heatmaps, low, high, levels)
    assert got.dtype == torch.uint8
    for b in range(2):
        for k in range(3):
            assert torch.equal(got[b, k], reference_dither(heatmaps[b, k], low[b, k], high[b, k], levels))


def test_a_constant_heatmap_is_all_lowest_level():
    constant = torch.full((1, 1, HEIGHT, WIDTH), 2.5)
    assert quantize_heatmaps(constant, constant[:, :, 0, 0], constant[:, :, 0, 0], 16).max() == 0
