import argparse
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

import relabel_datasets as rd
from relabel_datasets.cli import main, make_parser
from tests.conftest import ROOT

MODEL = ("--annotator", "mobilenetv3_small_050", "--input-size", "64", "96", "--model-kwargs", "num_classes=3")


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("mobilenetv3_small_050", num_classes=3).state_dict(), path)
    return str(path)


def test_build_writes_a_dataset_and_prints_the_call_that_loads_it(tmp_path, image_folder, checkpoint, capsys):
    out = str(tmp_path / "data")
    assert main(["build", str(image_folder), out, *MODEL, "--checkpoint", checkpoint, "--shard-size", "9"]) == 0
    printed = capsys.readouterr().out
    assert "13 samples in 2 shards" in printed
    call = next(line for line in printed.splitlines() if line.startswith("load_dataset("))
    dataset = eval(call, {"load_dataset": rd.load_dataset})  # the printed call must run unchanged
    assert len(dataset) == 13
    assert dataset[0][1].shape == (3, 2, 3)


def test_build_without_images(tmp_path, image_folder, checkpoint, capsys):
    mapping = tmp_path / "mapping.json"
    mapping.write_text(json.dumps({"cat": 2, "dog": 1, "emu": 0}))
    options = [
        "--no-images",
        "--encoding",
        "topk",
        "--k",
        "2",
        "--storage-dtype",
        "uint8",
        "--config",
        "mine",
        "--split",
        "val",
    ]
    arguments = ["build", str(image_folder), str(tmp_path / "data"), *MODEL, "--checkpoint", checkpoint, *options]
    assert main([*arguments, "--class-mapping", str(mapping)]) == 0
    dataset = eval(capsys.readouterr().out.splitlines()[-1], {"load_dataset": rd.load_dataset})
    assert dataset.label_maps.manifest.encoding == {"name": "topk", "k": 2, "dtype": "uint8", "map_size": [2, 3]}
    assert dataset[0][1].encoding == "topk"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "/nowhere", "out", *MODEL], "no image folder at /nowhere"),
        (["build", "{images}", "out", *MODEL, "--checkpoint", "/no.safetensors"], "/no.safetensors"),
        (["build", "{images}", "out", *MODEL, "--input-size", "1", "2", "3"], "--input-size"),
        (["build", "{images}", "out", "--annotator", "no_such_model"], "no_such_model"),
    ],
)
def test_an_error_is_one_line_with_exit_code_1(image_folder, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([argument.format(images=image_folder) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_verify_of_a_valid_dataset(dataset_folder, tmp_path, capsys):
    assert main(["verify", str(dataset_folder), "--num-workers", "0", "--json", str(tmp_path / "report.json")]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[:2] == [
        f"{config}/train: 13 samples in 3 shards, {size / 1e6:.1f} MB"
        for config in ("colours", "labels-only")
        for size in [sum(path.stat().st_size for path in (dataset_folder / config).glob("*.tar"))]
    ]
    assert lines[2].startswith(f"{dataset_folder}: ok, ")
    assert "26/26" in captured.err
    assert json.loads((tmp_path / "report.json").read_text())["ok"] is True


def test_a_report_on_stdout_needs_no_writable_folder(monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda *_: False)
    assert make_parser().parse_args(["verify", "x", "--json", "-"]).json == Path("-")
    with pytest.raises(SystemExit):
        make_parser().parse_args(["verify", "x", "--json", "report.json"])
    assert "cannot be written to" in capsys.readouterr().err


def test_verify_of_a_corrupt_dataset(dataset_folder, capsys):
    shard = dataset_folder / "colours" / "train-00001-of-00003.tar"
    shard.write_bytes(b"\xff" + shard.read_bytes()[1:])
    assert main(["verify", str(dataset_folder), "--quick", "--num-workers", "1"]) == 1
    assert "colours/train-00001-of-00003.tar: " in capsys.readouterr().out
    assert main(["verify", str(dataset_folder), "--config", "labels-only", "--num-workers", "0"]) == 0
    capsys.readouterr()
    assert main(["verify", str(dataset_folder), "--json", "-", "--num-workers", "0"]) == 1
    captured = capsys.readouterr()
    problems = json.loads(captured.out)["problems"]
    assert {problem["shard"] for problem in problems} == {shard.name}
    assert f"{dataset_folder}: {len(problems)} problems" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "no dataset at /nowhere"),
        (["{root}", "--config", "blue"], "no config 'blue'"),
        (["{root}", "--num-workers", "-1"], "--num-workers must be at least 0, got -1"),
    ],
)
def test_verify_of_a_missing_dataset_is_one_line_with_exit_code_1(dataset_folder, arguments, message, capsys):
    assert main(["verify", *(argument.format(root=dataset_folder) for argument in arguments)]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("command", "resumes"), [("build", True), ("demo", True), ("verify", False), ("analyze", False)]
)
def test_ctrl_c_says_whether_the_command_resumes(command, resumes, capsys, monkeypatch):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"relabel_datasets.cli.{command}._run", stop)
    arguments = {"build": ["images", "out", "--annotator", "any"], "verify": ["path"]}
    assert main([command, *arguments.get(command, [])]) == 130
    assert ("rerun the same command to resume" in capsys.readouterr().err) is resumes


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 0
    assert "show the version" in capsys.readouterr().out


