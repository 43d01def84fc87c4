"""Annotators from transformers, with tiny classifiers of random weights in folders like those of the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import ModuleAnnotator
from relabel_datasets.cli import main
from tests.annotate.random_models import settle
from tests.conftest import picture
from tests.versions import installed

transformers = pytest.importorskip("transformers")

SIZE = (64, 96)
CNN = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
SWIN = {"image_size": 64, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 64,
       "patch_size": 16}  # fmt: skip

NEEDS_5 = {"HGNetV2", "PoolFormer"}  # missing in 4.48, or only for contiguous images there
# Family, values of its config, grid of images of SIZE, and whether the head is linear.
FAMILIES = [
    ("ResNet", {**CNN, "layer_type": "basic"}, (2, 3), True),
    ("RegNet", {**CNN, "groups_width": 8}, (2, 3), True),
    ("ConvNext", STAGES, (2, 3), False),
    ("ConvNextV2", STAGES, (2, 3), False),
    ("Swin", SWIN, (8, 12), True),
    ("Swinv2", SWIN, (8, 12), True),
    ("ViT", VIT, (4, 6), False),
    ("DeiT", VIT, (4, 6), False),
    ("DeiTWithTeacher", VIT, (4, 6), False),
    ("Beit", {**VIT, "use_mean_pooling": True}, (4, 6), False),
    ("Beit", {**VIT, "use_mean_pooling": False}, (4, 6), False),
    ("Data2VecVision", VIT, (4, 6), False),
    ("Dinov2", VIT, (4, 6), False),
    ("Dinov2WithRegisters", VIT, (4, 6), False),
    ("MobileNetV1", {"depth_multiplier": 0.25}, (2, 3), True),
    ("MobileNetV2", {"depth_multiplier": 0.35}, (2, 3), True),
    ("EfficientNet", {"width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_dim": 256}, (2, 3), True),
    ("MobileViTV2", {"width_multiplier": 0.5, "image_size": 64}, (2, 3), True),
    ("PoolFormer", STAGES, (2, 3), False),
    ("Segformer", {**STAGES, "num_attention_heads": [1, 1, 1, 1]}, (2, 3), True),
    ("PvtV2", {**STAGES, "num_attention_heads": [1, 1, 1, 1]}, (2, 3), True),
    ("FocalNet", {"image_size": 64, "embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1]}, (8, 12), True),
]


def save(folder: Path, family: str, values: dict[str, object], num_labels: int = 5, **config_args) -> str:
    """Save a classifier with random weights and its image processor; return their folder."""
    if family in NEEDS_5 and installed("transformers") < (5,):
        pytest.skip(f"{family} needs transformers 5, not {transformers.__version__}")
    torch.manual_seed(0)
    config_type = getattr(transformers, f"{family.removesuffix('WithTeacher')}Config")
    model_type = (
        family.removesuffix("WithTeacher") + "ForImageClassification" + ("WithTeacher" if "Teacher" in family else "")
    )
    config = config_type(**values, num_labels=num_labels, architectures=[model_type], **config_args)
    model = getattr(transformers, model_type)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # the default weights are so small that the logits of tiny models are zero
                parameter.normal_(std=(2 / parameter[0].numel()) ** 0.5)
            elif name.endswith(("lambda_1", "lambda_2", "lambda1", "layer_scale_1", "layer_scale_parameter")):
                parameter.fill_(1.0)
    settle(model, (64, 64))
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}, "resample": 3,
        "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


def model_logits(folder: str, annotator: ModuleAnnotator, images: torch.Tensor) -> torch.Tensor:
    """Return the logits of the model in transformers."""
    model = type(annotator._module.model).from_pretrained(folder).eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in (annotator.mean, annotator.std))
    position = {"interpolate_pos_encoding": True}
    with torch.inference_mode():
        try:
            return model((images / 255 - mean) / std, **position).logits
        except TypeError:
            return model((images / 255 - mean) / std).logits


@pytest.mark.parametrize(
    ("family", "values", "grid", "linear"), FAMILIES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_the_mean_over_the_map_is_the_output_of_the_model(family, values, grid, linear, tmp_path):
    folder = save(tmp_path, family, values)
    annotator = rd.HFAnnotator(folder, input_size=SIZE, head="linearised", device="cpu")
    images = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8)
    logits = annotator(images)
    expected = model_logits(folder, annotator, images)
    assert expected.std() > 1e-3
    assert logits.shape == (2, 5, *grid)
    assert annotator.linear_head == linear
    spread = float((logits - logits.mean((2, 3), keepdim=True)).abs().max())
    assert spread > 1e-4
    torch.testing.assert_close(logits.mean((2, 3)), expected, rtol=1e-4, atol=1e-4 * (spread + float(expected.std())))
    local = rd.HFAnnotator(folder, input_size=SIZE, device="cpu")(images)
    assert local.shape == logits.shape
    assert bool((local.mean((2, 3)) - expected).abs().max() < 1e-3 * (spread + expected.std())) == linear


@pytest.mark.parametrize(("family", "values"), [("ViT", VIT), ("Swin", SWIN), ("ResNet", CNN)])
def test_locations_have_their_position_in_the_image(family, values, tmp_path):
    annotator = rd.HFAnnotator(save(tmp_path, family, values), input_size=(128, 192), device="cpu")
    images = torch.randint(0, 256, (1, 3, 128, 192), dtype=torch.uint8).repeat(2, 1, 1, 1)
    images[1, :, :32, -32:] = 255
    change = (annotator(images)[1] - annotator(images)[0]).abs().mean(0)
    height, width = change.shape
    y, x = divmod(int(change.argmax()), width)
    assert y < height / 2
    assert x >= width * 3 / 4 - 1


def test_input_options_override_those_of_the_image_processor(tmp_path):
    folder = save(tmp_path, "ViT", VIT)
    annotator = rd.HFAnnotator(folder, device="cpu")
    assert (annotator.input_size, annotator.interpolation) == ((64, 64), "bicubic")
    assert (annotator.mean, annotator.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    other = rd.HFAnnotator(folder, input_size=32, mean=(0.5,) * 3, interpolation="bilinear", device="cpu")
    assert (other.input_size, other.mean, other.std) == ((32, 32), (0.5,) * 3, (0.4, 0.5, 0.6))
    described = annotator.describe()
    assert json.loads(json.dumps(described)) == described
    assert described.items() >= {"kind": "transformers", "name": tmp_path.name, "head": "local"}.items()
    assert described["linear_head"] is False


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"size": {"shortest_edge": 48}}, (48, 48)),
        ({"size": {"shortest_edge": 80}, "do_center_crop": True, "crop_size": {"height": 64, "width": 32}}, (64, 32)),
    ],
)
def test_input_sizes_are_read_in_all_forms(changes, expected, tmp_path):
    folder = save(tmp_path, "ViT", VIT)
    path = tmp_path / "preprocessor_config.json"
    values = {**json.loads(path.read_text()), "image_processor_type": "ConvNextImageProcessor", **changes}
    if "crop_size" in changes:
        values["image_processor_type"] = "BitImageProcessor"
    path.write_text(json.dumps(values))
    assert rd.HFAnnotator(folder, device="cpu").input_size == expected


def test_classes_are_the_labels_of_the_config(tmp_path):
    assert rd.HFAnnotator(save(tmp_path / "a", "ResNet", CNN), device="cpu").classes is None
    labels = {"id2label": dict(enumerate("abcde")), "label2id": {name: i for i, name in enumerate("abcde")}}
    folder = save(tmp_path / "b", "ResNet", CNN, **labels)
    assert rd.HFAnnotator(folder, device="cpu").classes == tuple("abcde")
    assert rd.HFAnnotator(folder, device="cpu", classes=list("vwxyz")).classes == tuple("vwxyz")


def test_classes_of_imagenet_are_recognized_by_name(tmp_path):
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    names = [info.label_name_to_description(synset) for synset in info.label_names()]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    annotator = rd.HFAnnotator(save(tmp_path, "ResNet", CNN, 1000, **labels), device="cpu")
    assert annotator.classes == tuple(info.label_names())


def test_models_that_cannot_be_split_are_refused_with_the_reason(tmp_path):
    values = {"stem_channels": [3, 8, 8], "hidden_sizes": [8, 8, 8, 8], "stage_in_channels": [8, 8, 8, 8],
              "stage_mid_channels": [8, 8, 8, 8], "stage_out_channels": [8, 8, 8, 8], "stage_num_blocks": [1] * 4}  # fmt: skip
    with pytest.raises(ValueError, match="HGNetV2ForImageClassification has no base model separate from its head"):
        rd.HFAnnotator(save(tmp_path / "a", "HGNetV2", values), device="cpu")
    with pytest.raises(
        ValueError, match=r"its last hidden state \[1, \d+, \d+\] is not a map, and does not match the 4 x 4 patches"
    ):
        rd.HFAnnotator(save(tmp_path / "b", "Levit", {"image_size": 64}), device="cpu")


def test_a_model_without_a_trained_classifier_is_refused(tmp_path):
    folder = save(tmp_path, "ViT", VIT)
    transformers.ViTModel(transformers.ViTConfig(**VIT)).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"has no weights for classifier\.bias, classifier\.weight: choose a model"):
        rd.HFAnnotator(folder, device="cpu")


def test_a_model_without_an_image_processor_requires_all_input_options(tmp_path):
    folder = save(tmp_path, "ViT", VIT)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="has no image processor: set input_size, mean, std and interpolation"):
        rd.HFAnnotator(folder, input_size=64, device="cpu")
    inputs = {"input_size": 64, "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    assert rd.HFAnnotator(folder, **inputs, device="cpu").input_size == (64, 64)


def test_other_rescale_factors_are_refused(tmp_path):
    folder = save(tmp_path, "ViT", VIT)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rescale_factor": 1 / 127.5}))
    with pytest.raises(ValueError, match=r"scales pixels by 0\.0078.*; only 1/255 is supported"):
        rd.HFAnnotator(folder, device="cpu")


def test_a_head_must_be_known():
    with pytest.raises(ValueError, match="head must be one of"):
        rd.HFAnnotator("some/model", head="best")


def test_the_command_builds_with_a_transformers_model(tmp_path, image_folder, capsys):
    names = {"id2label": {0: "emu", 1: "cat", 2: "dog"}, "label2id": {"emu": 0, "cat": 1, "dog": 2}}
    folder = save(tmp_path / "tiny-vit", "ViT", VIT, 3, **names)
    out = str(tmp_path / "out")
    assert main(["build", str(image_folder), out, "--annotator", f"hf:{folder}", "--head", "linearised"]) == 0
    dataset = rd.load_dataset(out, "tiny-vit", split="train")
    assert dataset.classes == ("cat", "dog", "emu")
    assert dataset.label_maps.manifest.annotator["head"] == "linearised"
    annotator = rd.HFAnnotator(folder, head="linearised", device="cpu")
    dense = annotator(annotator.preprocess(picture(1))[None])
    assert dense.shape == (1, 3, 4, 4)


def test_code_in_the_repository_of_a_model_is_not_executed(tmp_path):
    canary = tmp_path / "canary"
    folder = tmp_path / "model"
    save(folder, "ResNet", {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]})
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForImageClassification": "evil.Evil"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n")
    with pytest.raises((ValueError, OSError)):
        rd.HFAnnotator(folder, device="cpu")
    assert not canary.exists()
