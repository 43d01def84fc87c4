import json

import pytest
import timm
from safetensors.torch import save_file

import relabel_datasets as rd
from relabel_datasets.cli import main

MODEL = ("--annotator", "mobilenetv3_small_050", "--input-size", "64", "96", "--model-arg", "num_classes=3")


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("mobilenetv3_small_050", num_classes=3).state_dict(), path)
    return str(path)


def test_build_writes_a_dataset_and_says_how_to_load_it(tmp_path, image_folder, checkpoint, capsys):
    out = str(tmp_path / "data")
    assert main(["build", str(image_folder), out, *MODEL, "--checkpoint", checkpoint, "--shard-size", "9"]) == 0
    printed = capsys.readouterr().out
    assert "13 samples in 2 shards" in printed
    call = next(line for line in printed.splitlines() if line.startswith("load_dataset("))
    dataset = eval(call, {"load_dataset": rd.load_dataset})  # what it says must work as it is
    assert len(dataset) == 13
    assert dataset[0][1].shape == (3, 2, 3)


def test_build_of_label_maps_alone(tmp_path, image_folder, checkpoint, capsys):
    mapping = tmp_path / "mapping.json"
    mapping.write_text(json.dumps({"cat": 2, "dog": 1, "emu": 0}))
    options = [
        "--no-images",
        "--encoding",
        "topk",
        "--k",
        "2",
        "--store",
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
        (["build", "{images}", "out", *MODEL, "--model-arg", "novalue"], "KEY=VALUE"),
        (["build", "{images}", "out", *MODEL, "--input-size", "1", "2", "3"], "--input-size"),
        (["build", "{images}", "out", "--annotator", "no_such_model"], "no_such_model"),
    ],
)
def test_errors_are_one_message_and_exit_code_1(image_folder, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([argument.format(images=image_folder) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_without_a_command_the_usage_is_shown():
    with pytest.raises(SystemExit, match="2"):
        main([])
