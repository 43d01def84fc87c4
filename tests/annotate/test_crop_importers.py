import numpy as np
import PIL.Image
import pytest
import torch
from torchvision.transforms import functional as F

import relabel_datasets as rd
from relabel_datasets.annotate.crop_files import CropFile
from relabel_datasets.cli import main
from relabel_datasets.labels.statistics import add_up, stored_crop_statistics, total
from relabel_datasets.shards.images import _TRANSPOSES
from tests.annotate.crop_releases import (
    CLASSES,
    read_fkd_crop,
    read_fkd_labels,
    read_plus_labels,
    save,
    size_of,
    write_fkd,
    write_plus,
)
from tests.annotate.releases import pack


def run(release, root, images, source_format="fkd", **options):
    crop_options = {name: options.pop(name) for name in ("split", "label_type", "classes") if name in options}
    crops = rd.annotate.PublishedCrops(release, source_format, images, **{"classes": CLASSES, **crop_options})
    return rd.annotate.import_crops(crops, root, **{"progress": False, **options})


def stored_crops(root, config, images, size=16, num_crops=7):
    """Return all crops and soft labels of each image by key, as RandomStoredCrop returns them."""
    transform = rd.RandomStoredCrop(size, num_crops=num_crops)
    dataset = rd.load_dataset(root, config, "train", images=images, transforms=transform)
    assert len(dataset) == 13
    return dict(zip(dataset.keys, dataset, strict=True))


def assert_same_crops(crops, labels, expected_crops, expected_labels):
    """Check that crops in random order are the expected ones with their labels."""
    order = torch.cdist(labels.double(), expected_labels.double()).argmin(1)
    assert sorted(order.tolist()) == list(range(len(labels)))
    torch.testing.assert_close(labels, expected_labels[order], rtol=1e-6, atol=1e-6)
    for crop, index in zip(crops, order.tolist(), strict=True):
        np.testing.assert_array_equal(crop, F.pil_to_tensor(expected_crops[index]))


@pytest.mark.parametrize(
    ("label_type", "dtype"),
    [
        ("marginal_smoothing_k5", np.float32),
        ("marginal_renorm", np.float16),
        *(pytest.param(name, np.float32, marks=pytest.mark.slow) for name in ("smoothing", "marginal_smoothing_k10")),
    ],
)
def test_crops_and_labels_of_fkd_equal_those_of_its_reader(tmp_path, image_folder, label_type, dtype):
    contents = write_fkd(tmp_path / "release", image_folder, label_type, dtype)
    run(tmp_path / "release", tmp_path / "data", image_folder, label_type=label_type)
    for key, (crops, labels) in stored_crops(tmp_path / "data", "fkd", image_folder).items():
        boxes, flips, stored = contents[key]
        image = PIL.Image.open(next(image_folder.glob(f"*/{key}.*"))).convert("RGB")
        expected = [read_fkd_crop(image, box, flip, 16) for box, flip in zip(boxes, flips, strict=True)]
        assert_same_crops(crops, labels, expected, read_fkd_labels(stored, label_type))


def test_crops_and_labels_of_imagenet_plus_equal_those_of_its_reader(tmp_path, image_folder):
    samples = write_plus(tmp_path / "release", image_folder)
    run(tmp_path / "release", tmp_path / "data", image_folder, "imagenet-plus")
    for key, (crops, labels) in stored_crops(tmp_path / "data", "imagenet-plus", image_folder).items():
        image = PIL.Image.open(next(image_folder.glob(f"*/{key}.*"))).convert("RGB")
        expected = []
        for sample in samples[key]:
            (top, left, height, width), flip = sample["params"]
            crop = F.resized_crop(image, top, left, height, width, [16, 16], F.InterpolationMode.BILINEAR)
            expected.append(F.hflip(crop) if flip else crop)
        assert_same_crops(crops, labels, expected, torch.stack([read_plus_labels(s["prob"]) for s in samples[key]]))


def test_hard_labels_and_half_precision_are_stored_as_published_and_measured(tmp_path, image_folder):
    hard = write_fkd(tmp_path / "hard", image_folder, "hard")
    half = write_fkd(tmp_path / "half", image_folder, "marginal_smoothing_k5", np.float16)
    for name, contents in (("hard", hard), ("half", half)):
        run(tmp_path / name, tmp_path / "data", image_folder, config=name)
        label_maps = rd.LabelMaps(tmp_path / "data", name)
        measured = add_up(stored_crop_statistics(one.soft_labels(), one.label) for one in label_maps.values())
        assert total(label_maps.split.shard_statistics) == measured
        assert measured.shown > measured.several > 0
        for key, labels in label_maps.items():
            boxes, flips, stored = contents[key]
            np.testing.assert_array_equal(labels.tensors["crop_boxes"], boxes)
            np.testing.assert_array_equal(labels.flips, flips)
            if name == "half":
                np.testing.assert_array_equal(labels.tensors["crop_probs"], stored[:, 1])
                np.testing.assert_array_equal(labels.tensors["crop_classes"], stored[:, 0])
            else:
                assert labels.soft_labels().argmax(1).tolist() == stored.tolist()
                assert labels.soft_labels().max(1).values.tolist() == [1] * 7


