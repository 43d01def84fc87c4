from dataclasses import fields, replace

import pytest

from relabel_datasets.cli import make_parser
from relabel_datasets.cli.student_options import RECIPE_HELP, RUNTIME_HELP, recipe_values, runtime_from
from relabel_datasets.train.recipe import LABELS, PRESETS, Recipe, RuntimeConfig


def test_presets_are_those_of_the_paper_and_cover_all_labels():
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
        ({"labels": "double"}, "labels= must be one of .*'relabel'"),
        ({"dtype": "float64"}, "dtype= must be"),
        ({"epochs": 5, "warmup_epochs": 5}, "epochs=5 must be more than warmup_epochs=5"),
        ({"epochs": 0}, "epochs= must be at least 1"),
        ({"batch_size": 0}, "batch_size= must be at least 1"),
        ({"cutmix": -1.0}, "cutmix= must be at least 0, got -1.0"),
        ({"min_area": 0.0}, "min_area= must be above 0 and at most 1, got 0.0"),
        ({"crop_pct": 1.5}, "crop_pct= must be above 0 and at most 1, got 1.5"),
        ({"learning_rate": float("nan")}, "learning_rate= must be positive"),
        ({"labels": "tokens", "mixup": 0.2}, "set mixup=0"),
        ({"temperature": 0.0}, "temperature= must be positive and finite, got 0.0"),
        ({"temperature": float("inf")}, "temperature= must be positive and finite, got inf"),
        ({"label_weight": 1.1}, "label_weight= must be from 0 to 1, got 1.1"),
        ({"label_weight": float("nan")}, "label_weight= must be from 0 to 1, got nan"),
        (
            {"labels": "single", "label_weight": 0.5},
            "label_weight=0.5 has no effect on labels=single, which are one-hot",
        ),
        ({"labels": "smoothed", "temperature": 2.0}, "temperature=2.0 has no effect on labels=smoothed"),
        (
            {"labels": "localized-single", "temperature": 2.0},
            "temperature=2.0 has no effect on labels=localized-single",
        ),
        ({"labels": "single", "calibrated": True}, "calibrated=True has no effect on labels=single, which are one-hot"),
        (
            {"labels": "distilled", "calibrated": True},
            "calibrated=True has no effect on labels=distilled, which are not pooled from label maps",
        ),
        ({"num_crops": 0}, "num_crops= must be at least 1, got 0"),
        (
            {"labels": "single", "num_crops": 2},
            "num_crops=2 has no effect on labels=single, which are not those of stored crops",
        ),
        (
            {"labels": "tokens", "num_crops": 2},
            "num_crops=2 has no effect on labels=tokens, which are not those of stored crops",
        ),
    ],
)
def test_a_recipe_value_out_of_range_is_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**values)


@pytest.mark.parametrize("labels", LABELS)
def test_temperature_label_weight_and_calibration_are_values_of_all_labels_that_use_them(labels):
    recipe = Recipe(labels=labels)
    assert (recipe.label_config.temperature, recipe.label_config.label_weight) == (1, 0)
    every = {"temperature": 2.0, "label_weight": 0.3, "calibrated": True}
    values = {name: value for name, value in every.items() if recipe.uses(name)}
    config = recipe.changed(**values).label_config
    assert config == replace(LABELS[labels], **values)
    assert ("label_weight" in values) is (labels not in ("single", "smoothed"))
    assert ("temperature" in values) is (config.soft and config.multi_label)
    assert ("calibrated" in values) is (labels in ("relabel", "global-multi", "tokens"))


@pytest.mark.parametrize(
    ("name", "meant"),
    [("lr", "learning_rate"), ("img_size", "image_size"), ("batchsize", "batch_size"), ("wd", "weight_decay")],
)
def test_an_unknown_value_is_an_error_that_suggests_a_known_one(name, meant):
    message = rf"Recipe.changed\(\) has no argument '{name}': did you mean '{meant}'\?"
    with pytest.raises(TypeError, match=message):
        Recipe().changed(**{name: 1})


@pytest.mark.parametrize(("cls", "helps"), [(Recipe, RECIPE_HELP), (RuntimeConfig, RUNTIME_HELP)])
def test_every_value_has_a_help_text(cls, helps):
    assert set(helps) == {field.name for field in fields(cls)}


def test_options_become_values_of_their_fields():
    arguments = [
        "train",
        "data",
        "--out",
        "run",
        "--model-kwargs",
        "depth=12",
        "flag=true",
        "pad=same",
        "--model-kwargs",
        "sizes=[1,2]",
    ]
    args = make_parser().parse_args(
        [*arguments, "--ema-decay", "0.99", "--auto-augment", "rand-m9", "--eval-size", "64",
         "--temperature", "2", "--label-weight", "0.25", "--calibrated", "--dtype", "bfloat16", "--no-progress", "--compile", "--window", "3"]
    )  # fmt: skip
    kwargs = {"depth": 12, "flag": True, "pad": "same", "sizes": [1, 2]}
    assert PRESETS["relabel"].changed(**recipe_values(args)) == Recipe(
        model_kwargs=kwargs,
        ema_decay=0.99,
        auto_augment="rand-m9",
        eval_size=64,
        dtype="bfloat16",
        temperature=2.0,
        label_weight=0.25,
        calibrated=True,
    )
    assert runtime_from(args) == RuntimeConfig(progress=False, compile=True, window=3)


def test_options_default_to_the_values_of_the_preset():
    args = make_parser().parse_args(["train", "data", "--out", "run"])
    assert recipe_values(args) == {}
    assert runtime_from(args) == RuntimeConfig()


@pytest.mark.parametrize("option", ["--labels", "--seed"])
def test_compare_has_no_options_for_values_that_it_varies(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        make_parser().parse_args(["compare", "data", option, "1"])
    assert option in capsys.readouterr().err


@pytest.mark.parametrize("text", ["depth", "=12", "a-b=1"])
def test_model_kwargs_without_key_and_value_are_an_error_with_an_example(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        make_parser().parse_args(["train", "data", "--out", "run", "--model-kwargs", text])
    assert "expected KEY=VALUE, such as pad_type=same" in capsys.readouterr().err


def test_the_help_of_train_lists_every_preset_and_torchrun(capsys):
    with pytest.raises(SystemExit, match="0"):
        make_parser().parse_args(["train", "--help"])
    text = capsys.readouterr().out
    assert all(preset in text for preset in PRESETS)
    assert "torchrun" in text
