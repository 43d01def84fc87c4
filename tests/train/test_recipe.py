import argparse
import dataclasses
import inspect

import pytest

from relabel_datasets.cli import make_parser
from relabel_datasets.train.options import add_options, given_options
from relabel_datasets.train.recipe import LABELS, PRESETS, Machine, Recipe


def test_presets_are_the_papers_and_cover_all_labels():
    relabel = PRESETS["relabel"]
    assert (relabel.model, relabel.optimizer, relabel.learning_rate, relabel.batch_size) == (
        "resnet50",
        "sgd",
        0.1,
        1024,
    )
    assert (relabel.epochs, relabel.weight_decay, relabel.mix_off_epochs, relabel.cutmix) == (300, 1e-4, 5, 0)
    assert PRESETS["relabel-cutmix"] == relabel.changed(cutmix=1.0)
    assert {preset.labels for preset in PRESETS.values()} == set(LABELS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"labels": "double"}, "labels must be one of .*'relabel'"),
        ({"dtype": "float64"}, "dtype must be"),
        ({"epochs": 5, "warmup_epochs": 5}, "5 epochs are over before 5 of warm-up"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"cutmix": -1.0}, "cutmix must not be negative"),
        ({"min_area": 0.0}, "min_area and crop_pct"),
        ({"crop_pct": 1.5}, "min_area and crop_pct"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"labels": "tokens", "mixup": 0.2}, "give mixup=0"),
    ],
)
def test_what_no_recipe_can_be_is_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**values)


def test_a_change_to_what_there_is_not_is_an_error():
    with pytest.raises(TypeError, match=r"a recipe has no \['lr'\]"):
        Recipe().changed(lr=0.1)


@pytest.mark.parametrize("cls", [Recipe, Machine])
def test_each_field_has_an_option_with_help(cls):
    parser = argparse.ArgumentParser()
    add_options(parser, cls, "all")
    options = {action.dest: action for action in parser._actions if action.dest != "help"}
    names = [field.name for field in dataclasses.fields(cls)]
    assert list(options) == names
    documented = inspect.getdoc(cls)
    for name in names:
        assert options[name].option_strings[0] == f"--{name.replace('_', '-')}"
        assert options[name].help.split()[0] in documented
        assert len(options[name].help) > 5
    assert given_options(parser.parse_args([]), cls) == {}


def test_options_become_values_of_their_fields():
    parser = argparse.ArgumentParser()
    add_options(parser, Recipe, "recipe", leave_out=("seed",))
    add_options(parser, Machine, "machine")
    args = parser.parse_args(
        ["--model-args", '{"depth": 12}', "--ema-decay", "0.99", "--auto-augment", "rand-m9", "--eval-size", "64",
         "--dtype", "bfloat16", "--no-progress", "--compile", "--window", "3"]
    )  # fmt: skip
    recipe = Recipe(**given_options(args, Recipe))
    assert recipe == Recipe(
        model_args={"depth": 12}, ema_decay=0.99, auto_augment="rand-m9", eval_size=64, dtype="bfloat16"
    )
    assert Machine(**given_options(args, Machine)) == Machine(progress=False, compile=True, window=3)
    with pytest.raises(SystemExit):
        parser.parse_args(["--seed", "1"])


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_json_that_is_no_object_is_an_error_that_shows_one(text, capsys):
    parser = argparse.ArgumentParser()
    add_options(parser, Recipe, "recipe")
    with pytest.raises(SystemExit):
        parser.parse_args(["--model-args", text])
    assert '{"depth": 12}' in capsys.readouterr().err


def test_help_of_train_names_every_preset_and_torchrun(capsys):
    with pytest.raises(SystemExit, match="0"):
        make_parser().parse_args(["train", "--help"])
    text = capsys.readouterr().out
    assert all(preset in text for preset in PRESETS)
    assert "torchrun" in text
