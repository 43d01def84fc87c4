"""The recipe of a run without a preset fits the number of images, is printed, and is kept when the run is resumed."""

import argparse
import csv
import json
import shutil
from dataclasses import replace

import pytest

import relabel_datasets as rd
from relabel_datasets.cli import main, make_parser
from relabel_datasets.cli.recipe_choice import recipe_from
from relabel_datasets.shards.manifest import Manifest
from relabel_datasets.storage.folders import MANIFEST_NAME
from relabel_datasets.train.defaults import DERIVED, default_recipe
from relabel_datasets.train.recipe import PRESETS, Recipe
from tests.train.tiny import OPTIONS


@pytest.mark.parametrize(
    ("num_images", "model", "image_size", "epochs", "batch_size", "learning_rate", "warmup_epochs"),
    [
        (1, "resnet18", 64, 100, 1, 0.1 / 256, 5),
        (13, "resnet18", 64, 100, 8, 0.1 * 8 / 256, 5),
        (600, "resnet18", 64, 100, 16, 0.00625, 5),
        (1_999, "resnet18", 64, 100, 64, 0.025, 5),
        (2_000, "resnet18", 128, 100, 64, 0.025, 5),
        (9_469, "resnet18", 128, 100, 256, 0.1, 5),
        (50_000, "resnet18", 128, 100, 1024, 0.1, 5),
        (1_281_167, "resnet50", 224, 300, 1024, 0.1, 5),
    ],
)
def test_values_follow_the_documented_rule(
    num_images, model, image_size, epochs, batch_size, learning_rate, warmup_epochs
):
    recipe = default_recipe(num_images)
    assert recipe == Recipe(
        model=model, image_size=image_size, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate,
        warmup_epochs=warmup_epochs, mix_off_epochs=warmup_epochs,
    )  # fmt: skip
    assert recipe.batch_size <= num_images
    if num_images > 1_000_000:
        assert recipe == PRESETS["relabel"]


@pytest.mark.parametrize("epochs", [1, 3, 20, 39, 60, 500])
def test_warmup_fits_any_given_number_of_epochs(epochs):
    recipe = default_recipe(600, epochs=epochs)
    assert recipe.epochs == epochs
    assert recipe.warmup_epochs == recipe.mix_off_epochs == min(5, epochs // 20)


def test_given_values_are_kept_and_others_follow_them():
    values = {
        "model": "resnet10t", "image_size": 32, "epochs": 7, "batch_size": 128, "warmup_epochs": 2, "mix_off_epochs": 1,
        "labels": "single", "seed": 3,
    }  # fmt: skip
    recipe = default_recipe(600, **values)
    assert {name: getattr(recipe, name) for name in values} == values
    assert recipe.learning_rate == 0.05
    assert default_recipe(600, learning_rate=0.3).learning_rate == 0.3
    assert default_recipe(600, optimizer="adamw").learning_rate == pytest.approx(0.001 / 16)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs= must be at least 1"),
        ({"epochs": 3, "warmup_epochs": 3}, ValueError, "epochs=3 must be more than warmup_epochs=3"),
        ({"lr": 1}, TypeError, "did you mean 'learning_rate'"),
    ],
)
def test_wrong_values_are_errors(values, error, message):
    with pytest.raises(error, match=message):
        default_recipe(600, **values)


def parse(out, *options) -> argparse.Namespace:
    return make_parser().parse_args(["train", "data", "--out", str(out), *options])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_named_preset_has_exactly_its_values(tmp_path, capsys, preset):
    assert recipe_from(parse(tmp_path, "--preset", preset), 600) == PRESETS[preset]
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == ""


def test_derived_values_are_printed_in_one_line_as_options_that_override_them(tmp_path, capsys):
    recipe = recipe_from(parse(tmp_path, "--epochs", "40", "--labels", "single"), 600)
    assert recipe == default_recipe(600, epochs=40, labels="single")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "recipe for 600 training images: --model resnet18 --image-size 64 --batch-size 16 --learning-rate 0.00625 --warmup-epochs 2 "
        "--mix-off-epochs 2; override with --epochs and so on, or choose a --preset"
    )
    options = line.partition(": ")[2].partition(";")[0].split()
    assert recipe_from(parse(tmp_path, "--epochs", "40", "--labels", "single", *options), 9) == recipe
    assert set(json.loads((tmp_path / "derived.json").read_text())) <= set(DERIVED)


