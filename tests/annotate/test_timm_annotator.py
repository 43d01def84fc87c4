"""Annotators from timm classifiers: real architectures, mostly with random weights."""

from __future__ import annotations

import io
import json
import logging
import math
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from safetensors.torch import save_file

from relabel_datasets import LabelMap
from relabel_datasets.annotate.timm_annotator import TimmAnnotator
from relabel_datasets.annotate.timm_models import make_dense
from tests.conftest import picture

SIZE = (96, 128)
# Warnings in the code of timm that resizes relative position biases.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning"),
]


@dataclass(frozen=True)
class Family:
    """Small model of one feature layout, and its properties according to its paper."""

    name: str
    layout: str  # "2+NLC" has two prefix tokens
    stride: int
    linear: bool
    args: dict[str, object] = field(default_factory=dict)
    size: tuple[int, int] = SIZE


FAMILIES = [
    Family("test_resnet", "NCHW", 32, True),
    Family("test_efficientnet", "NCHW", 32, True),
    Family("regnetx_002", "NCHW", 32, True),
    Family("test_byobnet", "NCHW", 32, True),
    Family("test_maxvit", "NCHW", 32, True),  # supports one size only
    Family("mobilenetv3_small_050", "NCHW", 32, False),  # a layer with activation after pooling
    Family("test_convnext", "NCHW", 32, False),  # a norm after pooling
    Family(
        "swin_tiny_patch4_window7_224", "NHWC", 32, True,
        {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]},
    ),
    Family("test_mambaout", "NHWC", 32, False),
    Family("test_vit", "1+NLC", 16, False),
    Family("test_vit", "1+NLC", 16, False, {"dynamic_img_size": True}),
    Family("test_vit", "0+NLC", 16, True, {"global_pool": "avg", "class_token": False, "fc_norm": False}),
    Family("test_vit", "1+NLC", 16, True, {"global_pool": "avg", "fc_norm": False}),
    Family("vit_tiny_patch16_224", "5+NLC", 16, False, {"global_pool": "map", "reg_tokens": 4, "depth": 1}),
    Family("deit_tiny_distilled_patch16_224", "2+NLC", 16, False, {"depth": 1}),
    Family("mixer_s32_224", "0+NLC", 32, True),
    Family("volo_d1_224", "1+NLC", 16, False),
    Family("levit_128s", "0+NLC", 64, True, {}, (128, 192)),
]  # fmt: skip


def make(family: Family, **arguments) -> TimmAnnotator:
    annotator = TimmAnnotator(family.name, input_size=family.size, device="cpu", **family.args, **arguments)
    generator = torch.Generator().manual_seed(1)
    for parameter in annotator._module.parameters():  # some heads are initialized with zeros
        if parameter.ndim == 2 and len(parameter) == annotator.num_classes:
            parameter.normal_(std=0.1, generator=generator)
    return annotator


@pytest.fixture(params=FAMILIES, ids=lambda family: f"{family.name}-{family.layout}", scope="module")
def family(request) -> Family:
    return request.param


@pytest.fixture(scope="module")
def annotator(family) -> TimmAnnotator:
    torch.manual_seed(0)
    return make(family)


def random_images(annotator: TimmAnnotator, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, *annotator.input_size), dtype=torch.uint8)


def normalize(annotator: TimmAnnotator, images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (annotator.mean, annotator.std))
    return (images / 255 - mean) / std


def features_at(family: Family, features: torch.Tensor, y: int, x: int) -> torch.Tensor:
    """Return the features of one location in the layout that the head of the model expects."""
    if family.layout == "NCHW":
        return features[:, :, y : y + 1, x : x + 1]
    if family.layout == "NHWC":
        return features[:, y : y + 1, x : x + 1, :]
    num_prefix = int(family.layout[0])
    token = num_prefix + y * math.ceil(family.size[1] / family.stride) + x
    return torch.cat([features[:, token : token + 1]] * (1 + num_prefix), dim=1)


