import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import relabel_datasets as rd
from relabel_datasets.cli import main
from relabel_datasets.devices import find_device, widest_float
from relabel_datasets.labels.precision import autocast
from tests.conftest import picture


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


class _WithoutFloat64(TorchDispatchMode):
    """Refuse float64 where the annotator computes, as MPS does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(leaf.dtype == torch.float64 for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)):
            raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype: {func}")
        return result


@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
def test_annotators_compute_without_float64(model):
    annotator = rd.annotate.FlipAveraged(rd.TimmAnnotator(model))
    images = annotator.preprocess(picture(0))[None]
    with _WithoutFloat64():
        logits = annotator(images)
    assert logits.dtype == torch.float32


def test_sums_are_float64_except_on_mps():
    assert widest_float(torch.device("mps")) == torch.float32
    assert widest_float(torch.device("cpu")) == widest_float(torch.device("cuda")) == torch.float64


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "meta"])
def test_float32_needs_no_autocast_of_the_device(device, monkeypatch):
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda name: name == "cpu")  # as torch 2.4 on a Mac
    with autocast(torch.device(device), torch.float32):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_an_mps_device_is_listed_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match="Usable devices: cpu, mps"):
        find_device("cuda:99")