def test_a_resumed_run_keeps_its_derived_values_but_not_those_that_were_given(tmp_path, capsys):
    first = recipe_from(parse(tmp_path, "--epochs", "40"), 600)
    assert recipe_from(parse(tmp_path, "--epochs", "40"), 9_469).batch_size == 256  # nothing was trained yet
    recipe_from(parse(tmp_path, "--epochs", "40"), 600)
    (tmp_path / "last.pth.tar").touch()
    capsys.readouterr()
    assert recipe_from(parse(tmp_path, "--epochs", "40"), 9_469) == first
    assert capsys.readouterr().err.startswith("recipe as in the run that is resumed: --model resnet18 --image-size 64 ")
    assert recipe_from(parse(tmp_path), 9_469).epochs == 100  # a checkpoint of 40 epochs is then refused


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[1]", "must hold an object")])
def test_a_corrupt_file_of_derived_values_is_an_error(tmp_path, content, message):
    (tmp_path / "derived.json").write_text(content)
    (tmp_path / "last.pth.tar").touch()
    with pytest.raises(ValueError, match=rf"derived.json {message}.*: delete it, and give the values"):
        recipe_from(parse(tmp_path), 600)


TINY = [*OPTIONS[: OPTIONS.index("--warmup-epochs")], "--device", "cpu", "--no-progress", "--num-workers", "0"]


def test_the_first_run_without_any_recipe_option_trains_validates_and_says_what_is_next(scenes, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["train", str(scenes), "--out", str(run), *TINY, "--epochs", "1"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "recipe for 48 training images: --batch-size 16 --learning-rate 0.00625 --warmup-epochs 0" in captured.err
    assert ", top1 " in captured.out
    assert captured.err.splitlines()[-1] == f"Next: relabel evaluate {run / 'model_best.pth.tar'} {scenes}"
    assert main(command) == 0  # complete
    assert "recipe as in the run that is resumed" in capsys.readouterr().err
    assert main([*command, "--batch-size", "24"]) == 1
    assert "batch_size=16 in that run, 24 now" in capsys.readouterr().err.replace("--batch-size 16", "batch_size=16")


@pytest.fixture
def without_validation(scenes, tmp_path):
    """The scenes with their split train alone, and an ImageFolder of their validation images."""
    root = tmp_path / "one-split"
    shutil.copytree(scenes, root)
    (path,) = root.glob(f"*/{MANIFEST_NAME}")
    manifest = Manifest.load(path.parent)
    path.write_bytes(replace(manifest, splits={"train": manifest.splits["train"]}).to_bytes())
    validation = rd.load_dataset(scenes, split="validation")
    for row in range(len(validation)):
        target = tmp_path / "photos" / validation.classes[validation.targets[row]] / f"{row}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        validation.image(row).save(target)
    return root, tmp_path / "photos"


def top1(run):
    (row,) = csv.DictReader((run / "epochs.csv").read_text().splitlines())
    return float(row["top1"])


@pytest.mark.slow
def test_a_dataset_without_a_validation_split_trains_with_a_note_or_validates_on_a_plain_folder(
    scenes, without_validation, tmp_path, capsys
):
    root, photos = without_validation
    common = [*TINY, "--epochs", "1"]
    assert main(["train", str(root), "--out", str(tmp_path / "none"), *common]) == 0
    captured = capsys.readouterr()
    assert f"no validation: {root} has only 1 split (train). To validate, give --validation SPLIT, or" in captured.err
    assert f"Next: relabel evaluate {tmp_path / 'none' / 'last.pth.tar'} IMAGES" in captured.err
    assert "top1" not in captured.out
    options = ["--validation-images", str(photos)]
    assert main(["train", str(root), "--out", str(tmp_path / "plain"), *common, *options]) == 0
    err = capsys.readouterr().err
    assert f"Next: relabel evaluate {tmp_path / 'plain' / 'model_best.pth.tar'} {photos}" in err
    assert main(["train", str(scenes), "--out", str(tmp_path / "split"), *common]) == 0
    assert top1(tmp_path / "plain") == pytest.approx(top1(tmp_path / "split"))
    assert main(["train", str(root), "--out", str(tmp_path / "x"), *common, "--validation", "dev"]) == 1
    assert "has no split 'dev', only ['train']: choose another --validation" in capsys.readouterr().err
    shutil.move(photos / next(iter(sorted(p.name for p in photos.iterdir()))), photos / "unicorn")
    assert main(["train", str(root), "--out", str(tmp_path / "x"), *common, *options]) == 1
    assert "unicorn" in capsys.readouterr().err
    assert not (tmp_path / "x" / "steps.csv").exists()


@pytest.mark.slow
def test_students_are_compared_by_their_labels_with_a_recipe_that_fits_the_images(
    scenes, without_validation, tmp_path, capsys
):
    command = ["compare", str(scenes), "--labels", "single", "relabel", "--seeds", "1", "--out", str(tmp_path / "runs")]
    assert main([*command, *TINY, "--epochs", "1"]) == 0
    captured = capsys.readouterr()
    assert "recipe for 48 training images: --batch-size 16" in captured.err
    assert "| single | " in captured.out
    assert "| relabel, " in captured.out
    assert (
        main(["compare", str(without_validation[0]), *command[2:-1], str(tmp_path / "x"), *TINY, "--epochs", "1"]) == 1
    )
    captured = capsys.readouterr()
    assert "students are compared on validation images, but there are none: give --validation-images" in captured.err
    assert captured.out == ""  # before the label maps are scored
