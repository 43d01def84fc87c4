"""Dense classification with hand-made classifiers whose maps can be computed independently."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from relabel_datasets.annotate.heads import DenseClassifier, Stream

B, C, D = 2, 5, 6  # images, classes, features


class TwoLayers(nn.Module):
    """Nonlinear head: a norm, a layer with activation, and a linear layer."""

    def __init__(self, dim: int = D) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 8), nn.GELU(), nn.Linear(8, C))

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.layers(pooled)


def dense_classifier(features, pool, streams, head=None, mode="linearised") -> DenseClassifier:
    """Return a classifier with constant features whose logits are `head(pool(features))`."""
    head = (head or TwoLayers()).requires_grad_(False)
    return DenseClassifier(head, "made", lambda images: features, lambda f: head(pool(f)), lambda *_: streams, mode)


def jacobian(function, at: torch.Tensor) -> torch.Tensor:
    return torch.autograd.functional.jacobian(function, at)


IMAGES = torch.zeros(B, 3, 8, 8)
LAYOUTS = {
    "NCHW": (torch.Size([B, D, 3, 4]), lambda f: f.mean((2, 3))),
    "NHWC": (torch.Size([B, 3, 4, D]), lambda f: f.mean((1, 2))),
    "NLC": (torch.Size([B, 12, D]), lambda f: f.mean(1)),
    "NCL": (torch.Size([B, D, 12]), lambda f: f.mean(2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_linearized_maps_are_the_expansion_of_the_head_around_the_mean(layout):
    shape, pool = LAYOUTS[layout]
    features = torch.randn(shape)
    stream = Stream(layout, (3, 4))
    dense = dense_classifier(features, pool, [stream])
    maps = stream.map(features)
    logits = dense(IMAGES)
    assert logits.shape == (B, C, 3, 4)
    assert not dense.linear_head
    for b in range(B):
        mean = maps[b].mean((1, 2))
        slope = jacobian(dense.model, mean)
        for y in range(3):
            for x in range(4):
                expected = dense.model(mean) + slope @ (maps[b, :, y, x] - mean)
                torch.testing.assert_close(logits[b, :, y, x], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits.mean((2, 3)), dense.model(pool(features)))
    local = dense_classifier(features, pool, [stream], dense.model, "local")(IMAGES)
    torch.testing.assert_close(local, dense.model(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_the_derivative_is_taken_at_the_class_token():
    features = torch.randn(B, 2 + 12, D)  # a class token and a register
    dense = dense_classifier(features, lambda f: f[:, 0], [Stream("NLC", (3, 4), 2)])
    logits = dense(IMAGES)
    tokens = features[:, 2:]
    for b in range(B):
        slope = jacobian(dense.model, features[b, 0])
        expected = dense.model(features[b, 0]) + (tokens[b] - tokens[b].mean(0)) @ slope.T
        torch.testing.assert_close(logits[b].flatten(1).T, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits.mean((2, 3)), dense.model(features[:, 0]))


def test_heads_that_use_more_than_means_are_linearized_on_all_features():
    """With a maximum over locations, as in VOLO, logits change only at the maximum."""
    features = torch.randn(B, D, 3, 4)
    dense = dense_classifier(features, lambda f: f.amax((2, 3)), [Stream("NCHW", (3, 4))])
    logits = dense(IMAGES)
    highest = features.amax((2, 3))
    torch.testing.assert_close(logits.mean((2, 3)), dense.model(highest))
    for b in range(B):
        change = features[b] - features[b].mean((1, 2), keepdim=True)
        expected = dense.model(highest[b])[:, None] + jacobian(dense.model, highest[b]) @ change.flatten(1)
        torch.testing.assert_close(logits[b].flatten(1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["local", "linearised"])
def test_many_locations_are_processed_in_parts(mode, monkeypatch):
    features = torch.randn(B, D, 3, 4)
    dense = dense_classifier(features, lambda f: f.mean((2, 3)), [Stream("NCHW", (3, 4))], mode=mode)
    whole = dense(IMAGES)
    monkeypatch.setattr("relabel_datasets.annotate.heads._MAX_ROWS", 7)  # of 24
    torch.testing.assert_close(dense(IMAGES), whole)


def several() -> tuple[list[torch.Tensor], list[Stream]]:
    tensors = [torch.randn(B, 1 + 20, 4), torch.randn(B, D, 2, 3), torch.randn(B, 3, 7)]
    return tensors, [Stream("NLC", (4, 5), 1), Stream("NCHW", (2, 3)), Stream("NCL", None)]


def test_multiple_streams_are_resampled_to_the_coarsest_grid():
    tensors, streams = several()
    head = nn.Linear(4 + D + 3, C)

    def pool(features):
        return torch.cat([features[0][:, 1:].mean(1), features[1].mean((2, 3)), features[2].mean(2)], dim=1)

    dense = dense_classifier(tensors, pool, streams, head)
    logits = dense(IMAGES)
    assert dense.linear_head
    assert dense.grid == logits.shape[2:] == (2, 3)
    torch.testing.assert_close(logits.mean((2, 3)), head(pool(tensors)))
    weight = head.weight[:, :4]
    fine = torch.einsum("cd,bhwd->bchw", weight, tensors[0][:, 1:].reshape(B, 4, 5, 4))
    coarse = torch.einsum("cd,bdhw->bchw", head.weight[:, 4 : 4 + D], tensors[1])
    upper_left = (fine[..., :2, 0] + fine[..., :2, 1] * 2 / 3).mean(-1) / (5 / 3)
    rest = torch.einsum("cd,bd->bc", head.weight[:, 4 + D :], tensors[2].mean(2)) + head.bias
    torch.testing.assert_close(logits[..., 0, 0], upper_left + coarse[..., 0, 0] + rest)


def test_multiple_streams_are_linearized_together():
    tensors, streams = several()
    head = TwoLayers(4 + D + 3)

    def pool(features):
        return torch.cat([features[0][:, 0], features[1].mean((2, 3)), features[2].mean(2)], dim=1)

    dense = dense_classifier(tensors, pool, streams, head)
    logits = dense(IMAGES)
    assert not dense.linear_head
    torch.testing.assert_close(logits.mean((2, 3)), head(pool(tensors)), rtol=1e-4, atol=1e-5)
    assert logits.flatten(2).std(-1).min() > 0


def test_the_mean_is_exact_under_autocast_and_inference_mode():
    features = torch.randn(B, D, 3, 4)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        dense = dense_classifier(features.clone(), lambda f: f.mean((2, 3)), [Stream("NCHW", (3, 4))])
        logits = dense(IMAGES)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.mean((2, 3)), dense.model(features.mean((2, 3))), rtol=1e-5, atol=1e-5)


def test_features_without_positions_are_refused():
    features = torch.randn(B, D, 12)
    with pytest.raises(ValueError, match="made cannot annotate: its features are not a map of locations"):
        dense_classifier(features, lambda f: f.mean(2), [Stream("NCL", None)])(IMAGES)


def test_heads_without_pooling_are_refused():
    features = torch.randn(B, D, 3, 4)
    dense = dense_classifier(features, lambda f: f.flatten(2).transpose(1, 2), [Stream("NCHW", (3, 4))])
    for _ in range(2):  # the failed first call leaves no partial state
        with pytest.raises(ValueError, match="its head does not pool features, see global_pool"):
            dense(IMAGES)


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"head must be one of \['local', 'linearised'\], got 'exact'"):
        dense_classifier(torch.zeros(1), None, [], mode="exact")
    with pytest.raises(ValueError, match="layout must be NCHW, NHWC, NLC or NCL, got 'CHW'"):
        Stream("CHW", (1, 1))
