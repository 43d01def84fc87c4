import re

import pytest
import torch
from PIL import Image

import relabel_datasets as rd
from relabel_datasets.cli import main
from relabel_datasets.demo import DemoResult, dataset, make_scenes_relabel, run_demo
from relabel_datasets.demo.annotator import DENSE_KWARGS, MODEL, _mosaics, load_demo_annotator
from relabel_datasets.demo.scenes import CLASSES
from relabel_datasets.demo.students import METHODS, DemoRecipe, Score


def test_scenes_relabel_has_two_splits_with_exact_maps(scenes_relabel):
    splits = rd.load_dataset(scenes_relabel)
    assert list(splits) == ["train", "validation"]
    manifest = splits["train"].label_maps.manifest
    assert manifest.annotator["linear_head"]
    assert (manifest.config, manifest.encoding["map_size"]) == (MODEL, [8, 8])
    assert splits["train"].classes == CLASSES
    image, label_map = splits["validation"][0]
    assert label_map.canvas_size == (image.height, image.width)
    assert label_map.key.startswith("validation_")


def test_the_saved_annotator_matches_the_manifest(scenes_relabel):
    annotator = load_demo_annotator(scenes_relabel / "annotator.safetensors")
    manifest = rd.load_dataset(scenes_relabel, split="train").label_maps.manifest
    assert annotator.describe() == manifest.annotator
    assert annotator.model_kwargs == DENSE_KWARGS


def test_mosaics_arrange_tiles_row_by_row():
    tiles = torch.arange(8.0)[:, None, None, None].expand(8, 3, 2, 5)
    mosaics = _mosaics(tiles)
    assert mosaics.shape == (2, 3, 4, 10)
    assert mosaics[1, 0, ::2, ::5].tolist() == [[4, 5], [6, 7]]


def test_an_interrupted_run_leaves_no_files(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "train_annotator", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_scenes_relabel(tmp_path / "cache" / "scenes", num_train=12, num_validation=12)
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_existing_folder_raises_an_error(scenes_relabel):
    with pytest.raises(FileExistsError, match="already exists: remove it"):
        make_scenes_relabel(scenes_relabel)


def test_run_demo_trains_all_students_and_writes_all_files(scenes_relabel, capfd):
    messages = []
    out = scenes_relabel.parent
    recipe = DemoRecipe(epochs=1, batch_size=8, crop_size=32, test_size=32, num_workers=0)
    result = run_demo(out, seeds=2, recipe=recipe, echo=messages.append)
    assert list(result.scores) == [method.name for method in METHODS]
    assert all(len(scores) == 2 for scores in result.scores.values())
    for path in result.overlays:
        with Image.open(path) as figure:
            assert figure.width > 500
    assert (out / "table.md").read_text(encoding="utf-8") == result.to_markdown()
    assert messages
    assert "relabel build" in result.next_steps()
    assert result.next_steps().splitlines()[-1] == str(out / "report.html")
    assert len(re.findall(r'id="sample-\d+"', result.report.read_text(encoding="utf-8"))) == 2 * len(CLASSES)
    assert str(out / "overlays") in result.next_steps()
    assert capfd.readouterr().out == ""
    with pytest.raises(ValueError, match="seeds"):
        run_demo(out, seeds=0)


def test_the_table_has_means_and_standard_deviations(tmp_path):
    scores = {"one": [Score(0.5, 0.6, 0.7, 1.0)], "two": [Score(0.4, 0.5, 0.6, 1.0), Score(0.5, 0.5, 0.7, 2.0)]}
    table = DemoResult(scores, (0.1, 0.2), tmp_path, [], tmp_path, 1.0).to_markdown().splitlines()
    assert table[2] == "| one | 50.0% | 60.0% | 70.0% | 1.00 |"
    assert table[3] == "| two | 45.0% ± 7.1 | 50.0% ± 0.0 | 65.0% ± 7.1 | 1.50 |"
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.slow
def test_students_of_the_full_demo_are_better_than_chance(tmp_path, capsys):
    assert main(["demo", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.out == (tmp_path / "table.md").read_text(encoding="utf-8")
    assert printed.err.splitlines()[-1] == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 1e6
    rows = {line.split("|")[1].strip(): line.split("|")[2:] for line in printed.out.splitlines()[2:]}
    multi_label = {name: float(cells[1].strip().partition("%")[0]) / 100 for name, cells in rows.items()}
    chance = 1 / len(CLASSES)
    assert multi_label.keys() >= {method.name for method in METHODS}
    assert all(accuracy > 3 * chance for accuracy in multi_label.values())
    assert multi_label["(the annotator itself)"] > 5 * chance
    assert len(list((tmp_path / "overlays").glob("*.png"))) == 10
