import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import ModuleAnnotator
from relabel_datasets.labels.encodings import ENCODINGS
from relabel_datasets.shards.manifest import Manifest
from tests.conftest import ROOT, ColourNet, picture


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_label_maps_are_logits_of_the_squashed_image(tmp_path, image_folder, annotator):
    build_config = rd.annotate.BuildConfig(storage_dtype="float16", k=3)
    rd.build(
        rd.data.ImageFolderSource(image_folder), tmp_path / "data", annotator, build_config=build_config, progress=False
    )
    dataset = rd.load_dataset(tmp_path / "data", "colours", "train")
    for image, label_map in dataset:
        squashed = image.resize((64, 48), PIL.Image.Resampling.BICUBIC)
        normalised = (np.asarray(squashed, np.float32) / 255 - annotator.describe()["mean"]) / annotator.describe()[
            "std"
        ]
        dense = ColourNet()(torch.from_numpy(normalised).float().permute(2, 0, 1)[None])[0]
        torch.testing.assert_close(label_map.dense(), dense, rtol=2e-3, atol=2e-3)


def test_large_jpegs_are_decoded_at_reduced_size_but_keep_their_canvas_size(tmp_path, annotator):
    for i, size in enumerate([(800, 1000), (1000, 800)]):
        path = tmp_path / "images" / "cat" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, size).save(path, quality=95)
    source = rd.data.ImageFolderSource(tmp_path / "images")
    source.classes = None
    rd.build(
        source,
        tmp_path / "data",
        annotator,
        build_config=rd.annotate.BuildConfig(storage_dtype="float16", k=3),
        progress=False,
    )
    for image, label_map in rd.load_dataset(tmp_path / "data", split="train"):
        assert label_map.canvas_size == (image.height, image.width)
        whole = annotator(annotator.preprocess(image)[None])[0]
        torch.testing.assert_close(label_map.dense(), whole.cpu(), rtol=0, atol=0.2)


def test_two_builds_write_equal_bytes(tmp_path, image_folder, annotator):
    for name in ("one", "two"):
        rd.build(rd.data.ImageFolderSource(image_folder), tmp_path / name, annotator, shard_size=4, progress=False)
    assert files_of(tmp_path / "one" / "colours") == files_of(tmp_path / "two" / "colours")
    assert (tmp_path / "one" / "README.md").read_bytes() == (tmp_path / "two" / "README.md").read_bytes()


class Interrupted(Exception):
    pass


class StopsAfter(ColourNet):
    """The same network, which fails after n batches."""

    def __init__(self, batches):
        super().__init__()
        self.left = batches + 1  # and the batch that determines the map size

    def forward(self, images):
        self.left -= 1
        if self.left < 0:
            raise Interrupted
        return super().forward(images)


def annotator_of(module):
    return ModuleAnnotator(module, (48, 64), classes=("cat", "dog", "emu"), name="colours")


def test_an_interrupted_build_is_resumed(tmp_path, image_folder, annotator):
    def run(root, which):
        return rd.build(
            rd.data.ImageFolderSource(image_folder),
            root,
            which,
            shard_size=4,
            build_config=rd.annotate.BuildConfig(batch_size=2),
            progress=False,
        )

    run(tmp_path / "whole", annotator)
    with pytest.raises(Interrupted):
        run(tmp_path / "data", annotator_of(StopsAfter(5)))  # two shards of two batches each, and one batch
    folder = tmp_path / "data" / "colours"
    assert sorted(p.name for p in folder.glob("*.tar")) == ["train-00000-of-00004.tar", "train-00001-of-00004.tar"]
    assert not (folder / "_info.json").exists()
    with pytest.raises(FileNotFoundError, match="no dataset"):
        rd.load_dataset(tmp_path / "data", split="train")
    rest = StopsAfter(3)  # the other two shards need batches of two, two and one
    run(tmp_path / "data", annotator_of(rest))
    assert rest.left == 0
    assert files_of(folder) == files_of(tmp_path / "whole" / "colours")
    run(tmp_path / "data", annotator_of(StopsAfter(0)))  # all shards are finished


