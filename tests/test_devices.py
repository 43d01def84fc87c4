import re

import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.cli import main
from relabel_datasets.devices import find_device


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpu:x", "meta", "xla", "mps:7", ""])
def test_an_unusable_device_is_an_error_that_lists_the_usable_ones(device):
    with pytest.raises(ValueError, match=r"device.*(Usable devices: cpu|give cpu or cuda)"):
        find_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_an_error_in_every_entry_point(dataset_folder, tmp_path):
    dataset = rd.load_dataset(dataset_folder, "colours", "train")
    for call in (
        lambda: rd.TimmAnnotator("test_resnet", device="cuda"),
        lambda: rd.train.load_classifier("test_resnet", device="cuda"),
        lambda: rd.train.train_student(
            dataset, tmp_path / "run", runtime=rd.train.RuntimeConfig(device="cuda"), recipe=rd.train.Recipe()
        ),
    ):
        with pytest.raises(
            ValueError, match=r"device 'cuda' .*cannot be used on this machine: PyTorch finds no such GPU"
        ):
            call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_one_line_on_the_command_line(image_folder, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["build", str(image_folder), out, "--annotator", "test_resnet", "--device", "cuda"]) == 1
    assert "--device" in capsys.readouterr().err.splitlines()[-1]


def test_the_default_device_is_a_gpu_or_the_cpu():
    assert find_device() == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert find_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 10_000, "is not JSON"),
        ("[1]", "holds a JSON list"),
        ('{"cat": null}', "maps class 'cat' to None"),
        ('{"cat": true}', "maps class 'cat' to True"),
        ('{"cat": [1, 2]}', r"maps class 'cat' to \[1, 2\]"),
        ("\ufeff\ufeff", "is not JSON"),
    ],
)
def test_an_invalid_class_mapping_is_one_line(content, message, image_folder, tmp_path, capsys):
    path = tmp_path / "mapping.json"
    path.write_text(content)
    options = ["--annotator", "test_resnet", "--class-mapping", str(path)]
    assert main(["build", str(image_folder), str(tmp_path / "out"), *options]) == 1
    shown = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f"mapping.json {message}.*--class-mapping must be a JSON object", shown)
    assert len(shown) < 500
