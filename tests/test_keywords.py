import inspect
import pickle

import pytest
import timm
import torch
from torchvision import transforms as v1
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.labels.transform_checks import check_transforms

LOAD = {  # keyword: suggestion
    "transform": "transforms",
    "trasforms": "transforms",
    "Transforms": "transforms",
    "config": "name",
    "config_name": "name",
    "subset": "name",
    "root": "path",
    "data_dir": "path",
    "use_auth_token": "token",
    "tokens": "token",
    "batchsize": "batch_size",
    "num_replicas": "world_size",
    "image": "images",
    "splits": "split",
    "train": "split",
    "stream": "streaming",
    "cachedir": "cache_dir",
    "revison": "revision",
    "storage_option": "storage_options",
    "shuffle_buffer_size": "window",
}


@pytest.mark.parametrize(("given", "meant"), LOAD.items())
@pytest.mark.parametrize("streaming", [False, True])
def test_load_dataset_suggests_the_keyword_that_was_meant(given, meant, streaming):
    with pytest.raises(TypeError, match=rf"load_dataset\(\) has no argument '{given}': did you mean '{meant}'\?"):
        rd.load_dataset("nowhere", streaming=streaming, **{given: None})


@pytest.mark.parametrize(
    "given", ["target_transform", "num_workers", "num_proc", "trust_remote_code", "keep_in_memory"]
)
def test_load_dataset_gives_advice_for_keywords_of_other_libraries(given):
    with pytest.raises(TypeError, match=f"no argument '{given}': (pass|leave it out)"):
        rd.load_dataset("nowhere", **{given: None})


def test_arguments_of_a_stream_require_streaming():
    with pytest.raises(TypeError, match="batch_size=, shuffle= only applies to a stream: pass streaming=True"):
        rd.load_dataset("nowhere", shuffle=True, batch_size=3)


def test_an_unknown_keyword_without_a_similar_one_lists_the_arguments():
    with pytest.raises(TypeError, match="'zzz': its arguments are path, name, split"):
        rd.load_dataset("nowhere", zzz=1)


@pytest.mark.parametrize(
    ("call", "given", "meant"),
    [
        (rd.RelabelDataset, "transform", "transforms"),
        (rd.RelabelDataset, "root", "path"),
        (rd.RelabelDataset, "name", "config"),
        (rd.RelabelStream, "batchsize", "batch_size"),
        (rd.RelabelStream, "num_replicas", "world_size"),
        (rd.RelabelSampler, "num_replicas", "world_size"),
        (rd.LabelMaps, "name", "config"),
        (rd.LabelMaps, "folder", "path"),
        (rd.LabelPooling, "size", "output_size"),
        (rd.LabelPooling, "tau", "temperature"),
        (rd.build, "name", "config"),
        (rd.build, "class_map", "class_mapping"),
        (rd.build, "root", "path"),
        (rd.build, "output_dir", "path"),
        (rd.annotate.import_label_maps, "root", "path"),
        (rd.publish, "tags", "tag"),
        (rd.publish, "folder", "path"),
        (rd.analysis.analyze, "dataset", "path"),
        (rd.analysis.analyze, "name", "config"),
        (rd.report.write_report, "dataset", "path"),
        (rd.report.write_report, "name", "config"),
        (rd.report.describe, "name", "config"),
        (rd.verify, "workers", "num_workers"),
        (rd.train.train_student, "validations", "validation"),
        (rd.train.train_student, "machine", "runtime"),
        (rd.train.load_classifier, "weights", "checkpoint"),
        (rd.train.evaluate, "workers", "num_workers"),
        (rd.train.compare, "students", "entries"),
        (rd.storage.open_folder, "use_auth_token", "token"),
    ],
)
def test_other_functions_suggest_the_keyword_that_was_meant(call, given, meant):
    with pytest.raises(TypeError, match=rf"{call.__name__}\(\) has no argument '{given}': did you mean '{meant}'\?"):
        call(**{given: None})


def test_checked_functions_keep_their_signature_and_can_be_pickled():
    assert next(iter(inspect.signature(rd.LabelPooling).parameters)) == "output_size"
    assert pickle.loads(pickle.dumps(rd.load_dataset)) is rd.load_dataset
    assert pickle.loads(pickle.dumps(rd.LabelPooling(2))).output_size == 2


class Pair(v1.Compose):
    """Compose of torchvision v1 that is called with a pair."""

    def __call__(self, image, label_map):
        return image, label_map


V1 = {
    "Compose": (v1.Compose([v1.RandomResizedCrop(8), v1.ToTensor()]), "RandomResizedCrop -> v2.RandomResizedCrop"),
    "ToTensor": (v1.ToTensor(), r"ToTensor -> v2.ToImage\(\), v2.ToDtype\(torch.float32, scale=True\)"),
    "empty": (v1.Compose([]), "Compose.*use v2.Compose"),
    "in v2": (v2.Compose([v2.Resize(8), v1.RandomHorizontalFlip()]), "RandomHorizontalFlip -> v2.RandomHorizontalFlip"),
    "nested": (v2.Compose([v2.RandomApply([v1.ColorJitter(0.1)])]), "ColorJitter -> v2.ColorJitter"),
    "sequential": (torch.nn.Sequential(v1.CenterCrop(8)), "CenterCrop -> v2.CenterCrop"),
    "auto augment": (v2.Compose([v1.RandAugment()]), "RandAugment -> v2.RandAugment"),
    "lambda": (v1.Compose([v1.Lambda(str)]), "Lambda -> v2.Lambda"),
    "timm": (timm.data.create_transform(8, is_training=True), "timm_transforms"),
}


@pytest.mark.parametrize("case", V1)
def test_an_error_lists_transforms_of_v1_with_their_counterparts(case, dataset_folder):
    transforms, message = V1[case]
    with pytest.raises(TypeError, match=rf"transforms of torchvision.transforms \(v1\).*{message}"):
        rd.load_dataset(dataset_folder, "colours", "train", transforms=transforms)


@pytest.mark.parametrize(
    "transforms",
    [
        None,
        v2.Compose([v2.RandomResizedCrop(8), v2.RandomApply([v2.ColorJitter()]), rd.LabelPooling()]),
        rd.LabelPooling(),
        lambda image, label_map: (image, label_map),
        Pair([]),
        rd.timm_transforms(8),
        v2.Compose([rd.LabelPooling(localized=False), v2.RandomCrop(8)]),
        v2.Compose([v2.RandomCrop(8), rd.LabelPooling(), v2.RandomHorizontalFlip(), v2.Resize(8)]),
    ],
)
def test_transforms_of_a_pair_are_accepted(transforms):
    check_transforms(transforms)


@pytest.mark.parametrize(
    "crop", [v2.RandomResizedCrop(8), v2.RandomCrop(8), v2.CenterCrop(8), v2.FiveCrop(8), v2.TenCrop(8)]
)
def test_a_crop_after_label_pooling_is_refused(crop, dataset_folder):
    transforms = v2.Compose([v2.Resize(9), rd.LabelPooling(), v2.ToImage(), crop])
    with pytest.raises(ValueError, match=f"place LabelPooling after {type(crop).__name__}"):
        rd.load_dataset(dataset_folder, "colours", "train", transforms=transforms)


def test_transforms_that_are_not_callable_are_refused():
    with pytest.raises(TypeError, match=r"called with an image and its label map, got list: give a v2.Compose"):
        check_transforms([v2.Resize(8)])
