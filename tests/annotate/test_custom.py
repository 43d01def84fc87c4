"""Annotators of command line options: custom ones, several sizes, mirror images."""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import relabel_datasets as rd
from relabel_datasets.annotate.custom import load_annotator
from relabel_datasets.cli.annotator_options import add_annotator_arguments, annotator_from
from tests.conftest import picture

SOURCE = """
    import torch
    from relabel_datasets import ModuleAnnotator

    def make_module():
        return torch.nn.Conv2d(3, 4, kernel_size=16, stride=16)

    def make_annotator():
        return ModuleAnnotator(make_module(), 64, device="cpu", name="mine")

    def make_nothing():
        return 3

    def make_half():
        class Half:
            classes, num_classes = None, 3
            def __call__(self, images): ...
        return Half()

    number = 3
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    path = tmp_path / "my_models.py"
    path.write_text(textwrap.dedent(SOURCE))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield str(path)
    sys.modules.pop("my_models", None)


def choose(*arguments: str):
    parser = argparse.ArgumentParser()
    add_annotator_arguments(parser)
    return annotator_from(parser.parse_args(arguments))


@pytest.mark.parametrize("module", ["my_models", "{source}"])
def test_a_function_may_return_an_annotator_or_a_module(source, module):
    module = module.format(source=source)
    assert choose("--annotator", f"{module}:make_annotator").describe()["name"] == "mine"
    annotator = choose(
        "--annotator", f"{module}:make_module", "--input-size", "32", "48", "--mean", "0.5", "0.5", "0.5"
    )
    assert (annotator.map_size, annotator.num_classes, annotator.mean) == ((2, 3), 4, (0.5, 0.5, 0.5))
    assert annotator.describe()["name"] == "make_module"


def test_classes_come_from_a_file(source, tmp_path):
    (tmp_path / "classes.txt").write_text("a\nb\n\nc \nd\n")
    options = ["--input-size", "32", "--classes-file", str(tmp_path / "classes.txt")]
    assert choose("--annotator", f"{source}:make_module", *options).classes == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("{source}:nothing", [], "my_models.py has no function 'nothing'"),
        ("{source}:number", [], "has no function 'number'"),
        ("no_such_module:make", [], "cannot import 'no_such_module' of 'no_such_module:make'"),
        ("nowhere/models.py:make", [], "there is no file 'nowhere/models.py'"),
        ("{source}:make_nothing", [], "must return an annotator or a torch module, got int without classes"),
        ("{source}:make_half", [], "got Half without preprocess, describe"),
        ("{source}:make_module", [], "whose input size is unknown: set input_size="),
        ("{source}:make_annotator", ["--input-size", "64"], "has its own input_size"),
        ("{source}:make_module", ["--checkpoint", "x.pt"], "--checkpoint only applies to a timm model.*: leave it out"),
        ("{source}:make_module", ["--head", "linearised"], "--head only applies to a timm model"),
        (
            "hf:some/model",
            ["--model-kwargs", "a=1"],
            "--model-kwargs only applies to a timm model, got --annotator hf:some/model",
        ),
        ("test_resnet", ["--input-size", "1", "2", "3"], "--input-size must be one side, or height and width"),
    ],
)
def test_invalid_functions_and_options_are_refused(source, spec, options, message):
    with pytest.raises(ValueError, match=message):
        choose("--annotator", spec.format(source=source), *options)


def test_errors_of_the_users_module_are_not_changed(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_library\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        load_annotator(f"{tmp_path / 'broken.py'}:make")


def test_scales_and_flips_create_an_ensemble(source):
    options = ["--annotator", f"{source}:make_module", "--input-size", "64", "96", "--scales", "0.5", "1", "1.3"]
    annotator = choose(*options, "--flip")
    assert [member.annotator.input_size for member in annotator.annotators] == [(32, 48), (64, 96), (80, 128)]
    images = torch.stack([annotator.preprocess(picture(0))])
    assert annotator(images).shape == (1, 4, 5, 8)
    assert all(member["flip_averaged"] for member in annotator.describe()["annotators"])
    assert isinstance(choose(*options[:4], "64", "--flip"), rd.annotate.FlipAveraged)


def weights(folder, *seeds):
    paths = []
    for seed in seeds:
        torch.manual_seed(seed)
        paths.append(str(folder / f"{seed}.safetensors"))
        save_file(timm.create_model("mobilenetv3_small_050", num_classes=3).state_dict(), paths[-1])
    return paths


def test_several_annotators_create_an_ensemble_each_with_its_own_options(tmp_path):
    first, second = weights(tmp_path, 0, 1)
    shared = ["--model-kwargs", "num_classes=3", "--device", "cpu", "--std", "0.2", "0.3", "0.4"]
    pair = ["--annotator", "mobilenetv3_small_050", "--checkpoint", first, "--annotator", "mobilenetv3_small_050"]
    sizes = [
        "--input-size",
        "64",
        "--input-size",
        "96",
        "64",
        "--mean",
        "0.1",
        "0.1",
        "0.1",
        "--mean",
        "0.5",
        "0.5",
        "0.5",
    ]
    annotator = choose(*pair, "--checkpoint", second, *sizes, *shared)
    members = annotator.describe()["annotators"]
    assert [member["input_size"] for member in members] == [[64, 64], [96, 64]]
    assert [member["mean"] for member in members] == [[0.1] * 3, [0.5] * 3]
    assert [member["std"] for member in members] == [[0.2, 0.3, 0.4]] * 2
    assert len({member["weights_sha256"] for member in members}) == 2
    logits = [member(member.preprocess(picture(0))[None]).mean((2, 3)) for member in annotator.annotators]
    pixels = annotator.preprocess(picture(0))[None]
    torch.testing.assert_close(annotator(pixels).mean((2, 3)), (logits[0] + logits[1]) / 2)
    scaled = choose(*pair, "--checkpoint", second, "--input-size", "64", "--scales", "1", "1.5", "--flip", *shared)
    sizes = [member["input_size"][0] for member in scaled.describe()["annotators"]]
    assert sizes == [64, 96, 64, 96]
    assert all(member["flip_averaged"] for member in scaled.describe()["annotators"])


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("--checkpoint", ["a.pt"], "--checkpoint was given 1 time for 2 annotators: .*'pretrained' stands for timm's"),
        ("--checkpoint", ["a.pt"] * 3, "--checkpoint was given 3 times for 2 annotators: give it once per --annotator"),
        ("--interpolation", ["bicubic"] * 3, "--interpolation was given 3 times for 2 annotators"),
        ("--input-size", ["64"] * 3, "--input-size was given 3 times for 2 annotators"),
    ],
)
def test_options_given_another_number_of_times_than_annotators_are_an_error(option, values, message):
    arguments = [argument for value in values for argument in (option, value)]
    with pytest.raises(ValueError, match=message):
        choose("--annotator", "test_resnet", "--annotator", "test_vit", *arguments)
    with pytest.raises(ValueError, match=r"was given 2 times for 1 annotator"):
        choose("--annotator", "test_resnet", *[argument for value in ("8", "9") for argument in (option, value)])


def test_pretrained_in_place_of_a_checkpoint_loads_timms_weights(tmp_path, monkeypatch):
    created = []
    monkeypatch.setattr(
        "relabel_datasets.annotate.timm_annotator.TimmAnnotator", lambda *args, **options: created.append(options)
    )
    monkeypatch.setattr("relabel_datasets.annotate.combine.Ensemble", list)
    choose("--annotator", "a", "--checkpoint", "pretrained", "--annotator", "b", "--checkpoint", "b.pt")
    assert [(options["pretrained"], options["checkpoint"]) for options in created] == [
        (True, None),
        (False, Path("b.pt")),
    ]


def test_a_default_annotator_is_replaced_by_those_given():
    parser = argparse.ArgumentParser()
    add_annotator_arguments(parser, default="resnet50")
    assert parser.parse_args([]).annotator == ["resnet50"]
    assert parser.parse_args(["--annotator", "a", "--annotator", "b"]).annotator == ["a", "b"]


def test_scales_must_be_positive_and_require_a_model_of_any_size(source):
    with pytest.raises(ValueError, match=r"--scales must be positive factors, got 0\.0"):
        choose("--annotator", f"{source}:make_module", "--input-size", "64", "--scales", "0")
    with pytest.raises(ValueError, match="has its own input_size"):
        choose("--annotator", f"{source}:make_annotator", "--scales", "0.5")