def test_the_manifest_records_the_release(tmp_path, image_folder):
    contents = write_fkd(tmp_path / "release", image_folder, "marginal_renorm")
    manifest = run(
        tmp_path / "release",
        tmp_path / "data",
        image_folder,
        label_type="marginal_renorm_k5",
        config="mine",
        shard_size=5,
    )
    assert {**manifest.annotator, "sample_sha256": ""} == {
        "kind": "imported",
        "name": "mine",
        "format": "fkd",
        "reference": "https://github.com/szq0214/FKD",
        "label_type": "marginal_renorm",
        "num_classes": 12,
        "sample_sha256": "",
    }
    assert manifest.encoding == {"name": "crops", "k": 5, "dtype": "sparse", "num_crops": 7, "map_size": None}
    assert manifest.classes == list(CLASSES)
    split = manifest.splits["train"]
    assert split.computed_with is None
    means = {key: read_fkd_labels(stored, "marginal_renorm").mean(0) for key, (_, _, stored) in contents.items()}
    labels = {path.stem: CLASSES.index(path.parent.name) for path in image_folder.glob("*/*")}
    agreeing = sum(int(mean.argmax()) == labels[key] for key, mean in means.items())
    assert split.agreement == pytest.approx(agreeing / 13)
    assert "mine" in (tmp_path / "data" / "README.md").read_text()
    assert rd.verify(tmp_path / "data", num_workers=0, progress=False).problems == []


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_have_the_same_samples_as_a_build_of_the_same_images(tmp_path, image_folder, annotator):
    write_fkd(tmp_path / "release", image_folder, "smoothing", np.float32, 3)
    imported = run(
        tmp_path / "release", tmp_path / "data", image_folder, shard_size=4, include_images=True, classes=None
    )
    built = rd.build(
        rd.data.ImageFolderSource(image_folder), tmp_path / "data", annotator, shard_size=4, progress=False
    )
    maps = [rd.LabelMaps(tmp_path / "data", name) for name in ("fkd", "colours")]
    assert list(maps[0]) == list(maps[1])
    assert [maps[0].image_bytes(row) for row in range(13)] == [maps[1].image_bytes(row) for row in range(13)]
    assert imported.splits["train"].source_sha256 == built.splits["train"].source_sha256


def test_folders_splits_and_tars_of_a_release_produce_the_same_shards(tmp_path, image_folder):
    write_fkd(tmp_path / "release" / "train", image_folder)
    write_plus(tmp_path / "plus", image_folder)
    run(tmp_path / "release", tmp_path / "split", image_folder)
    run(tmp_path / "release" / "train", tmp_path / "folder", image_folder, num_threads=1)
    run(pack(tmp_path / "release", tmp_path / "release.tar"), tmp_path / "tar", image_folder)
    assert (
        files_of(tmp_path / "split" / "fkd")
        == files_of(tmp_path / "folder" / "fkd")
        == files_of(tmp_path / "tar" / "fkd")
    )
    run(tmp_path / "plus", tmp_path / "folder", image_folder, "imagenet-plus")
    run(pack(tmp_path / "plus", tmp_path / "plus.tar"), tmp_path / "tar", image_folder, "imagenet-plus")
    assert files_of(tmp_path / "folder" / "imagenet-plus") == files_of(tmp_path / "tar" / "imagenet-plus")


def test_an_interrupted_import_goes_on_and_produces_the_same_bytes(tmp_path, image_folder, monkeypatch):
    write_fkd(tmp_path / "release", image_folder)
    run(tmp_path / "release", tmp_path / "whole", image_folder, shard_size=5)
    load, num_loaded = rd.annotate.PublishedCrops.load, []
    folder = tmp_path / "data" / "fkd"

    def interrupted(self, index):
        if (folder / "train-00001-of-00003.tar").exists():
            raise KeyboardInterrupt
        return load(self, index)

    def counting(self, index):
        num_loaded.append(index)
        return load(self, index)

    monkeypatch.setattr(rd.annotate.PublishedCrops, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "release", tmp_path / "data", image_folder, shard_size=5)
    assert not (folder / "_info.json").exists()
    monkeypatch.setattr(rd.annotate.PublishedCrops, "load", counting)
    run(tmp_path / "release", tmp_path / "data", image_folder, shard_size=5)
    assert files_of(folder) == files_of(tmp_path / "whole" / "fkd")
    assert len(num_loaded) == 13 + 3  # the sample, and the last shard
    (folder / "train-00000-of-00003.tar").write_bytes(b"damaged")
    run(tmp_path / "release", tmp_path / "data", image_folder, shard_size=5)
    assert files_of(folder) == files_of(tmp_path / "whole" / "fkd")