def test_sigkill_loses_only_the_current_shard(tmp_path, image_folder, annotator):
    script = f"""
import time, torch, relabel_datasets as rd
from tests.annotate.test_builder import annotator_of, ColourNet
class Stops(ColourNet):
    batches = -1  # the first batch determines the map size
    def forward(self, images):
        self.batches += 1
        if self.batches == 6:  # in the third shard
            time.sleep(1000)
        return super().forward(images)
rd.build(rd.data.ImageFolderSource({str(image_folder)!r}), {str(tmp_path / "data")!r}, annotator_of(Stops()), shard_size=4,
         build_config=rd.annotate.BuildConfig(batch_size=2), progress=False)
"""
    folder = tmp_path / "data" / "colours"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    deadline = time.monotonic() + 300
    while not (folder / ".build-train" / "train-00001-of-00004.tar.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.tar")}
    source = rd.data.ImageFolderSource(image_folder)
    for name in ("data", "whole"):
        build_config = rd.annotate.BuildConfig(batch_size=2)
        rd.build(source, tmp_path / name, annotator, shard_size=4, build_config=build_config, progress=False)
    kept = {name for name, time_ns in before.items() if (folder / name).stat().st_mtime_ns == time_ns}
    assert kept >= {"train-00000-of-00004.tar", "train-00001-of-00004.tar"}
    tars = {name: data for name, data in files_of(folder).items() if name.endswith(".tar")}
    assert tars == {k: v for k, v in files_of(tmp_path / "whole" / "colours").items() if k.endswith(".tar")}


