"""Students and timm's transforms on datasets of stored crops."""

import copy
import json
import pickle
import random

import numpy as np
import pytest
import torch
from timm.data import create_transform

import relabel_datasets as rd
from relabel_datasets.annotate import BuildConfig
from relabel_datasets.cli import main
from relabel_datasets.train.comparison import score_label_maps
from relabel_datasets.train.loaders import train_loader
from tests.conftest import colours, picture
from tests.train.tiny import OPTIONS

NUM_IMAGES, NUM_CROPS = 24, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset with a config of stored crops and one of label maps of the same images."""
    root = tmp_path_factory.mktemp("train-crops")
    for i in range(NUM_IMAGES):
        path = root / "images" / ("cat", "dog", "emu")[i % 3] / f"photo_{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, (40, 56) if i % 2 else (48, 32)).save(path)
    source = rd.data.ImageFolderSource(root / "images")
    crops = BuildConfig(encoding="crops", num_crops=NUM_CROPS)
    for split in ("train", "validation"):
        rd.build(source, root / "data", colours(), config="crops", split=split, build_config=crops, progress=False)
        rd.build(source, root / "data", colours(), config="maps", split=split, progress=False)
    return root / "data"


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  timm draws from it
    torch.manual_seed(seed)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"color_jitter": 0.4, "re_prob": 1.0, "vflip": 0.5, "grayscale_prob": 0.5},
        {"use_prefetcher": True},
        {"auto_augment": "rand-m9-n2-tinc"},
    ],
)
def test_timm_changes_the_pixels_of_a_stored_crop_as_it_changes_those_of_an_image(folder, arguments, monkeypatch):
    if "auto_augment" in arguments:
        monkeypatch.setattr("timm.data.auto_augment._RAND_INCREASING_TRANSFORMS", ["AutoContrast", "ColorIncreasing"])
        arguments = {"auto_augment": "rand-m9-inc1"}
    image, labels = rd.load_dataset(folder, "crops", split="train")[0]
    labels = labels.at_epoch(3)  # the crop depends on the epoch, not on random numbers
    transforms = rd.timm_transforms(24, crop=rd.RandomStoredCrop(24), **arguments)
    expected_crop, expected_label = rd.RandomStoredCrop(24)(image, labels)
    plain = create_transform(24, is_training=True, **{**arguments, "scale": (1.0, 1.0), "hflip": 0.0, "vflip": 0.0})
    for seed in range(4):
        seed_all(seed)
        crop, label = pickle.loads(pickle.dumps(transforms))(image, labels)
        seed_all(seed)
        expected = expected_crop
        for step in plain.transforms[1:]:
            expected = step(expected)
        assert torch.equal(torch.as_tensor(crop), torch.as_tensor(expected))
        assert torch.equal(label, expected_label)


def test_timm_changes_each_of_several_crops_by_itself(folder):
    image, labels = rd.load_dataset(folder, "crops", split="train")[0]
    crops, soft = rd.timm_transforms(24, crop=rd.RandomStoredCrop(24, num_crops=3), color_jitter=0.4)(image, labels)
    assert (crops.shape, crops.dtype, soft.shape) == ((3, 3, 24, 24), torch.float32, (3, 3))
    batch, targets = rd.collate_crops([(crops, soft)] * 2)
    assert (batch.shape, targets.shape) == ((6, 3, 24, 24), (6, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"is_training": False}, "takes the place of timm's random resized crop"),
        ({"no_aug": True}, "takes the place of timm's random resized crop"),
        ({"train_crop_mode": "rkrc"}, "takes the place of timm's random resized crop"),
        ({"auto_augment": "rand-m9-mstd0.5-inc1"}, "timm's operation .* moves the image"),
        ({"auto_augment": "augmix-m3-w3"}, "timm's AugMixAugment cannot follow a stored crop"),
        ({"crop": rd.RandomStoredCrop(32)}, r"crop= has size \[32, 32\], but image_size= is \[24, 24\]"),
    ],
)
def test_arguments_that_do_not_fit_stored_crops_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        rd.timm_transforms(24, **{"crop": rd.RandomStoredCrop(24), **arguments})


def test_timm_transforms_of_the_other_kind_of_labels_are_refused(folder):
    crops, maps = (rd.load_dataset(folder, config, split="train") for config in ("crops", "maps"))
    with pytest.raises(TypeError, match=r"pass crop=RandomStoredCrop\(image_size\) to timm_transforms"):
        rd.timm_transforms(24)(*crops[0])
    with pytest.raises(TypeError, match="needs CropLabels, but the sample has a LabelMap"):
        rd.timm_transforms(24, crop=rd.RandomStoredCrop(24))(*maps[0])
    with pytest.raises(TypeError, match="need an image, got ndarray"):
        rd.timm_transforms(24, crop=rd.RandomStoredCrop(24))(np.asarray(crops[0][0]), crops[0][1])


def loader_of(folder, config, recipe, num_workers=0):
    dataset = rd.load_dataset(folder, config, split="train")
    return train_loader(
        dataset, recipe, interpolation="bicubic", rank=0, world_size=1, num_workers=num_workers, window=8
    )


def batches(loader, transforms, epoch=0):
    loader.set_epoch(epoch)
    transforms.set_epoch(epoch)
    return list(loader)


def is_equal(batch, other):
    return all(torch.equal(*pair) for pair in zip(batch, other, strict=True))


def test_soft_targets_are_those_of_stored_crops(folder, tiny):
    recipe = tiny.changed(batch_size=8, temperature=2.0, label_weight=0.25)
    dataset = rd.load_dataset(folder, "crops", split="train")
    known = torch.cat(
        [
            0.75 * labels.soft_labels(temperature=2.0) + 0.25 * torch.eye(3)[labels.label]
            for _, labels in (dataset[i] for i in range(NUM_IMAGES))
        ]
    )
    seen = []
    for epoch in range(NUM_CROPS):
        for images, targets in batches(*loader_of(folder, "crops", recipe), epoch):
            assert (images.shape, images.dtype) == ((8, 3, 32, 32), torch.uint8)
            distances, places = (targets[:, None] - known).abs().sum(2).min(1)
            assert float(distances.max()) < 1e-5
            seen += places.tolist()
    assert len(set(seen)) > 0.8 * len(known)  # each crop once; some have equal labels


def test_a_batch_has_several_different_crops_of_each_image(folder, tiny):
    many, one = tiny.changed(batch_size=2 * NUM_CROPS, num_crops=NUM_CROPS), tiny.changed(batch_size=2)
    for epoch in range(2):
        several = batches(*loader_of(folder, "crops", many), epoch)
        assert len(several) == NUM_IMAGES // 2
        # Crop i of an image in epoch e is its crop of epoch NUM_CROPS * e + i, one at a time.
        alone = [dict(zip(*keys_and_labels(folder, NUM_CROPS * epoch + i), strict=True)) for i in range(NUM_CROPS)]
        keys, _ = keys_and_labels(folder, epoch)
        for step, (images, targets) in enumerate(several):
            assert (images.shape, targets.shape) == ((2 * NUM_CROPS, 3, 32, 32), (2 * NUM_CROPS, 3))
            want = [alone[i][key] for key in keys[2 * step : 2 * step + 2] for i in range(NUM_CROPS)]
            assert torch.equal(targets, torch.stack(want))
            assert len({image.numpy().tobytes() for image in images}) > 2  # stored boxes of small images may be equal
    assert len(batches(*loader_of(folder, "crops", one))) == len(several)


def keys_and_labels(folder, epoch):
    """Return the keys of a training epoch in order, and the label of the crop of each image, one at a time."""
    stream = rd.data.RelabelStream(rd.load_dataset(folder, "crops", split="train"), seed=0, window=8)
    stream.set_epoch(epoch)
    samples = [labels for _, labels in stream]
    crop = rd.RandomStoredCrop(32, "bicubic")
    return [labels.key for labels in samples], [crop.make_params([labels])["soft"][0] for labels in samples]


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (
            "crops",
            {"batch_size": 6},
            "batch_size=6 must be a multiple of num_crops=4 times the number of ranks, 1: it counts crops",
        ),
        ("crops", {"batch_size": 2}, "batch_size=2 must be a multiple of num_crops=4"),
        ("crops", {"batch_size": 104}, "has 24 images, fewer than its batch of 26"),
        ("maps", {"batch_size": 8}, "num_crops=4 needs stored crops, but config 'maps' has label maps"),
    ],
)
def test_numbers_of_crops_that_do_not_fit_are_refused(folder, tiny, config, values, message):
    with pytest.raises(ValueError, match=message):
        loader_of(folder, config, tiny.changed(num_crops=4, **values))


def test_train_accepts_a_number_of_crops(folder, tmp_path):
    command = [
        "train",
        str(folder),
        "--config",
        "crops",
        "--labels",
        "relabel",
        "--out",
        str(tmp_path / "run"),
        *OPTIONS,
    ]
    command += [
        "--epochs",
        "1",
        "--mix-off-epochs",
        "0",
        "--batch-size",
        "16",
        "--num-crops",
        "4",
        "--num-workers",
        "0",
        "--cutmix",
        "1",
    ]
    assert main(command) == 0
    rows = (tmp_path / "run" / "epochs.csv").read_text().splitlines()
    assert rows[1].startswith("0,6,")  # 24 images, 4 per step


@pytest.mark.parametrize("num_crops", [1, 4])
def test_a_training_run_resumes_exactly_after_every_batch(folder, tiny, num_crops):
    recipe = tiny.changed(batch_size=8 * num_crops, num_crops=num_crops, color_jitter=0.4)
    loader, transforms = loader_of(folder, "crops", recipe)
    whole, states = [], []
    loader.set_epoch(2)
    transforms.set_epoch(2)
    for batch in loader:
        whole.append(batch)
        states.append(json.dumps(loader.state_dict()))
    for step, state in enumerate(states[:-1]):
        resumed, its_transforms = loader_of(folder, "crops", recipe, num_workers=step)
        resumed.load_state_dict(json.loads(state))
        rest = batches(resumed, its_transforms, 2)
        assert len(rest) == len(whole) - step - 1
        assert all(is_equal(*pair) for pair in zip(rest, whole[step + 1 :], strict=True))


@pytest.mark.parametrize("labels", ["single", "distilled"])
def test_class_indices_need_no_stored_crop_and_have_the_crops_of_label_maps(folder, tiny, labels):
    recipe = tiny.changed(batch_size=8, labels=labels)
    ours, theirs = (batches(*loader_of(folder, config, recipe)) for config in ("crops", "maps"))
    assert all(is_equal(*pair) for pair in zip(ours, theirs, strict=True))
    assert ours[0][1].dtype == torch.int64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"labels": "global-multi"}, "labels=global-multi needs label maps, but config 'crops' has stored crops"),
        ({"labels": "localized-single"}, "labels=localized-single needs label maps"),
        ({"labels": "tokens"}, "labels=tokens needs label maps"),
        ({"calibrated": True}, "calibrated=True has no effect on config 'crops'"),
        ({"min_area": 0.25}, "min_area=0.25 has no effect on config 'crops'"),
    ],
)
def test_recipes_that_need_label_maps_are_refused(folder, tiny, values, message):
    with pytest.raises(ValueError, match=message):
        loader_of(folder, "crops", tiny.changed(batch_size=8, **values))


def test_compare_trains_students_on_crops_and_maps_in_one_table(folder, tmp_path, capsys):
    command = [
        "compare", str(folder), "--labels", "single", "relabel", "--seeds", "1", "--out", str(tmp_path / "runs"), *OPTIONS,
        "--epochs", "1", "--mix-off-epochs", "0", "--batch-size", "8", "--num-workers", "0",
    ]  # fmt: skip
    assert main(command) == 0
    table = (tmp_path / "runs" / "table.md").read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]
    assert rows == ["single", "relabel, crops", "relabel, maps"]
    printed = capsys.readouterr().out
    dataset = rd.load_dataset(folder, "crops", split="train")
    agreeing = sum(int(labels.mean_label().argmax()) == labels.label for _, labels in (dataset[i] for i in range(24)))
    assert f"| crops | {100 * agreeing / 24:.1f} |" in printed
    assert score_label_maps(dataset.label_maps)["top1"] == agreeing / 24
    ablation = copy.copy(command)
    ablation[ablation.index("relabel")] = "global-multi"
    assert main(ablation) != 0
    assert "global-multi needs label maps, but config 'crops' has stored crops" in capsys.readouterr().err