def test_another_release_does_not_join_an_existing_config(tmp_path, image_folder):
    write_fkd(tmp_path / "release", image_folder)
    write_fkd(tmp_path / "other", image_folder, "marginal_smoothing_k10")
    run(tmp_path / "release", tmp_path / "data", image_folder)
    for source, options in (("other", {}), ("release", {"label_type": "marginal_renorm"})):
        with pytest.raises(rd.DatasetError, match="built with another annotator"):
            run(tmp_path / source, tmp_path / "data", image_folder, **options)
        run(tmp_path / source, tmp_path / "data", image_folder, config=source, **options)


def test_bad_and_unmatched_files_stop_the_import_or_are_listed(tmp_path, image_folder, capsys):
    contents = write_fkd(tmp_path / "release", image_folder)
    files = {path.stem: path for path in (tmp_path / "release").glob("*/*")}
    files["photo_00"].write_bytes(b"")
    with pytest.raises(rd.errors.LabelMapError, match=r"photo_00.tar: is damaged.*skip_bad=True") as caught:
        run(tmp_path / "release", tmp_path / "data", image_folder)
    assert str(caught.value).count(str(files["photo_00"])) == 1
    files["photo_00"].write_bytes(save(contents["photo_00"]))
    assert run(tmp_path / "release", tmp_path / "data", image_folder).splits["train"].num_samples == 13  # resumed
    files["photo_00"].write_bytes(b"")
    boxes, flips, labels = contents["photo_01"]
    files["photo_01"].write_bytes(save([boxes[:3], flips[:3], labels[:3]]))
    (image_folder / "emu" / "photo_02.jpg").write_bytes(b"not an image")
    files["photo_03"].unlink()
    next(image_folder.glob("*/photo_04.*")).unlink()
    message = (
        "1 crop label file without an image, such as 'photo_04'; 1 image without a crop label file, such as 'photo_03'"
    )
    with pytest.raises(rd.DatasetError, match=message):
        run(tmp_path / "release", tmp_path / "data", image_folder)
    split = run(tmp_path / "release", tmp_path / "rest", image_folder, skip_bad=True).splits["train"]
    assert split.num_samples == 8
    errors = {entry["key"]: entry["error"] for entry in split.skipped}
    assert errors.keys() == {f"photo_0{i}" for i in range(5)}
    assert "expected 7 crops with 5 classes as in the other files, got [3, 5]" in errors["photo_01"]
    assert "cannot be read as an image" in errors["photo_02"]
    assert "there is no crop label file" in errors["photo_03"]
    assert str(files["photo_00"]) in capsys.readouterr().err