def test_a_card_that_a_killed_build_did_not_write_is_written_by_the_next_build(
    tmp_path, image_folder, annotator, monkeypatch
):
    def killed(*args):
        raise Interrupted

    source = rd.data.ImageFolderSource(image_folder)
    with monkeypatch.context() as patch:
        patch.setattr("relabel_datasets.annotate.builder.write_output_card", killed)
        with pytest.raises(Interrupted):
            rd.build(source, tmp_path / "data", annotator, progress=False)
    rd.build(source, tmp_path / "data", annotator, progress=False)
    rd.build(source, tmp_path / "whole", annotator, progress=False)
    assert (tmp_path / "data" / "README.md").read_bytes() == (tmp_path / "whole" / "README.md").read_bytes()
    assert files_of(tmp_path / "data" / "colours") == files_of(tmp_path / "whole" / "colours")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"build_config": rd.annotate.BuildConfig(encoding="topk", batch_size=2)}, "encoding"),
        ({"build_config": rd.annotate.BuildConfig(images=False, batch_size=2)}, "images"),
        ({"shard_size": 5}, "shard_size"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_an_existing_split_is_not_mixed_with_other_label_maps(
    tmp_path, image_folder, annotator, changed, message, finished
):
    arguments = {"build_config": rd.annotate.BuildConfig(batch_size=2), "shard_size": 4, "progress": False}
    source = rd.data.ImageFolderSource(image_folder)
    if finished:
        if message == "shard_size":
            pytest.skip("a finished split is accepted with any shard size")
        rd.build(source, tmp_path, annotator, **arguments)
    else:
        with pytest.raises(Interrupted):
            rd.build(source, tmp_path, annotator_of(StopsAfter(3)), **arguments)
    with pytest.raises(rd.DatasetError, match=message):
        rd.build(source, tmp_path, annotator, **{**arguments, **changed})


def test_an_existing_config_is_not_extended_with_other_images_or_annotators(tmp_path, image_folder, annotator):
    rd.build(rd.data.ImageFolderSource(image_folder), tmp_path / "data", annotator, progress=False)
    other = ModuleAnnotator(ColourNet(), (32, 32), classes=("cat", "dog", "emu"), name="colours")
    with pytest.raises(rd.DatasetError, match="annotator"):
        rd.build(rd.data.ImageFolderSource(image_folder), tmp_path / "data", other, split="validation", progress=False)
    (image_folder / "cat" / "photo_00.jpg").unlink()
    with pytest.raises(rd.DatasetError, match="source_sha256"):
        rd.build(rd.data.ImageFolderSource(image_folder), tmp_path / "data", annotator, progress=False)


@pytest.mark.parametrize("finished", [True, False])
def test_shards_of_another_version_are_not_extended(tmp_path, image_folder, annotator, monkeypatch, finished):
    arguments = {"build_config": rd.annotate.BuildConfig(batch_size=2), "shard_size": 4, "progress": False}
    source = rd.data.ImageFolderSource(image_folder)
    if finished:
        rd.build(source, tmp_path, annotator, **arguments)
    else:
        with pytest.raises(Interrupted):
            rd.build(source, tmp_path, annotator_of(StopsAfter(3)), **arguments)
    monkeypatch.setattr("relabel_datasets.annotate.builder.__version__", "99.0")
    if finished:
        rd.build(source, tmp_path, annotator, **arguments)  # no shard is missing
        (tmp_path / "colours" / "train-00001-of-00004.tar").unlink()
    for split in ("train", "validation") if finished else ("train",):
        with pytest.raises(rd.DatasetError, match=r"another made_with: .*relabel_datasets 99\.0\" now"):
            rd.build(source, tmp_path, annotator, split=split, **arguments)


def test_a_config_that_differs_only_in_case_from_another_is_refused(tmp_path, image_folder, annotator):
    source, root = rd.data.ImageFolderSource(image_folder), tmp_path / "out"
    rd.build(source, root, annotator, config="Colours", progress=False)
    with pytest.raises(rd.DatasetError, match=r"'colours' differs only in case from the existing config 'Colours'"):
        rd.build(source, root, annotator, config="colours", progress=False)
    assert [path.name for path in root.iterdir() if path.is_dir()] == ["Colours"]


def test_splits_are_added_to_a_config(tmp_path, image_folder, annotator):
    for split in ("train", "validation"):
        manifest = rd.build(
            rd.data.ImageFolderSource(image_folder), tmp_path / "data", annotator, split=split, progress=False
        )
    assert sorted(manifest.splits) == ["train", "validation"]
    assert manifest == Manifest.load(tmp_path / "data" / "colours")
    assert sorted(rd.load_dataset(tmp_path / "data")) == ["train", "validation"]


def test_unreadable_images_are_skipped_reported_and_listed(tmp_path, image_folder, annotator, capsys, caplog):
    bad = image_folder / "dog" / "photo_04.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    (image_folder / "emu" / "photo_05.jpg").write_bytes(b"")
    manifest = rd.build(rd.data.ImageFolderSource(image_folder), tmp_path / "data", annotator, progress=False)
    split = manifest.splits["train"]
    assert split.num_samples == 11
    assert sorted(entry["key"] for entry in split.skipped) == ["photo_04", "photo_05"]
    assert str(bad) in capsys.readouterr().err
    assert "2 of 13 images skipped" in caplog.text
    assert len(rd.load_dataset(tmp_path / "data", split="train")) == 11
    joined = rd.load_dataset(tmp_path / "data", split="train", images=image_folder)  # no error for skipped images
    assert len(joined) == 11


def test_a_shard_without_readable_images_stops_the_build(tmp_path, image_folder, annotator):
    for path in image_folder.glob("*/*"):
        path.write_bytes(b"not an image")
    with pytest.raises(rd.DatasetError, match=r"no image of .* can be used \(13 images\)"):
        rd.build(rd.data.ImageFolderSource(image_folder), tmp_path / "data", annotator, progress=False)
    assert not list((tmp_path / "data" / "colours").glob("*.tar"))


def test_rotated_and_misnamed_files_are_read_correctly(tmp_path, annotator):
    folder = tmp_path / "images" / "cat"
    folder.mkdir(parents=True)
    upright = picture(0, (40, 56))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    upright.transpose(PIL.Image.Transpose.ROTATE_90).save(folder / "rotated.png", exif=exif)
    upright.save(folder / "plain.png")
    buffer = io.BytesIO()
    upright.save(buffer, "PNG")
    (folder / "misnamed.JPEG").write_bytes(buffer.getvalue())
    source = rd.data.ImageFolderSource(tmp_path / "images")
    maps = build_and_get_maps(source, tmp_path / "data", annotator)
    torch.testing.assert_close(maps["rotated"].dense(), maps["plain"].dense(), rtol=0, atol=0)
    torch.testing.assert_close(maps["misnamed"].dense(), maps["plain"].dense(), rtol=0, atol=0)
    assert maps["rotated"].canvas_size == (40, 56)


def build_and_get_maps(source, root, annotator):
    source.classes = None  # keep the three classes of the annotator
    rd.build(source, root, annotator, progress=False)
    return rd.LabelMaps(root)


def test_classes_are_matched_by_name(tmp_path, image_folder):
    renamed = ModuleAnnotator(ColourNet(), (48, 64), classes=("emu", "cat", "dog"), name="colours")
    in_order = annotator_of(ColourNet())
    source = rd.data.ImageFolderSource(image_folder)
    for name, which in (("renamed", renamed), ("in order", in_order)):
        rd.build(
            source,
            tmp_path / name,
            which,
            build_config=rd.annotate.BuildConfig(storage_dtype="float16"),
            progress=False,
        )
    maps = {name: rd.LabelMaps(tmp_path / name)["photo_00"].dense() for name in ("renamed", "in order")}
    torch.testing.assert_close(maps["renamed"], maps["in order"][[1, 2, 0]])


def test_class_indices_must_be_classes_of_the_annotator(tmp_path, image_folder):
    source = rd.data.ImageFolderSource(image_folder)
    source.classes, source.labels = None, [7] * 13
    with pytest.raises(ValueError, match="class index 7"):
        rd.build(source, tmp_path / "data", annotator_of(ColourNet()), progress=False)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_images_of_one_class_are_refused_before_any_output(tmp_path, image_folder, annotator, encoding):
    for name in ("dog", "emu"):
        shutil.rmtree(image_folder / name)
    build_config = rd.annotate.BuildConfig(encoding=encoding)
    source = rd.data.ImageFolderSource(image_folder)
    with pytest.raises(ValueError, match=r"one class, 'cat'.*--all-classes"):
        rd.build(source, tmp_path / "data", annotator, build_config=build_config, progress=False)
    assert not (tmp_path / "data").exists()


def test_the_manifest_records_annotator_and_encoding(tmp_path, image_folder, annotator):
    rd.build(rd.data.ImageFolderSource(image_folder), tmp_path / "data", annotator, shard_size=5, progress=False)
    content = json.loads((tmp_path / "data" / "colours" / "_info.json").read_text())
    assert content["annotator"] == annotator.describe()
    assert content["encoding"] == {"name": "heatmaps", "k": 10, "dtype": "uint4", "map_size": [6, 8]}
    assert content["splits"]["train"]["shard_lengths"] == [5, 5, 3]
    assert content["classes"] == ["cat", "dog", "emu"]


def test_a_hand_written_card_keeps_its_text(tmp_path, image_folder, annotator):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "README.md").write_text("---\nlicense: mit\n---\n\n# My own words\n")
    rd.build(rd.data.ImageFolderSource(image_folder), tmp_path / "data", annotator, progress=False)
    text = (tmp_path / "data" / "README.md").read_text()
    assert "# My own words" in text
    assert "license: mit" in text
    assert "config_name: colours" in text


