import json
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pkgutil import iter_modules

import pytest

import relabel_datasets as rd

FRONT_DOOR = {
    "Annotator",
    "DatasetError",
    "CropLabels",
    "Ensemble",
    "HFAnnotator",
    "LabelMap",
    "LabelMaps",
    "LabelPooling",
    "ModuleAnnotator",
    "RandomStoredCrop",
    "RelabelDataset",
    "RelabelLoader",
    "RelabelSampler",
    "RelabelStream",
    "TimmAnnotator",
    "__version__",
    "build",
    "collate",
    "collate_crops",
    "decode_image",
    "decode_sample",
    "load_dataset",
    "pool_labels",
    "publish",
    "timm_transforms",
    "verify",
}
MOVED = {
    "ImageFolderSource": "data.ImageFolderSource",
    "ImageError": "errors.ImageError",
    "PublishResult": "hub.PublishResult",
    "RayEngine": "annotate.RayEngine",
    "VerifyReport": "shards.VerifyReport",
    "View": "labels.View",
    "analyze": "analysis.analyze",
    "open_folder": "storage.open_folder",
    "train_student": "train.train_student",
    "write_report": "report.write_report",
}
SUBPACKAGES = sorted(module.name for module in iter_modules(rd.__path__) if module.ispkg)


def test_the_front_door_has_these_names():
    assert set(rd.__all__) == FRONT_DOOR
    assert rd.__version__ == version("relabel-datasets")


@pytest.mark.parametrize("package", ["", *(f".{name}" for name in SUBPACKAGES)])
def test_all_is_sorted_and_every_name_can_be_imported(package):
    module = import_module(f"relabel_datasets{package}")
    assert module.__all__ == sorted(module.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert all(getattr(module, name) is not None for name in module.__all__)
    assert set(module.__all__) <= set(dir(module))


@pytest.mark.parametrize("package", SUBPACKAGES)
def test_no_public_name_is_also_a_module_of_its_subpackage(package):
    module = import_module(f"relabel_datasets.{package}")  # importing the module would replace the name
    assert not {other.name for other in iter_modules(module.__path__)} & set(module.__all__) - {"main"}


@pytest.mark.parametrize("name", MOVED)
def test_the_error_for_a_name_of_a_subpackage_says_where_it_is(name):
    with pytest.raises(
        AttributeError, match=re.escape(f"has no attribute {name!r}: use relabel_datasets.{MOVED[name]}")
    ):
        getattr(rd, name)


def test_an_unknown_name_raises_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'relabel_datasets' has no attribute 'nonsense'$"):
        rd.nonsense  # noqa: B018


FIRST_IMPORT = """
import json, sys
import torch
from torchvision.transforms import v2

def torchvision():
    types = v2.RandAugment, v2.AutoAugment, v2.TrivialAugmentWide, v2.AugMix, v2.RandAugment.__base__
    return [dict(vars(cls)) for cls in types]

def loaded(names):
    return [name for name in names if name in sys.modules]

before = torchvision()
import relabel_datasets as rd
subpackages = loaded(["relabel_datasets.data", "relabel_datasets.analysis", "relabel_datasets.train"])
rd.load_dataset, rd.LabelPooling
heavy = loaded(["timm", "matplotlib", "datasets", "huggingface_hub", "webdataset", "ray"])
rd.data.join, rd.train.evaluate, rd.errors.ImageError, rd.hub.publish
for name in rd.__all__:
    getattr(rd, name)
print(json.dumps({
    "subpackages": subpackages,
    "heavy": heavy,
    "analyze": rd.analysis.analyze.__name__,
    "cuda": torch.cuda.is_initialized(),
    "torchvision": torchvision() == before,
}))
"""


@pytest.fixture(scope="module")
def first_import():
    """Observations of a process that imports the package for the first time."""
    run = subprocess.run([sys.executable, "-c", FIRST_IMPORT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_subpackages_are_imported_when_they_are_first_used(first_import):
    assert first_import["subpackages"] == []
    assert first_import["analyze"] == "analyze"


def test_importing_the_package_imports_no_heavy_library_and_makes_no_cuda_context(first_import):
    assert first_import["heavy"] == []
    assert first_import["cuda"] is False


def test_importing_the_package_changes_nothing_in_torchvision(first_import):
    assert first_import["torchvision"] is True


@pytest.mark.slow
@pytest.mark.parametrize("source", ["label_map", "pickle.loads(pickle.dumps(label_map))", "copy.copy(label_map)"])
def test_transforms_follow_label_maps_before_label_pooling_is_imported(source):
    script = (
        "import copy, pickle, torch, relabel_datasets as rd; from torchvision.transforms import v2; "
        "label_map = rd.LabelMap.from_logits(torch.randn(3, 6, 8), canvas_size=(40, 56)); "
        f"print(v2.RandomHorizontalFlip(1.0)({source}).view != label_map.view)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout == "True\n", run.stderr