def test_images_of_another_dataset_are_refused(tmp_path, image_folder):
    write_fkd(tmp_path / "release", image_folder)
    write_plus(tmp_path / "plus", image_folder)
    (tmp_path / "plus" / "13.pth.tar").write_bytes(b"")
    with pytest.raises(rd.DatasetError, match=r"13.pth.tar belongs to none of the 13 images"):
        run(tmp_path / "plus", tmp_path / "data", image_folder, "imagenet-plus")
    (tmp_path / "plus" / "config.pth.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"plus has no config.pth.tar"):
        run(tmp_path / "plus", tmp_path / "data", image_folder, "imagenet-plus")
    first = min((tmp_path / "release").glob("*/*"))
    for path in image_folder.glob("*/*"):
        path.rename(path.with_stem(f"other_{path.stem}"))
    with pytest.raises(rd.DatasetError, match=rf"none of 13 images, such as .*other_.*, such as {first}"):
        run(tmp_path / "release", tmp_path / "data", image_folder, skip_bad=True)
    assert not (tmp_path / "data").exists()


def test_names_end_at_their_first_dot_as_in_fkd(tmp_path, image_folder):
    write_fkd(tmp_path / "release", image_folder)
    first = next(image_folder.glob("*/photo_00.*"))
    first.rename(first.with_name("photo_00.v2.final.jpg"))
    assert run(tmp_path / "release", tmp_path / "data", image_folder).splits["train"].num_samples == 13
    first.write_bytes(b"")
    with pytest.raises(rd.DatasetError, match="same name up to its first dot"):
        run(tmp_path / "release", tmp_path / "data", image_folder, config="two")


def test_labels_that_disagree_with_most_classes_cause_a_warning(tmp_path, image_folder, caplog):
    contents = write_fkd(tmp_path / "release", image_folder, "hard")
    for path in (tmp_path / "release").glob("*/*"):
        boxes, flips, labels = contents[path.stem]
        path.write_bytes(save([boxes, flips, np.full_like(labels, CLASSES.index(path.parent.name))]))
    run(tmp_path / "release", tmp_path / "data", image_folder)
    assert caplog.text == ""
    run(tmp_path / "release", tmp_path / "data", image_folder, classes=CLASSES[::-1], config="reversed")
    assert "only 0.0 % of the images have crop labels whose mean ranks the class of the image first" in caplog.text


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_with_the_image(orientation):
    stored = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8))
    turn = _TRANSPOSES.get(orientation)
    upright = stored if turn is None else stored.transpose(turn)
    box = np.array([[4, 7, 20, 30]])
    for boxes in (box, box / np.tile([30, 50], 2)):
        file = CropFile(boxes, np.zeros(1, bool), np.zeros((1, 1), int), np.ones((1, 1), np.float32), spread_rest=False)
        shares = file.shares((upright.height, upright.width), orientation)
        top, left, height, width = (
            (shares[0] * np.tile([upright.height, upright.width], 2)).round().astype(int).tolist()
        )
        expected = stored.crop((7, 4, 37, 24))
        expected = expected if turn is None else expected.transpose(turn)
        np.testing.assert_array_equal(upright.crop((left, top, left + width, top + height)), expected)


def test_images_with_an_orientation_are_imported_with_the_size_of_the_upright_image(tmp_path, image_folder):
    path = next(image_folder.glob("*/photo_00.*"))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.open(path).save(path, exif=exif)
    write_plus(tmp_path / "plus", image_folder)
    run(tmp_path / "plus", tmp_path / "data", image_folder, "imagenet-plus")
    dataset = rd.load_dataset(tmp_path / "data", "imagenet-plus", "train", images=image_folder)
    labels = dataset.label_maps["photo_00"]
    assert labels.canvas_size == size_of(path)[::-1]
    image = dataset.image(dataset.keys.index("photo_00"))
    assert (image.height, image.width) == labels.canvas_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_size": 0}, "shard_size must be at least 1"),
        ({"num_threads": 0}, "num_threads must be at least 1"),
        ({"card": "no-such-card"}, "no-such-card"),
        ({"label_type": "soft"}, "label_type must be one of hard"),
        ({"label_type": "hard"}, "none of 13 files has crop labels of format 'fkd'"),
        ({"classes": ("cat", "dog")}, "1 folder not among the 2 classes"),
        ({"source_format": "relabel"}, "source_format must be one of"),
        ({"source_format": "imagenet-plus"}, "has no crop label files: expected <index>.pth.tar"),
        ({"source_format": "imagenet-plus", "label_type": "hard"}, "label_type='hard' is for files of FKD"),
    ],
)
def test_invalid_options_are_refused_before_any_work(tmp_path, image_folder, options, message):
    write_fkd(tmp_path / "release", image_folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path / "release", tmp_path / "data", image_folder, **options)
    assert not (tmp_path / "data" / "fkd").exists()


def test_the_command_recognizes_the_format_and_prints_how_to_load(tmp_path, image_folder, capsys):
    write_fkd(tmp_path / "fkd", image_folder)
    write_plus(tmp_path / "plus", image_folder)
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(CLASSES))
    for source, config in (("fkd", "fkd"), ("plus", "imagenet-plus")):
        arguments = ["import", str(tmp_path / source), str(tmp_path / "data"), "--classes", str(classes)]
        assert main(arguments) == 1
        assert "give --images" in capsys.readouterr().err
        assert main([*arguments, "--images", str(image_folder)]) == 0
        printed = capsys.readouterr().out
        assert f"{config}: 13 samples in 1 shard" in printed
        dataset = eval(
            printed.splitlines()[-1], {"load_dataset": rd.load_dataset}
        )  # the printed line must be valid code
        assert dataset[0][1].num_crops == 7
    for option, value in (("--order", "wh"), ("--storage-dtype", "uint8")):
        assert main([*arguments, "--images", str(image_folder), option, value]) == 1
        assert f"{option} is for label maps" in capsys.readouterr().err