def test_our_shards_and_hugging_face_datasets_are_valid_sources(tmp_path, image_folder, annotator):
    rd.build(rd.data.ImageFolderSource(image_folder), tmp_path / "folder", annotator, progress=False)
    reference = rd.LabelMaps(tmp_path / "folder")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(image_folder), cache_dir=str(tmp_path / "cache"))[
        "train"
    ]
    for name, source in (
        ("tars", rd.data.open_source(tmp_path / "folder" / "colours")),
        ("hf", rd.data.HFSource(loaded)),
    ):
        rd.build(source, tmp_path / name, annotator, progress=False)
        label_maps = rd.LabelMaps(tmp_path / name)
        assert sorted(label_maps) == sorted(reference)
        for key, label_map in label_maps.items():
            assert label_map.label == reference[key].label
            torch.testing.assert_close(label_map.dense(), reference[key].dense(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"build_config": rd.annotate.BuildConfig(encoding="dense")}, r"encoding must be one of .*got 'dense'"),
        ({"build_config": rd.annotate.BuildConfig(storage_dtype="int8")}, r"dtype must be one of .*got 'int8'"),
        (
            {"build_config": rd.annotate.BuildConfig(encoding="topk", storage_dtype="uint4")},
            "for topk maps, got 'uint4'",
        ),
        ({"build_config": rd.annotate.BuildConfig(k=0)}, "k must be at least 1"),
        ({"build_config": rd.annotate.BuildConfig(batch_size=0)}, "batch_size must be at least 1"),
        ({"shard_size": 0}, "shard_size must be at least 1"),
        ({"card": "no-such-card"}, "no-such-card"),
    ],
)
def test_invalid_settings_are_refused_before_any_work(tmp_path, image_folder, annotator, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        rd.build(rd.data.ImageFolderSource(image_folder), tmp_path / "data", annotator, progress=False, **arguments)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("out", [".", "data", "cat/data", "../images"])
def test_a_dataset_in_the_image_folder_is_refused(image_folder, annotator, out):
    with pytest.raises(ValueError, match=r"is in the image folder .*: choose a folder outside of it"):
        rd.build(rd.data.ImageFolderSource(image_folder), image_folder / out, annotator)
    assert sorted(path.name for path in image_folder.iterdir()) == ["cat", "dog", "emu"]


def test_all_classes_keeps_all_classes_of_the_annotator(tmp_path, image_folder):
    wide = ModuleAnnotator(
        torch.nn.Sequential(ColourNet(), torch.nn.Conv2d(3, 5, 1)), (48, 64), classes=("ape", "emu", "cow", "cat", "dog"),
        name="wide",
    )  # fmt: skip
    source = rd.data.ImageFolderSource(image_folder)
    build_config = rd.annotate.BuildConfig(storage_dtype="float16")
    manifest = rd.build(source, tmp_path, wide, build_config=build_config, all_classes=True, progress=False)
    assert manifest.classes == ["ape", "emu", "cow", "cat", "dog"]
    dataset = rd.load_dataset(tmp_path, split="train")
    narrow = rd.build(source, tmp_path, wide, build_config=build_config, config="narrow", progress=False)
    assert narrow.classes == ["cat", "dog", "emu"]
    of_dataset = rd.LabelMaps(tmp_path, "narrow")
    for key, (_, label_map), target in zip(dataset.keys, dataset, dataset.targets, strict=True):
        path = next(image_folder.glob(f"*/{key}.jpg"))
        assert dataset.classes[target] == path.parent.name  # class of the image
        assert label_map.label == target
        torch.testing.assert_close(label_map.dense()[[3, 4, 1]], of_dataset[key].dense(), rtol=2e-3, atol=2e-3)


def test_all_classes_requires_every_class_of_the_source(tmp_path, image_folder):
    other = ModuleAnnotator(ColourNet(), (48, 64), classes=("cat", "dog", "cow"), name="other")
    with pytest.raises(ValueError, match="'emu' is none of them"):
        rd.build(rd.data.ImageFolderSource(image_folder), tmp_path, other, all_classes=True, progress=False)
    mapping = {"emu": "cow"}
    manifest = rd.build(
        rd.data.ImageFolderSource(image_folder),
        tmp_path,
        other,
        all_classes=True,
        class_mapping=mapping,
        progress=False,
    )
    assert manifest.classes == ["cat", "dog", "cow"]
    assert set(rd.load_dataset(tmp_path, split="train").targets) == {0, 1, 2}


def test_mapped_classes_without_names_have_the_names_of_the_dataset(tmp_path, image_folder):
    nameless = ModuleAnnotator(torch.nn.Sequential(ColourNet(), torch.nn.Conv2d(3, 5, 1)), (48, 64), name="nameless")
    mapping = {"cat": 4, "dog": 0, "emu": 2}
    manifest = rd.build(
        rd.data.ImageFolderSource(image_folder),
        tmp_path,
        nameless,
        all_classes=True,
        class_mapping=mapping,
        progress=False,
    )
    assert manifest.classes == ["dog", "1", "emu", "3", "cat"]


def test_a_later_split_keeps_the_template_of_the_card(tmp_path, image_folder, annotator, caplog):
    source = rd.data.ImageFolderSource(image_folder)
    card = tmp_path / "data" / "README.md"
    rd.build(source, tmp_path / "data", annotator, card="imagenette-relabel", progress=False)
    rd.build(source, tmp_path / "data", annotator, split="validation", progress=False)
    assert "# imagenette-relabel: Imagenette with label maps" in card.read_text()
    assert "| validation | 13 |" in card.read_text()
    template = tmp_path / "mine.md"
    template.write_text("---\nlicense: mit\n{{ card_data }}\n---\n{{ mark }}\n# Mine\n")
    rd.build(source, tmp_path / "data", annotator, split="test", card=template, progress=False)
    assert "# Mine" in card.read_text()
    assert str(tmp_path) not in card.read_text()  # local paths are not published
    rd.build(source, tmp_path / "data", annotator, split="more", progress=False)
    assert "# Mine" in card.read_text()
    assert "split: more" in card.read_text()
    assert "mine.md" in caplog.text


def test_a_factory_creates_the_annotator_after_the_checks(tmp_path, image_folder, annotator):
    made = []

    def make():
        made.append(1)
        return annotator

    source = rd.data.ImageFolderSource(image_folder)
    with pytest.raises(FileNotFoundError, match="no-such"):
        rd.build(source, tmp_path / "data", make, card="no-such", progress=False)
    assert not made
    rd.build(source, tmp_path / "data", make, progress=False)
    assert made == [1]
    rd.build(source, tmp_path / "whole", annotator, progress=False)
    assert files_of(tmp_path / "data" / "colours") == files_of(tmp_path / "whole" / "colours")


def test_a_last_shard_of_one_bad_image_is_empty(tmp_path, image_folder, annotator):
    source = rd.data.ImageFolderSource(image_folder)
    last = int(np.random.default_rng(0).permutation(13)[-1])
    bad = next(image_folder.glob(f"*/{source.keys[last]}.jpg"))
    bad.write_bytes(b"")
    manifest = rd.build(source, tmp_path / "data", annotator, shard_size=4, progress=False)
    assert manifest.splits["train"].shard_lengths == [4, 4, 4, 0]
    assert len(rd.load_dataset(tmp_path / "data", split="train")) == 12


@pytest.mark.parametrize("names", [("0", "1", "2"), ("0", "1", "10")])
def test_the_rows_of_an_annotator_without_names_are_logged(names, tmp_path, caplog):
    for i, name in enumerate(names):
        path = tmp_path / "images" / name / f"k{i}.jpg"
        path.parent.mkdir(parents=True)
        picture(i).save(path)
    source = rd.data.ImageFolderSource(tmp_path / "images")
    nameless = ModuleAnnotator(ColourNet(), (48, 64), name="nameless")
    rd.build(source, tmp_path / "data", nameless, progress=False)
    pairs = ", ".join(f"{i} = {name!r}" for i, name in enumerate(names))
    assert (
        f"the classes of the annotator have no names; its rows are taken as the classes of the dataset in order: {pairs}"
        in caplog.text
    )


def test_an_ambiguous_order_of_classes_is_refused_before_any_output(tmp_path):
    for i, name in enumerate(("1", "10", "2")):
        path = tmp_path / "images" / name / f"k{i}.jpg"
        path.parent.mkdir(parents=True)
        picture(i).save(path)
    source = rd.data.ImageFolderSource(tmp_path / "images")
    nameless = ModuleAnnotator(ColourNet(), (48, 64), name="nameless")
    with pytest.raises(ValueError, match=r"row 1 of the annotator is '10' if .* but '2' with timm's"):
        rd.build(source, tmp_path / "data", nameless, progress=False)
    assert not list(tmp_path.glob("data/**/*"))
    mapping = {"1": 0, "2": 1, "10": 2}
    manifest = rd.build(source, tmp_path / "data", nameless, class_mapping=mapping, progress=False)
    assert manifest.classes == ["1", "10", "2"]
