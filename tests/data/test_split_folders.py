"""Which folders are splits and which are classes."""

import pytest

from relabel_datasets.data.split_folders import check_same_classes, find_split_folders
from relabel_datasets.errors import DatasetError


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (("train/cat/1.jpg", "val/cat/2.jpg"), {"train": "train", "validation": "val"}),
        (
            ("train/cat/1.jpg", "validation/cat/2.jpg", "test/cat/3.PNG"),
            {"train": "train", "validation": "validation", "test": "test"},
        ),
        (("valid/cat/deep/2.jpg", "train/cat/1.jpg", "README.md"), {"train": "train", "validation": "valid"}),
        (("train/cat/1.jpg",), {"train": "train"}),
        (("train/cat/1.jpg", "annotations/1.xml", ".cache/x/1.jpg"), {"train": "train"}),
        (("train/0.tar", "val/0.tar"), {"train": "train", "validation": "val"}),
        (("train/state.json",), {"train": "train"}),
        (("train/1.jpg", "val/2.jpg"), {}),  # classes called train and val
        (("train/cat/1.jpg", "bus/city/2.jpg"), {}),  # a class called train among others
        (("cat/1.jpg", "dog/2.jpg"), {}),
        (("train/1.jpg", "train/cat/2.jpg"), {}),
        (("1.jpg",), {}),
        (("train/notes.txt",), {}),
        ((), {}),
    ],
)
def test_depth_tells_splits_from_classes(tmp_path, files, splits):
    assert find_split_folders(touch(tmp_path, *files)) == {split: tmp_path / name for split, name in splits.items()}


def test_the_order_is_train_validation_test(tmp_path):
    touch(tmp_path, "test/a/1.jpg", "val/a/1.jpg", "train/a/1.jpg")
    assert list(find_split_folders(tmp_path)) == ["train", "validation", "test"]


def test_a_split_without_class_folders_is_left_out_with_a_warning(tmp_path, caplog):
    touch(tmp_path, "train/cat/1.jpg", "test/2.jpg")
    assert find_split_folders(tmp_path) == {"train": tmp_path / "train"}
    assert f"{tmp_path / 'test'} has no class folders: it is left out" in caplog.text


def test_two_folders_of_one_split_are_an_error(tmp_path):
    touch(tmp_path, "val/cat/1.jpg", "validation/cat/1.jpg")
    with pytest.raises(DatasetError, match=r"are both split 'validation': rename or move one of them"):
        find_split_folders(tmp_path)


@pytest.mark.parametrize("path", ["hf:cifar10", "s3://bucket/photos", "/nowhere"])
def test_other_paths_have_no_split_folders(path):
    assert find_split_folders(path) == {}


def test_a_saved_dataset_dict_has_no_split_folders_because_it_names_its_splits(tmp_path):
    import datasets

    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"label": [0]})}).save_to_disk(tmp_path)
    assert find_split_folders(tmp_path) == {}


def test_splits_must_have_the_same_classes():
    check_same_classes({"a": ("cat", "dog"), "b": ("cat", "dog"), "c": None})
    with pytest.raises(DatasetError) as error:
        check_same_classes({"train": ("a", "b", "c", "d", "e"), "val": ("e", "f")})
    assert str(error.value) == (
        "train and val have different class folders (only train has 'a', 'b', 'c' and 1 more; only val has 'f'): give both the same "
        "class folders, or build one of them alone with split="
    )