COMMANDS = {
    "demo", "build", "import", "annotators", "verify", "inspect", "analyze", "report", "pictures", "train", "evaluate",
    "compare", "publish",
}  # fmt: skip
TYPOS = {
    "a command": ["biuld"],
    "an option": ["verify", "--quik", "x"],
    "a last option": ["build", "images", "out", "--annotator", "any", "--encodign"],
    "a value": ["build", "images", "out", "--annotator", "any", "--k", "five"],
}
QUICK = [[], ["--help"], ["--version"], *TYPOS.values(), *([command, "--help"] for command in sorted(COMMANDS))]
HEAVY = ("torch", "torchvision", "timm", "datasets", "numpy", "PIL", "fsspec", "huggingface_hub", "yaml", "tqdm")


def _imports_of(arguments_of_runs, libraries):
    """Return, for each run of the command in a process of its own, its exit code and those of the libraries that it has imported."""
    code = f"""
import json, os, sys
from relabel_datasets.cli import main
results = []
for arguments in {arguments_of_runs!r}:
    reading, writing = os.pipe()
    if os.fork() == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = main(arguments)
        except SystemExit as error:
            code = error.code
        finally:
            os.write(writing, json.dumps([code or 0, [name for name in {libraries!r} if name in sys.modules]]).encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        results.append(json.load(file))
    os.wait()
print(json.dumps(results))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(run.stdout)


def test_help_version_and_typos_import_nothing_heavy():
    results = _imports_of(QUICK, HEAVY)
    assert dict(zip(map(" ".join, QUICK), results, strict=True)) == {
        " ".join(arguments): [2 if arguments in TYPOS.values() else 0, []] for arguments in QUICK
    }


def test_a_quick_verification_imports_no_torch(dataset_folder):
    (result,) = _imports_of([["verify", "--quick", str(dataset_folder)]], ("torch", "PIL", "fsspec"))
    assert result == [0, []]


def test_python_m_runs_the_command_and_prints_the_version_of_the_package():
    run = subprocess.run(
        [sys.executable, "-m", "relabel_datasets", "--version"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout == f"relabel-datasets {version('relabel-datasets')}\n"


def _options(parser):
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return subparsers.choices


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_an_example_and_every_option_a_help_text(command):
    parser = _options(make_parser())[command]
    assert "relabel" in parser.epilog
    assert "example" in parser.epilog
    for action in parser._actions:
        assert action.help, action.option_strings or action.dest
        assert len(action.help.split()) > 2, action.option_strings
        first = action.help.split()[0].lower()
        assert first not in {"of", "to", "in", "at", "with", "by", "from", "that", "which", "where", "how", "as"}, (
            action.help
        )


def test_the_commands_are_these():
    assert set(_options(make_parser())) == COMMANDS
