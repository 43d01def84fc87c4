"""Annotators of command line options: custom ones, several sizes, mirror images."""

from __future__ import annotations

import argparse
import sys
import textwrap

import pytest
import torch

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


def test_scales_must_be_positive_and_require_a_model_of_any_size(source):
    with pytest.raises(ValueError, match=r"--scales must be positive factors, got 0\.0"):
        choose("--annotator", f"{source}:make_module", "--input-size", "64", "--scales", "0")
    with pytest.raises(ValueError, match="has its own input_size"):
        choose("--annotator", f"{source}:make_annotator", "--scales", "0.5")