def test_the_head_of_the_model_is_applied_at_every_location(family, annotator):
    height, width = (math.ceil(side / family.stride) for side in family.size)
    assert height != width
    images = random_images(annotator)
    logits = annotator(images)
    assert logits.shape == (2, 1000, height, width)
    assert logits.dtype == torch.float32
    assert annotator.map_size == (height, width)
    model = annotator._module.model
    with torch.inference_mode():
        features = model.forward_features(normalize(annotator, images))
        for y, x in {(0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1), (1, 1)}:
            expected = model.forward_head(features_at(family, features, y, x))
            torch.testing.assert_close(logits[..., y, x], expected, rtol=1e-4, atol=1e-4)


def test_the_mean_over_the_map_of_a_linear_head_is_the_output_of_the_model(family, annotator):
    images = random_images(annotator)
    with torch.inference_mode():
        expected = annotator._module.model(normalize(annotator, images))
    mean = annotator(images).mean((2, 3))
    assert expected.std() > 0
    assert annotator.linear_head == family.linear
    assert bool((mean - expected).abs().max() < 1e-3 * expected.std()) == family.linear


def test_the_output_of_the_model_is_its_head_applied_to_its_features(family, annotator):
    images = normalize(annotator, random_images(annotator))
    model = annotator._module.model
    with torch.inference_mode():
        torch.testing.assert_close(model(images), model.forward_head(model.forward_features(images)))


def test_many_locations_are_processed_in_parts(monkeypatch):
    annotator = make(FAMILIES[0])
    images = random_images(annotator)
    whole = annotator(images)
    monkeypatch.setattr("relabel_datasets.annotate.heads._MAX_ROWS", 7)  # of 2 x 3 x 4
    torch.testing.assert_close(annotator(images), whole)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[7], FAMILIES[9]], ids=lambda family: family.name)
def test_low_precision_returns_close_float32_logits(family, dtype):
    annotator, low = (make(family, dtype=dtype) for dtype in ("float32", dtype))
    low._module.load_state_dict(annotator._module.state_dict())
    images = random_images(annotator)
    exact, rounded = annotator(images), low(images)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).abs().mean() < 0.05 * exact.std()
    assert low.linear_head == annotator.linear_head


def test_defaults_are_those_of_the_model():
    annotator = TimmAnnotator("inception_v3.tf_in1k", aux_logits=False, device="cpu")
    assert annotator.input_size == (299, 299)
    assert annotator.mean == (0.5, 0.5, 0.5)
    assert annotator.interpolation == "bicubic"
    assert TimmAnnotator("test_vit", img_size=96, device="cpu").input_size == (96, 96)


def test_arguments_override_defaults():
    annotator = TimmAnnotator(
        "test_resnet", input_size=(64, 96), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear",
        device="cpu", num_classes=7, classes=tuple("abcdefg"),
    )  # fmt: skip
    described = annotator.describe()
    assert json.loads(json.dumps(described)) == described
    expected = {
        "kind": "timm",
        "name": "test_resnet",
        "input_size": [64, 96],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "interpolation": "bilinear",
        "dtype": "float32",
        "model_args": {"num_classes": 7},
        "head": "local",
        "linear_head": True,
        "num_classes": 7,
    }
    assert described.items() >= expected.items()
    assert annotator.classes == tuple("abcdefg")


def test_classes_are_those_of_imagenet_for_a_head_of_imagenet():
    assert TimmAnnotator("test_resnet", input_size=64, device="cpu").classes[:2] == ("n01440764", "n01443537")
    assert TimmAnnotator("test_resnet", input_size=64, device="cpu", num_classes=10).classes is None
    imagenet_21k = TimmAnnotator("test_resnet", input_size=64, device="cpu", num_classes=21843)
    assert (
        imagenet_21k.classes is None
    )  # the number of classes is that of an ImageNet variant, but not that of the config


def test_random_weights_log_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        TimmAnnotator("test_resnet", input_size=64, device="cpu")
    assert "test_resnet has random weights" in caplog.text


def test_model_kwargs_must_be_json_values():
    with pytest.raises(TypeError, match="model_kwargs are stored in the manifest and must be JSON values"):
        TimmAnnotator("test_resnet", act_layer=torch.nn.ReLU)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("test_resnet", {"num_classes": 0}, "test_resnet has no classifier"),
        ("test_vit", {"global_pool": ""}, "its head does not pool features, see global_pool"),
    ],
)
def test_models_without_a_map_are_refused(name, args, message):
    with pytest.raises(ValueError, match=message):
        TimmAnnotator(name, device="cpu", **args)


