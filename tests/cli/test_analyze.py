import csv
import json

import pytest

import relabel_datasets as rd
from relabel_datasets.cli import main

BOXES = "image,width,height,class,xmin,ymin,xmax,ymax\n" + "".join(
    f"photo_{i:02d}.jpg,{56 if i % 2 else 32},{40 if i % 2 else 48},{('cat', 'dog', 'emu')[i % 3]},{i},5,{i + 16},30\n"
    for i in range(13)
)


@pytest.fixture
def boxes(tmp_path):
    path = tmp_path / "boxes.csv"
    path.write_text(BOXES)
    return path


def test_statistics_are_printed_and_all_files_are_written(dataset_folder, boxes, tmp_path, capsys):
    command = ["analyze", str(dataset_folder), "--config", "labels-only", "--boxes", str(boxes), "--num-crops", "200"]
    out = tmp_path / "new" / "folder"
    assert main([*command, "--out", str(out)]) == 0
    expected = rd.analysis.analyze(dataset_folder, "labels-only", boxes=boxes, num_crops=200, progress=False)
    captured = capsys.readouterr()
    assert captured.out == f"{expected}\ntables and plots: {out}\n"
    assert "13/13" in captured.err
    plots = ["overlap", "by_overlap", "num_classes"] + ["confused"] * bool(expected.tables["confused"].rows)
    names = {"analysis.json", *(f"{name}.csv" for name in expected.tables)}
    names |= {f"{name}.{extension}" for name in plots for extension in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == names
    assert json.loads((out / "analysis.json").read_text()) == json.loads(expected.to_json())
    with (out / "classes.csv").open(newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == ["cat", "dog", "emu"]


def test_boxes_without_a_dataset_are_analyzed_and_nothing_is_written_by_default(boxes, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", "--boxes", str(boxes), "--num-crops", "130", "--seed", "3"]) == 0
    assert capsys.readouterr().out == f"{rd.analysis.analyze(boxes=boxes, num_crops=130, seed=3)}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["boxes.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to analyze: give a dataset, boxes, or both"),
        (["--boxes", "/nowhere"], "no boxes at /nowhere"),
        (["/nowhere"], "no dataset at /nowhere"),
        (["{folder}", "--config", "colours", "--out", "{boxes}"], "boxes.csv"),
    ],
)
def test_an_error_is_one_line_with_exit_code_1(dataset_folder, boxes, arguments, message, capsys):
    arguments = [argument.format(folder=dataset_folder, boxes=boxes) for argument in arguments]
    assert main(["analyze", *arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert boxes.read_text() == BOXES
