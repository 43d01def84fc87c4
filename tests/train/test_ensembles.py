"""An ensemble on the command line: built from several annotators, recorded, and rebuilt as the teacher of a student."""

import pytest
import timm
import torch
from safetensors.torch import save_file

import relabel_datasets as rd
from relabel_datasets.cli import main
from tests.train.tiny import OPTIONS

NAMES = ("resnet10t", "mobilenetv3_small_050")


@pytest.fixture
def checkpoints(tmp_path):
    paths = []
    for name in NAMES:
        paths.append(str(tmp_path / f"{name}.safetensors"))
        save_file(timm.create_model(name, num_classes=3).state_dict(), paths[-1])
    return paths


@pytest.mark.slow
def test_label_maps_of_an_ensemble_are_built_and_its_members_teach_a_student(
    image_folder, tmp_path, checkpoints, capsys
):
    torch.manual_seed(0)
    out, run = str(tmp_path / "data"), str(tmp_path / "run")
    members = [
        option
        for pair in zip(NAMES, checkpoints, strict=True)
        for option in ("--annotator", pair[0], "--checkpoint", pair[1])
    ]
    shared = [
        "--input-size",
        "64",
        "--model-kwargs",
        "num_classes=3",
        "--class-mapping",
        str(tmp_path / "mapping.json"),
    ]
    (tmp_path / "mapping.json").write_text('{"cat": 0, "dog": 1, "emu": 2}')
    assert main(["build", str(image_folder), out, *members, *shared]) == 0
    manifest = rd.LabelMaps(out).manifest
    assert (manifest.config, manifest.annotator["name"]) == ("-".join(NAMES), "+".join(NAMES))
    assert [member["name"] for member in manifest.annotator["annotators"]] == list(NAMES)
    assert len({member["weights_sha256"] for member in manifest.annotator["annotators"]}) == 2
    train = ["train", out, "--validation", "train", "--out", run, *OPTIONS, "--num-workers", "0"]
    train += [
        "--labels",
        "distilled",
        "--epochs",
        "1",
        "--mix-off-epochs",
        "0",
        "--batch-size",
        "4",
        "--label-weight",
        "0.5",
    ]
    assert main([*train, "--checkpoint", checkpoints[0]]) == 1
    assert "give --checkpoint once per model, in this order" in capsys.readouterr().err
    assert main([*train, "--checkpoint", checkpoints[1], "--checkpoint", checkpoints[0]]) == 1
    assert main([*train, "--checkpoint", checkpoints[0], "--checkpoint", checkpoints[1]]) == 0
