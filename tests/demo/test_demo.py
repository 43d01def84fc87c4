import os
import re
import signal
import subprocess
import sys

import pytest
from PIL import Image

import relabel_datasets as rd
from relabel_datasets.cli import main
from relabel_datasets.demo import dataset, make_scenes_relabel, run, run_demo
from relabel_datasets.demo.annotator import MODEL
from relabel_datasets.demo.scenes import CLASSES
from relabel_datasets.demo.students import KINDS
from tests.conftest import ROOT
from tests.demo.conftest import TINY

# A process in the background of a shell ignores SIGINT unless it says otherwise.
DEMO = """
import signal, sys
from relabel_datasets.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(["demo", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def demo(scenes_relabel):
    """Folder, result and messages of a demo with tiny students and one seed."""
    messages = []
    return scenes_relabel.parent, run_demo(scenes_relabel.parent, seeds=1, recipe=TINY, echo=messages.append), messages


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


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_an_interrupted_run_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "build", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_scenes_relabel(tmp_path / "cache" / "scenes", num_train=12, num_validation=12)
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_existing_folder_raises_an_error(scenes_relabel):
    with pytest.raises(FileExistsError, match="already exists: remove it"):
        make_scenes_relabel(scenes_relabel)


def test_run_demo_trains_all_students_and_writes_all_files(demo):
    out, result, messages = demo
    assert list(result.scores) == list(KINDS)
    assert all(len(scores) == 1 for scores in result.scores.values())
    assert all(0 <= value <= 1 for scores in result.scores.values() for score in scores for value in score)
    for path in result.overlays:
        with Image.open(path) as figure:
            assert figure.width > 500
    assert (out / "table.md").read_text(encoding="utf-8") == result.to_markdown()
    assert len(re.findall(r'id="sample-\d+"', result.report.read_text(encoding="utf-8"))) == 4 * len(CLASSES)
    text = "\n".join(messages)
    for step in (
        "1. Draw scenes",
        str(out / "overlays"),
        "Train 3 students",
        "3 of 3: ReLabel, seed 0",
        str(result.report),
    ):
        assert step in text


def test_a_demo_that_is_run_again_keeps_its_students_and_adds_seeds(demo):
    out, result, _ = demo
    written = {path: path.stat().st_mtime_ns for path in out.glob("students/*/seed-*/last.pth.tar")}
    assert len(written) == 3
    again = run_demo(out, seeds=2, recipe=TINY)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert len(list(out.glob("students/*/seed-*/last.pth.tar"))) == 6
    assert {name: scores[:1] for name, scores in again.scores.items()} == result.scores
    assert again.annotator == result.annotator


def test_scenes_of_another_annotator_are_refused(demo, monkeypatch):
    class Other:
        def describe(self):
            return {"name": "other"}

    monkeypatch.setattr(run, "load_demo_annotator", Other)
    with pytest.raises(
        rd.DatasetError, match=r"scenes-relabel were annotated by another version.*delete .*choose another"
    ):
        run_demo(demo[0], seeds=1, recipe=TINY)


def test_seeds_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="seeds= must be at least 1, got 0"):
        run_demo(tmp_path, seeds=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("options", "seeds"), [([], 3), (["--quick"], 1), (["--seeds", "2"], 2)])
def test_the_command_prints_the_table_and_what_to_do_next(options, seeds, demo, monkeypatch, capsys):
    out, result, _ = demo
    called = {}
    monkeypatch.setattr("relabel_datasets.demo.run_demo", lambda out, **options: called.update(options) or result)
    assert main(["demo", str(out), *options]) == 0
    assert called["seeds"] == seeds
    printed = capsys.readouterr()
    assert printed.out == result.to_markdown()
    last = printed.err.splitlines()[-1]
    assert last.startswith("Next: relabel build IMAGES OUT --annotator ")
    assert f"open {result.report} in a browser" in last


@pytest.mark.slow
def test_a_demo_survives_kills_and_its_annotator_is_better_than_its_students(tmp_path):
    command = [sys.executable, "-c", DEMO, str(tmp_path / "demo"), "--quick"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for stop, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        assert _run_until_a_student_is_trained(command, environment, stop) == code
    trained = tmp_path / "demo" / "students" / "single" / "seed-0" / "last.pth.tar"
    written = trained.stat().st_mtime_ns
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert trained.stat().st_mtime_ns == written
    assert finished.stdout == (tmp_path / "demo" / "table.md").read_text(encoding="utf-8")
    assert finished.stdout.splitlines()[-1].endswith(
        "the annotator is above every student on the main object, any object and random crops."
    )
    assert finished.stderr.splitlines()[-1].startswith("Next: ")
    rows = {line.split("|")[1].strip(): line.split("|")[2:] for line in finished.stdout.splitlines()[2:6]}
    assert rows.keys() == {*KINDS, "the annotator"}
    chance = 100 / len(CLASSES)
    assert all(float(cells[0].partition("%")[0]) > 3 * chance for cells in rows.values())
    assert len(list((tmp_path / "demo" / "overlays").glob("*.png"))) == 10


def _run_until_a_student_is_trained(command, environment, stop):
    """Stop a demo after its first student, and return its exit code."""
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    ) as process:
        for line in process.stderr:
            if line.lstrip().startswith("1 of "):
                os.killpg(process.pid, stop)  # as a terminal does
                break
        process.communicate()
    return process.returncode
