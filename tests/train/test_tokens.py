import numpy as np
import pytest
import timm
import torch
from timm.utils.model import unwrap_model
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.train.tokens import MixToken, TokenLabelPooling, TokenStudent, token_label_loss
from tests.labels.samples import ENCODINGS, random_map

VIT = {"depth": 1, "embed_dim": 24, "num_heads": 2, "num_classes": 5, "img_size": 32, "patch_size": 8}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_labels_of_crops_and_tokens_equal_those_of_label_pooling(encoding):
    image, label_map = v2.RandomResizedCrop(16)(torch.zeros(3, 17, 11, dtype=torch.uint8), random_map(encoding))
    got_image, (soft, tokens) = TokenLabelPooling((3, 2))(image, label_map)
    assert got_image is image
    assert torch.equal(soft, rd.LabelPooling()(label_map))
    assert torch.equal(tokens, rd.LabelPooling((3, 2))(label_map))
    assert TokenLabelPooling(4).output_size == (4, 4)


@pytest.mark.parametrize(
    ("name", "arguments", "grid"),
    [
        ("vit_tiny_patch16_224", VIT, (4, 4)),
        ("resnet10t", {"channels": [8, 8, 8, 8], "stem_width": 8, "num_classes": 5}, (1, 1)),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "num_classes": 5}, (1, 1)),
    ],
)
def test_a_student_has_logits_of_all_locations_in_training_and_is_the_classifier_in_evaluation(name, arguments, grid):
    model = timm.create_model(name, **arguments).train()
    student = TokenStudent(model, name, 32)
    assert student.grid == grid
    assert model.training
    images = torch.randn(2, 3, 32, 32)
    soft, tokens = torch.randn(2, 5).softmax(1), torch.randn(2, 5, *grid).softmax(1)
    class_logits, token_logits = student(images)
    assert token_logits.shape == tokens.shape
    token_label_loss(class_logits, token_logits, soft, tokens).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert len(list(student.parameters())) == len(list(model.parameters()))
    student.eval()
    assert torch.equal(student(images), model(images))
    assert unwrap_model(student) is model


def test_class_logits_equal_those_of_the_model():
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", **VIT)
    student = TokenStudent(model, "vit", 32).train()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(student(images)[0], model(images))


def test_the_loss_is_the_cross_entropy_of_crops_plus_half_that_of_tokens():
    class_logits, token_logits = torch.randn(3, 4), torch.randn(3, 4, 2, 5)
    soft, tokens = torch.randn(3, 4).softmax(1), torch.randn(3, 4, 2, 5).softmax(1)
    expected = 0.0
    for b in range(3):
        expected -= float((soft[b] * class_logits[b].log_softmax(0)).sum()) / 3
        for y in range(2):
            for x in range(5):
                loss = -float((tokens[b, :, y, x] * token_logits[b, :, y, x].log_softmax(0)).sum())
                expected += 0.5 * loss / (3 * 2 * 5)
    assert float(token_label_loss(class_logits, token_logits, soft, tokens)) == pytest.approx(expected, rel=1e-5)


def test_mixed_pixels_match_the_labels_of_tokens_and_crops():
    """Each image has one class everywhere, so the label of each token is known."""
    rows, columns, patch, batch = 4, 3, 5, 6
    images = torch.arange(batch, dtype=torch.float32)[:, None, None, None].expand(
        batch, 3, rows * patch, columns * patch
    )
    soft = torch.eye(batch)
    tokens = soft[:, :, None, None].expand(batch, batch, rows, columns)
    shares = set()
    for seed in range(20):
        np.random.seed(seed)  # noqa: NPY002  timm draws from it
        mixed, (mixed_soft, mixed_tokens) = MixToken()(images, (soft, tokens))
        for b in range(batch):
            for y in range(rows):
                for x in range(columns):
                    seen = mixed[b, :, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch].unique()
                    assert len(seen) == 1
                    assert int(mixed_tokens[b, :, y, x].argmax()) == int(seen)
            torch.testing.assert_close(mixed_soft[b], mixed_tokens[b].mean((1, 2)))
        shares.add(round(float(mixed_soft[0, 0]), 3))
    assert len(shares) > 3
    assert torch.equal(images[0], torch.zeros(3, rows * patch, columns * patch))


def test_batches_that_cannot_be_mixed_are_refused():
    tokens = torch.zeros(2, 4, 3, 3)
    with pytest.raises(ValueError, match="20 x 20 pixels cannot be divided into 3 x 3 tokens"):
        MixToken()(torch.zeros(2, 3, 20, 20), (torch.zeros(2, 4), tokens))
    with pytest.raises(ValueError, match="must be even, got 3"):
        MixToken()(torch.zeros(3, 3, 21, 21), (torch.zeros(3, 4), torch.zeros(3, 4, 3, 3)))
    with pytest.raises(ValueError, match="alpha= must be positive"):
        MixToken(0)
