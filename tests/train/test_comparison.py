"""Comparisons: each student is trained once, and the table contains all seeds."""

import json
import re
import statistics

import pytest

import relabel_datasets as rd
from relabel_datasets.cli import main, make_parser
from relabel_datasets.cli.compare import _recipes
from relabel_datasets.demo.annotator import WEIGHTS
from relabel_datasets.train import comparison as module
from relabel_datasets.train.comparison import Comparison, ComparisonEntry, compare, score_label_maps
from relabel_datasets.train.recipe import PRESETS
from tests.train.tiny import OPTIONS


def test_the_command_scores_label_maps_trains_students_and_reuses_results(
    scenes, tmp_path, capsys, caplog, monkeypatch
):
    caplog.set_level("INFO", "relabel_datasets.train.comparison")
    command = [
        "compare", str(scenes), "--presets", "single-label", "relabel", "distillation", "--seeds", "2", "--out",
        str(tmp_path / "runs"), *OPTIONS, "--epochs", "1", "--mix-off-epochs", "0", "--batch-size", "24", "--num-workers", "0",
        "--checkpoint", str(WEIGHTS), "--annotator-input-size", "32",
    ]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out
    students = [record.getMessage() for record in caplog.records if record.getMessage().startswith("student ")]
    assert (students[0], students[5]) == (
        "student 1 of 6: single-label, seed 0",
        "student 6 of 6: distillation, seed 1",
    )
    table = (tmp_path / "runs" / "table.md").read_text()
    assert printed.endswith(table)
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]
    assert rows == ["single-label", "relabel, resnet10t", "distillation"]
    results = json.loads((tmp_path / "runs" / "results.json").read_text())
    for name in rows:
        top1 = [100 * run["top1"] for run in results["metrics"][name]]
        assert len(top1) == 2
        assert f"| {name} | {statistics.mean(top1):.1f} ± {statistics.stdev(top1):.1f} | " in table
        assert all(seconds > 0 for seconds in results["seconds_per_epoch"][name])
    monkeypatch.setattr(module, "train_student", lambda *args, **options: pytest.fail("trained again"))
    assert main(command) == 0
    assert capsys.readouterr().out == printed
    with pytest.raises(pytest.fail.Exception, match="trained again"):  # another recipe needs a new student
        main([*command, "--learning-rate", "0.2"])


def test_a_temperature_applies_to_the_rows_with_soft_labels():
    args = make_parser().parse_args(["compare", "data", "--temperature", "2", "--label-weight", "0.5", "--calibrated"])
    args.presets = list(PRESETS)
    recipes = _recipes(args, 48)
    assert {preset for preset, recipe in recipes.items() if recipe.label_weight == 0.5} == PRESETS.keys() - {
        "single-label",
        "label-smoothing",
    }
    assert {preset for preset, recipe in recipes.items() if recipe.calibrated} == {
        preset for preset, recipe in PRESETS.items() if recipe.label_config.pooled and recipe.label_config.multi_label
    }
    assert (recipes["relabel"].temperature, recipes["single-label"].temperature) == (2, 1)
    assert (recipes["global-single-label"].temperature, recipes["distillation"].temperature) == (1, 2)


def test_without_presets_only_label_maps_are_scored(scenes, capsys):
    assert main(["compare", str(scenes), "--split", "validation"]) == 0
    label_maps = rd.LabelMaps(scenes, split="validation")
    right = [
        int(label_map.dense().mean((1, 2)).argmax()) == label_map.label
        for label_map in map(label_maps.at, range(len(label_maps)))
    ]
    scores = score_label_maps(label_maps)
    assert scores["top1"] == pytest.approx(sum(right) / len(right))
    assert re.search(
        rf"\| resnet10t \| {100 * scores['top1']:.1f} \| {100 * scores['ece']:.1f} \|\n$", capsys.readouterr().out
    )


def test_of_many_label_maps_evenly_spaced_ones_are_scored(scenes, monkeypatch):
    label_maps = rd.LabelMaps(scenes, split="train")
    monkeypatch.setattr(module, "_MAX_SCORED_MAPS", 5)
    rows = [0, 11, 23, 35, 47]
    right = [int(label_maps.at(row).dense().mean((1, 2)).argmax()) == label_maps.at(row).label for row in rows]
    assert score_label_maps(label_maps)["top1"] == pytest.approx(sum(right) / 5)


def test_a_table_of_one_seed_has_no_standard_deviation():
    table = Comparison({"a": [{"top1": 0.5}], "b": [{"top1": 0.75}]}, {"a": [2.0], "b": [3.0]}).to_markdown()
    assert table.splitlines()[2:] == ["| a | 50.0 | 2.0 | 1.00 |", "| b | 75.0 | 3.0 | 1.50 |"]


def test_entries_need_unique_names_and_at_least_one_seed(tiny, tmp_path):
    entry = ComparisonEntry("a", tiny, lambda: pytest.fail("loaded"))
    for entries, seeds, message in (
        ([entry, entry], 1, r"unique name, got the names \['a', 'a'\]"),
        ([], 1, "at least one entry"),
        ([entry], 0, "seeds= must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(entries, tmp_path, seeds=seeds)


def test_presets_without_a_folder_are_an_error(scenes, capsys):
    assert main(["compare", str(scenes), "--presets", "relabel"]) == 1
    assert "give --out" in capsys.readouterr().err