class OddModel(torch.nn.Module):
    """Model of an unknown family with given features."""

    def __init__(self, features) -> None:
        super().__init__()
        self.features = features

    def forward_features(self, images):
        return self.features

    def forward_head(self, features):
        return torch.zeros(1, 2)


class OddModelWithMaps(OddModel):
    def forward_intermediates(self, images, **arguments):
        return [torch.zeros(1, 6, 2, 2), torch.zeros(1, 8, 3, 4)]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (OddModel({"a": 1}), "its features are a str, not maps of locations"),
        (
            OddModel([torch.zeros(1, 6, 2, 2), torch.zeros(1, 8)]),
            "its features are a 2-D tensor, not maps of locations",
        ),
        (OddModel([]), "its features are empty, not maps"),
        (OddModel(torch.zeros(1, 12, 8)), "the positions of its tokens are unknown"),
        (
            OddModelWithMaps([torch.zeros(1, 10, 8)]),
            "its features are 10 tokens, which are not a map of 2 x 2 or 3 x 4 locations",
        ),
    ],
)
def test_features_without_a_map_are_refused_with_the_reason(model, message):
    with pytest.raises(ValueError, match=f"odd cannot annotate: .*{message}"):
        make_dense(model, "odd", "local")(torch.zeros(1, 3, 8, 8))


def test_the_head_is_recorded_and_checked():
    local, linearized = (make(FAMILIES[6], head=head) for head in ("local", "linearised"))
    assert (local.describe()["head"], linearized.describe()["head"]) == ("local", "linearised")
    images = random_images(local)
    with torch.inference_mode():
        expected = linearized._module.model(normalize(linearized, images))
    torch.testing.assert_close(linearized(images).mean((2, 3)), expected, rtol=1e-4, atol=1e-4)
    linearized._module.load_state_dict(local._module.state_dict())
    assert not torch.allclose(linearized(images), local(images), atol=1e-3)
    with pytest.raises(ValueError, match=r"head must be one of \['local', 'linearised'\], got 'mean'"):
        TimmAnnotator("test_resnet", head="mean")


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("convit_tiny", {"depth": 3}, r"convit_tiny fails for images of \[96, 128\] pixels"),
        ("nest_tiny", {}, r"nest_tiny does not support input_size=\(96, 128\), only \(224, 224\): "),
    ],
)
def test_unsupported_input_sizes_are_refused(name, args, message):
    with pytest.raises(ValueError, match=message):
        TimmAnnotator(name, input_size=SIZE, device="cpu", **args)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=3).state_dict(), path)
    return path


def test_a_checkpoint_is_loaded_and_adapted_to_the_input_size(checkpoint):
    arguments = {"checkpoint": checkpoint, "num_classes": 3, "device": "cpu"}
    own, resized = (TimmAnnotator("test_vit", input_size=size, **arguments) for size in (None, SIZE))
    assert (own.map_size, resized.map_size) == ((10, 10), (6, 8))
    weights, others = own._module.state_dict(), resized._module.state_dict()
    assert weights["model.pos_embed"].shape != others["model.pos_embed"].shape
    assert all(torch.equal(weights[name], others[name]) for name in weights if name != "model.pos_embed")


def test_equal_weights_have_equal_descriptions_in_any_file_format(checkpoint, tmp_path):
    other = tmp_path / "other.pth"
    torch.save({"state_dict": timm.models.load_state_dict(str(checkpoint))}, other)
    described = [
        TimmAnnotator("test_vit", checkpoint=path, num_classes=3, device="cpu").describe()
        for path in (checkpoint, str(other))
    ]
    assert described[0] == described[1]
    save_file(timm.create_model("test_vit", num_classes=3).state_dict(), checkpoint)
    third = TimmAnnotator("test_vit", checkpoint=checkpoint, num_classes=3, device="cpu").describe()
    assert described[0] != third


