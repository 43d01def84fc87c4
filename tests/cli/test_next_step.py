"""Every command ends with a line that says what to do next, on stderr, so that results stay machine-readable."""

import argparse
import json
import types
from pathlib import Path

import pytest

from relabel_datasets.cli import main, make_parser
from relabel_datasets.cli.next_step import say_next
from tests.annotate.releases import publish, random_map, write_release
from tests.train.tiny import OPTIONS

MODELS = """
from tests.conftest import ColourNet
from relabel_datasets import ModuleAnnotator

def colours():
    return ModuleAnnotator(ColourNet(), (48, 64), classes=("cat", "dog", "emu"), name="colours", device="cpu")
"""
TRAIN = [*OPTIONS, "--epochs", "1", "--batch-size", "4", "--num-workers", "0", "--validation", "train"]


def demo(tmp_path, monkeypatch, **_):
    result = types.SimpleNamespace(to_markdown=str, report=Path("report.html"))
    monkeypatch.setattr("relabel_datasets.demo.run_demo", lambda *args, **options: result)
    return ["demo", str(tmp_path / "demo")], "Next: "


def build(tmp_path, image_folder, **_):
    (tmp_path / "models.py").write_text(MODELS)
    options = ["--annotator", f"{tmp_path / 'models.py'}:colours", "--config", "mine"]
    out = str(tmp_path / "new")
    return ["build", str(image_folder), out, *options], f"Next: relabel train {out} --config mine --out run"


def import_maps(tmp_path, image_folder, **_):
    write_release(tmp_path / "release", image_folder, lambda i, _: publish(random_map(i)))
    out = tmp_path / "imported"
    options = ["--format", "relabel", "--order", "hw", "--images", str(image_folder)]
    return ["import", str(tmp_path / "release"), str(out), *options], f"Next: relabel verify {out}"


def annotators(**_):
    return ["annotators", "test_resnet"], "Next: relabel build IMAGES OUT --annotator test_resnet"


def verify(data, **_):
    return ["verify", data, "--num-workers", "0", "--json", "-"], f"Next: relabel inspect {data}"


def inspect(data, **_):
    return ["inspect", data], f"Next: relabel report {data}"


def analyze(data, **_):
    return [
        "analyze",
        data,
        "--config",
        "colours",
        "--num-crops",
        "50",
    ], f"Next: relabel report {data} --config colours --split train"


def report(data, tmp_path, **_):
    options = ["--config", "colours", "--num-crops", "50", "--out", str(tmp_path / "report.html")]
    return ["report", data, *options], f"Next: relabel train {data} --config colours --out run"


def pictures(data, tmp_path, **_):
    options = ["--config", "colours", "--out", str(tmp_path / "figures"), "--count", "1"]
    return ["pictures", data, *options], f"Next: relabel report {data} --config colours --split train"


def train(data, tmp_path, **_):
    run = tmp_path / "run"
    expected = f"Next: relabel evaluate {run / 'model_best.pth.tar'} {data} --config colours --split train"
    return ["train", data, "--config", "colours", "--out", str(run), *TRAIN], expected


def evaluate(data, tmp_path, **_):
    assert main(train(data, tmp_path)[0]) == 0
    options = ["--config", "colours", "--split", "train", "--device", "cpu", "--num-workers", "0"]
    arguments = ["evaluate", str(tmp_path / "run" / "model_best.pth.tar"), data, *options]
    return arguments, "Next: relabel compare DATASET --labels single relabel --out runs"


def compare(data, **_):
    return ["compare", data, "--configs", "colours"], f"Next: relabel compare {data} --labels single relabel --out runs"


def publish_dataset(data, local_hub, **_):
    return ["publish", data, "org/name", "--config", "colours"], "Next: relabel verify org/name --revision v1"


COMMANDS = {
    "demo": demo, "build": build, "import": import_maps, "annotators": annotators, "verify": verify, "inspect": inspect,
    "analyze": analyze, "report": report, "pictures": pictures, "train": train, "evaluate": evaluate, "compare": compare,
    "publish": publish_dataset,
}  # fmt: skip


def test_every_command_is_in_the_table():
    (action,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(COMMANDS) == set(action.choices)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub, as in conftest
@pytest.mark.parametrize("name", COMMANDS)
def test_the_last_line_on_stderr_is_the_next_command(
    name, request, dataset_folder, image_folder, tmp_path, monkeypatch, capsys
):
    context = {
        "data": str(dataset_folder),
        "image_folder": image_folder,
        "tmp_path": tmp_path,
        "monkeypatch": monkeypatch,
    }
    if name == "publish":
        context["local_hub"] = request.getfixturevalue("local_hub")
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_user")
    arguments, expected = COMMANDS[name](**context)
    capsys.readouterr()
    assert main(arguments) == 0
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith(expected)
    assert "Next:" not in captured.out
    if name == "verify":
        json.loads(captured.out)
    if expected != "Next: ":  # the command can be parsed, apart from what the user must fill in
        words = last.partition(" with images ")[0].split()[2:]
        make_parser().parse_args(words)


def test_words_are_quoted_for_a_shell(capsys):
    say_next("relabel", "verify", "my data", note="soon")
    assert capsys.readouterr().err == "Next: relabel verify 'my data' soon\n"
    say_next(note="read the errors above")
    assert capsys.readouterr().err == "Next: read the errors above\n"