def test_errors_name_a_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint '.*nowhere\.pth' for test_resnet: check the path"):
        TimmAnnotator("test_resnet", checkpoint=tmp_path / "nowhere.pth")


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_checkpoint_of_another_model_is_refused(checkpoint, name):
    with pytest.raises(
        ValueError, match=rf"checkpoint '.*vit\.safetensors' does not fit {name} with {{}}: give .*(Missing|size)"
    ):
        TimmAnnotator(name, checkpoint=checkpoint)


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pth"])
def test_invalid_checkpoint_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=rf"checkpoint '.*{name}' does not fit test_resnet"):
        TimmAnnotator("test_resnet", checkpoint=tmp_path / name)


def test_pretrained_and_checkpoint_are_mutually_exclusive(checkpoint):
    with pytest.raises(ValueError, match="use pretrained=True or a checkpoint, not both"):
        TimmAnnotator("test_vit", pretrained=True, checkpoint=checkpoint)


@pytest.fixture(scope="module")
def mobilenet(real_data) -> TimmAnnotator:
    return TimmAnnotator(
        "mobilenetv2_100", checkpoint=real_data / "mobilenetv2_100.safetensors", input_size=(224, 288),
        mean=(0.5,) * 3, std=(0.5,) * 3, pad_type="same", device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def real_images(real_data) -> list[tuple[PIL.Image.Image, str]]:
    """Images of each of 10 classes with their synsets."""
    images = []
    with tarfile.open(real_data / "imagenette-train.tar") as tar:
        members = [member for member in tar if member.isfile()]
        for member in members[:: len(members) // 40]:
            image = PIL.Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
            images.append((image, member.name.split("/")[1]))
    return images


def test_the_mean_over_the_map_of_a_real_annotator_is_its_correct_output(mobilenet, real_images):
    images = torch.stack([mobilenet.preprocess(image) for image, _ in real_images])
    logits = mobilenet(images)
    with torch.inference_mode():
        own = mobilenet._module.model(normalize(mobilenet, images))
    assert logits.shape[1:] == (1000, 7, 9)
    assert mobilenet.linear_head
    torch.testing.assert_close(logits.mean((2, 3)), own, rtol=1e-4, atol=1e-4)
    rows = [mobilenet.classes.index(synset) for _, synset in real_images]
    assert np.mean(own.argmax(1).tolist() == np.array(rows)) > 0.5


def test_maps_of_a_real_annotator_locate_objects(mobilenet, real_images):
    """The class of an image in the lower right of a gray one is found there."""
    image, synset = next(pair for pair in real_images if mobilenet(mobilenet.preprocess(pair[0])[None])
                         .mean((2, 3)).argmax() == mobilenet.classes.index(pair[1]))  # fmt: skip
    canvas = PIL.Image.new("RGB", (288, 224), (128, 128, 128))
    canvas.paste(image.resize((128, 112)), (160, 112))
    heat = mobilenet(mobilenet.preprocess(canvas)[None])[0].softmax(0)[mobilenet.classes.index(synset)]
    y, x = divmod(int(heat.argmax()), heat.shape[1])
    assert y >= 3
    assert x >= 5


@pytest.mark.slow
def test_maps_of_the_annotator_of_the_paper_survive_storage():
    annotator = TimmAnnotator("tf_efficientnet_l2.ns_jft_in1k_475", device="cpu")
    assert annotator.input_size == (475, 475)
    assert annotator.linear_head
    dense = annotator(annotator.preprocess(picture(0, (375, 500)))[None])
    assert dense.shape == (1, 1000, 15, 15)
    label_map = LabelMap.from_logits(dense[0], "topk", k=5, canvas_size=(375, 500))
    again = LabelMap.from_safetensors(label_map.to_safetensors())
    assert again.shape == (5, 15, 15)
    assert torch.equal(again.classes, label_map.classes)
    torch.testing.assert_close(again.logits, label_map.logits, rtol=1e-3, atol=1e-3)


def test_an_unknown_model_is_refused_with_similar_names():
    with pytest.raises(ValueError, match=r"no model 'resnet1o'.*resnet1"):
        TimmAnnotator("resnet1o")
