"""Label-only shards of every source are joined with images of every type."""

import io
import logging
import pickle
import tarfile
from functools import partial

import datasets
import numpy as np
import pytest
import torch
import webdataset
from torch.utils.data import DataLoader

import relabel_datasets as rd
from relabel_datasets.shards import index as index_module
from relabel_datasets.shards.manifest import Split
from tests.conftest import ColourNet, picture

# webdataset leaves its tars to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

CLASSES = ("cat", "dog", "emu")
NUM_IMAGES = 11
STEMS = [f"n01_{i:02d}" for i in range(NUM_IMAGES)]
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})


def png(i):
    buffer = io.BytesIO()
    picture(i, (24, 32)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, samples):
    """Write (key, class index, image) in the layout of timm/imagenet-1k-wds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, label, image in samples:
            for field, data in (("cls", b"%d" % label), ("png", image), ("json", b"{}")):
                member = tarfile.TarInfo(f"{key}.{field}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def hugging_face(names, **columns):
    images = [{"bytes": png(i), "path": name} for i, name in enumerate(names)]
    rows = {"image": images, "label": [i % 3 for i in range(len(names))], **columns}
    return datasets.Dataset.from_dict(rows, features=FEATURES)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same images in every supported form. `split/` is named like the split."""
    root = tmp_path_factory.mktemp("images")
    for i, stem in enumerate(STEMS):
        path = root / "folder" / "train" / CLASSES[i % 3] / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    for kind, prefix in (("tars", ""), ("prefixed", "train/")):
        samples = [(prefix + stem, i % 3, png(i)) for i, stem in enumerate(STEMS)]
        write_tar(root / kind / "s-0.tar", samples[:6])
        write_tar(root / kind / "s-1.tar", samples[6:])
    named = hugging_face([f"{stem}.png" for stem in STEMS])
    named.save_to_disk(root / "saved")
    datasets.DatasetDict({"train": named}).save_to_disk(root / "saved-splits")
    return root


def in_place(kind, root):
    """Return a value of `images=`."""
    match kind:
        case "folder" | "tars" | "prefixed" | "saved" | "saved-splits":
            return root / kind
        case "folder of the split":
            return str(root / "folder" / "train")
        case "glob":
            return f"{root}/tars/s-*.tar"
        case "ImageFolderSource":
            return rd.data.ImageFolderSource(root / "folder" / "train")
        case "WebDatasetSource":
            return rd.data.WebDatasetSource(sorted((root / "tars").iterdir(), reverse=True))
        case "HFSource" | "Dataset":
            dataset = hugging_face([f"{stem}.png" for stem in STEMS])
            return dataset if kind == "Dataset" else rd.data.HFSource(dataset)
        case "shuffled Dataset":
            return hugging_face([f"{stem}.png" for stem in STEMS]).shuffle(seed=0)
        case "DatasetDict":
            return datasets.DatasetDict({"train": in_place("Dataset", root)})
        case "Dataset of files":
            files = [str(root / "folder" / "train" / CLASSES[i % 3] / f"{stem}.png") for i, stem in enumerate(STEMS)]
            return datasets.Dataset.from_dict({"picture": files}).cast_column("picture", datasets.Image())
        case "Dataset without names":
            return hugging_face([None] * NUM_IMAGES)
        case "elsewhere":
            return {f"other_{i:02d}": png(i) for i in range(NUM_IMAGES)}
        case "mapping":
            return {stem: png(i) for i, stem in enumerate(STEMS)}
    raise AssertionError(kind)


BY_STEM = ["folder", "folder of the split", "tars", "glob", "saved", "saved-splits", "ImageFolderSource",
           "WebDatasetSource", "HFSource", "Dataset", "shuffled Dataset", "DatasetDict", "Dataset of files",
           "mapping"]  # fmt: skip


@pytest.fixture(scope="module")
def label_only(tmp_path_factory, places):
    """A folder with a label-only config of each kind of source, in 3 shards."""
    root = tmp_path_factory.mktemp("label-only")
    annotator = rd.ModuleAnnotator(ColourNet(), (24, 32), classes=CLASSES, name="colours")
    for kind in ("ImageFolderSource", "tars", "prefixed", "HFSource", "Dataset without names"):
        source = in_place(kind, places)
        source = rd.data.HFSource(source) if isinstance(source, datasets.Dataset) else source
        source = rd.data.open_source(source) if not hasattr(source, "keys") else source
        build_config = rd.annotate.BuildConfig(images=False)
        rd.build(
            source,
            root,
            annotator,
            config=kind.replace(" ", "-"),
            build_config=build_config,
            shard_size=4,
            progress=False,
        )
    return root


def number_of(key):
    """Return the number of the picture of a key."""
    return int(key.rpartition("_")[2])


def assert_images_are_those_of_the_keys(dataset, number=number_of):
    for i, key in enumerate(dataset.keys):
        assert dataset.label_maps[key].label == dataset.targets[i] == number(key) % 3
        assert dataset.image(i).tobytes() == picture(number(key), (24, 32)).tobytes()
        image, label_map = dataset[i]
        assert (image.tobytes(), label_map.key) == (dataset.image(i).tobytes(), key)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        *[("ImageFolderSource", kind) for kind in [*BY_STEM, "prefixed"]],
        *[("HFSource", kind) for kind in [*BY_STEM, "prefixed"]],
        *[("tars", kind) for kind in BY_STEM],
        *[("prefixed", kind) for kind in [*BY_STEM, "prefixed"]],
    ],
)
def test_images_of_every_type_are_joined_by_key(label_only, places, config, kind):
    dataset = rd.RelabelDataset(label_only, config, images=in_place(kind, places))
    assert sorted(map(number_of, dataset.keys)) == list(range(NUM_IMAGES))
    assert dataset.unmatched == (0, 0)
    assert_images_are_those_of_the_keys(dataset)


def test_a_dataset_without_file_names_is_joined_with_itself_by_row_number(label_only, places):
    images = in_place("Dataset without names", places)
    for same in (images, rd.data.HFSource(images), images.remove_columns("label")):
        dataset = rd.RelabelDataset(label_only, "Dataset-without-names", images=same)
        assert sorted(dataset.keys) == [f"{i:08d}" for i in range(NUM_IMAGES)]
        assert_images_are_those_of_the_keys(dataset, int)
    with pytest.raises(rd.DatasetError, match=r"row numbers, and .* images have another class"):
        rd.RelabelDataset(label_only, "Dataset-without-names", images=images.shuffle(seed=0))


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ("tars", "elsewhere", r"11 label maps have no image, .*; 11 images have no label map, .*No key is in both: the "
         r"label maps' keys are those of WebDataset tars.*the keys of the images are such as 'other_00'"),
        ("Dataset-without-names", "tars", "row numbers of a Hugging Face dataset without file names"),
        ("ImageFolderSource", "Dataset without names", r"names of image files .*; the keys of the images are such as '00000000'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("unmatched", ["error", "skip"])
def test_keys_that_cannot_match_are_explained(label_only, places, config, kind, message, unmatched):
    with pytest.raises(rd.DatasetError, match=message):
        rd.RelabelDataset(label_only, config, images=in_place(kind, places), unmatched=unmatched)


def test_keys_that_are_paths_match_tars_with_the_same_paths(tmp_path):
    """Stems repeat, and dots of folders are escaped in our keys but not in those of tars."""
    for i in range(6):
        path = tmp_path / "images" / f"{i // 2}.class" / f"{i % 2}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    annotator = rd.ModuleAnnotator(ColourNet(), (24, 32), classes=("0.class", "1.class", "2.class"), name="colours")
    build_config = rd.annotate.BuildConfig(images=False)
    rd.build(
        rd.data.ImageFolderSource(tmp_path / "images"),
        tmp_path / "data",
        annotator,
        build_config=build_config,
        progress=False,
    )
    write_tar(tmp_path / "s.tar", [(f"{i // 2}.class/{i % 2}", 0, png(i)) for i in range(6)])
    for images in (tmp_path / "images", tmp_path / "s.tar"):
        dataset = rd.RelabelDataset(tmp_path / "data", images=images)
        assert "0%2Eclass/1" in dataset.keys
        for i, key in enumerate(dataset.keys):
            picture_number = 2 * int(key[0]) + int(key[-1])
            assert dataset.image(i).tobytes() == picture(picture_number, (24, 32)).tobytes()


@pytest.fixture
def other_images(tmp_path):
    """Tars without four of the images, two of them a whole shard's, and with two others."""
    keep = [i for i in range(NUM_IMAGES) if i not in (0, 3, 5, 6)]
    write_tar(tmp_path / "others" / "s.tar", [(f"n01_{i:02d}", i % 3, png(i)) for i in [*keep, 77, 78]])
    return tmp_path / "others"


COUNTS = r"4 label maps have no image, such as .*'n01_0\d', .*; 2 images have no label map, such as 'n01_77', 'n01_78'"


def test_samples_without_a_counterpart_are_an_error_with_counts_and_examples(label_only, other_images):
    with pytest.raises(rd.DatasetError, match=COUNTS + r"\. .*unmatched='skip'"):
        rd.RelabelDataset(label_only, "ImageFolderSource", images=other_images)


@pytest.mark.parametrize("unmatched", ["ignore", None, True])
def test_an_unknown_value_of_unmatched_is_rejected_first(label_only, unmatched):
    with pytest.raises(ValueError, match=r"unmatched must be one of \('error', 'skip'\)"):
        rd.RelabelDataset("nowhere", images="nowhere", unmatched=unmatched)
    with pytest.raises(ValueError, match="unmatched must be one of"):
        rd.data.join([], rd.LabelMaps(label_only, "tars"), unmatched=unmatched)


@pytest.mark.parametrize("config", ["ImageFolderSource", "tars"])
def test_samples_without_a_counterpart_are_left_out_and_counted(label_only, other_images, config, caplog):
    everything = rd.LabelMaps(label_only, config)
    with caplog.at_level(logging.WARNING):
        dataset = rd.RelabelDataset(label_only, config, images=other_images, unmatched="skip")
    kept = [key for key in everything if number_of(key) not in (0, 3, 5, 6)]
    assert list(dataset.keys) == kept
    assert len(dataset) == len(dataset.targets) == len(kept) == 7
    assert dataset.keys[-1] == kept[-1]
    assert dataset.keys[1:3] == kept[1:3]
    assert_images_are_those_of_the_keys(dataset)
    assert dataset[-1][1].key == kept[-1]
    with pytest.raises(IndexError):
        dataset[7]
    assert (dataset.unmatched.missing, dataset.unmatched.extra) == dataset.unmatched == (4, 2)
    assert "Left out: 4 label maps without an image, 2 images without a label map" in repr(dataset)
    (record,) = [record for record in caplog.records if record.name.startswith("relabel_datasets")]
    assert record.levelno == logging.WARNING
    assert "4 label maps have no image, such as" in record.message


def test_shard_lengths_count_the_remaining_samples(label_only, other_images):
    dataset = rd.RelabelDataset(label_only, "ImageFolderSource", images=other_images, unmatched="skip")
    keys, shards, start = list(rd.LabelMaps(label_only, "ImageFolderSource")), [], 0
    for length in dataset.label_maps.split.shard_lengths:
        shards.append([key for key in keys[start : start + length] if key in set(dataset.keys)])
        start += length
    assert list(dataset.shard_lengths) == [len(shard) for shard in shards]
    assert sum(dataset.shard_lengths) == len(dataset)
    sampler = rd.RelabelSampler(dataset.shard_lengths, seed=1)
    assert sorted(sampler) == list(range(len(dataset)))
    stream = rd.RelabelStream(dataset, seed=1)
    assert sorted(label_map.key for _, label_map in stream) == sorted(dataset.keys)


def test_a_shard_without_remaining_samples_is_harmless(label_only):
    label_maps = rd.LabelMaps(label_only, "tars")
    first, *_, last = label_maps.split.shard_lengths
    keys = list(label_maps)
    images = {key: png(number_of(key)) for key in keys[first:-last]}
    dataset = rd.RelabelDataset(label_only, "tars", images=images, unmatched="skip")
    assert list(dataset.shard_lengths) == [0, *label_maps.split.shard_lengths[1:-1], 0]
    assert sorted(label_map.key for _, label_map in rd.RelabelStream(dataset)) == sorted(images)
    assert_images_are_those_of_the_keys(dataset)


def test_extra_images_do_not_remove_label_maps(label_only, places, tmp_path):
    write_tar(tmp_path / "more.tar", [("n01_50", 0, png(50))])
    tars = [*sorted((places / "tars").iterdir()), tmp_path / "more.tar"]
    dataset = rd.RelabelDataset(label_only, "tars", images=rd.data.WebDatasetSource(tars), unmatched="skip")
    assert dataset.unmatched == (0, 1)
    assert len(dataset) == sum(dataset.shard_lengths) == NUM_IMAGES
    assert_images_are_those_of_the_keys(dataset)


def test_images_that_the_builder_skipped_are_not_extra(tmp_path):
    samples = [(stem, i % 3, b"broken" if i == 4 else png(i)) for i, stem in enumerate(STEMS)]
    write_tar(tmp_path / "s.tar", samples)
    for stem, label, data in samples:
        path = tmp_path / "images" / CLASSES[label] / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    annotator = rd.ModuleAnnotator(ColourNet(), (24, 32), classes=CLASSES, name="colours")
    source, build_config = rd.data.ImageFolderSource(tmp_path / "images"), rd.annotate.BuildConfig(images=False)
    rd.build(source, tmp_path / "data", annotator, build_config=build_config, progress=False)
    for images in (tmp_path / "images", tmp_path / "s.tar"):
        dataset = rd.RelabelDataset(tmp_path / "data", images=images)
        assert (len(dataset), dataset.unmatched) == (NUM_IMAGES - 1, (0, 0))
    pipeline = webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False)
    joined = list(rd.data.join(pipeline, dataset.label_maps, complete=True))
    assert sorted(sample["__key__"] for sample in joined) == sorted(dataset.keys)


@pytest.mark.parametrize("unmatched", ["error", "skip"])
def test_several_images_for_one_label_map_are_refused(label_only, tmp_path, unmatched):
    samples = [(f"{folder}/n01_{i:02d}", 0, png(i)) for folder in ("train", "val") for i in range(NUM_IMAGES)]
    write_tar(tmp_path / "s.tar", samples)
    message = r"11 label maps, such as 'train/n01_\d\d', 'val/n01_\d\d' for 'n01_\d\d'"
    with pytest.raises(rd.DatasetError, match=message):
        rd.RelabelDataset(label_only, "ImageFolderSource", images=tmp_path / "s.tar", unmatched=unmatched)


@pytest.mark.parametrize("images", [["a.tar"], 3, hugging_face(["a.png"]).to_iterable_dataset()])
def test_objects_without_images_and_keys_are_rejected(label_only, images):
    with pytest.raises(TypeError, match=rf"images must be a path, .*got {type(images).__name__}.*join\(\)"):
        rd.RelabelDataset(label_only, "tars", images=images)


def key_and_pixels(image, label_map):
    return label_map.key, torch.from_numpy(np.array(image)), rd.LabelPooling()(label_map)


@pytest.mark.parametrize("kind", ["tars", "Dataset", "saved", "folder", "mapping"])
def test_dataloader_workers_read_joined_samples(label_only, places, kind):
    images = in_place(kind, places)
    dataset = rd.RelabelDataset(label_only, "ImageFolderSource", images=images, transforms=key_and_pixels)
    loader = DataLoader(dataset, 3, num_workers=2, multiprocessing_context="fork", shuffle=True)
    seen = {key: (pixels, label) for batch in loader for key, pixels, label in zip(*batch, strict=True)}
    assert len(seen) == NUM_IMAGES
    for key, pixels, label in pickle.loads(pickle.dumps(dataset)):  # which spawned workers would get
        assert seen[key][0].equal(pixels)
        assert seen[key][1].equal(label)


def test_dataloader_workers_read_the_remaining_samples(label_only, other_images):
    dataset = rd.RelabelDataset(label_only, "tars", images=other_images, unmatched="skip", transforms=key_and_pixels)
    loader = DataLoader(dataset, 2, num_workers=2, multiprocessing_context="fork")
    assert [key for keys, *_ in loader for key in keys] == list(dataset.keys)


def test_keys_with_the_same_hash_are_distinguished(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "hash_key", lambda key: number_of(key) % 3)
    path = tmp_path / "index"
    path.write_bytes(index_module.make_index([index_module.Row(stem, 0, 0, 0) for stem in STEMS], images=False))
    split = Split("train", NUM_IMAGES, [], [], [], [], [], path.name, path.stat().st_size, "", None, None, "")
    index = index_module.Index(rd.storage.open_folder(tmp_path), split, 1)
    keys = [*reversed(STEMS), "n01_11", "other_1"]
    assert index.rows(keys).tolist() == [*reversed(range(NUM_IMAGES)), -1, -1]


# Streams


def tar_samples(root, library):
    """Return the samples of the tars in a folder, as a library streams them."""
    tars = sorted(str(path) for path in root.iterdir())
    if library == "webdataset":
        return webdataset.WebDataset(tars, shardshuffle=False)
    return datasets.load_dataset("webdataset", data_files={"train": tars}, split="train", streaming=True)


@pytest.mark.parametrize("library", ["webdataset", "datasets"])
@pytest.mark.parametrize(
    ("config", "kind"),
    [("tars", "tars"), ("ImageFolderSource", "tars"), ("HFSource", "prefixed"), ("prefixed", "prefixed")],
)
def test_streamed_samples_get_their_label_maps(label_only, places, config, kind, library):
    label_maps = rd.LabelMaps(label_only, config)
    samples = list(tar_samples(places / kind, library))
    joined = list(rd.data.join(samples, label_maps, complete=True))
    assert len(joined) == NUM_IMAGES
    for sample, given in zip(joined, samples, strict=True):
        assert "label_map" not in given
        assert {**sample, "label_map": None} == {**given, "label_map": None}
        assert number_of(sample["label_map"].key) == number_of(given["__key__"])
        expected = label_maps[sample["label_map"].key]
        torch.testing.assert_close(sample["label_map"].dense(), expected.dense(), rtol=0, atol=0)


def test_join_is_lazy_and_a_stage_of_a_pipeline(label_only, places):
    label_maps = rd.LabelMaps(label_only, "tars")
    stage = partial(rd.data.join, label_maps=label_maps)
    pipeline = tar_samples(places / "tars", "webdataset").compose(stage).to_tuple("png", "label_map")
    for i, (image, label_map) in enumerate(pipeline):
        assert (image, label_map.key) == (png(i), STEMS[i])
    endless = ({"__key__": STEMS[i % NUM_IMAGES]} for i in iter(int, 1))
    assert next(rd.data.join(endless, label_maps))["label_map"].key == STEMS[0]


def test_the_field_with_the_key_may_have_any_name_and_hold_a_path(label_only):
    label_maps = rd.LabelMaps(label_only, "ImageFolderSource")
    (sample,) = rd.data.join([{"file": "train/n01/n01_03.JPEG"}], label_maps, key="file")
    assert sample["label_map"].key == "n01_03"
    with pytest.raises(
        rd.DatasetError, match=r"no key in '__key__', only the fields \['file'\]: pass the name of the field as key="
    ):
        list(rd.data.join([{"file": "n01_03"}], label_maps))


def test_a_sample_without_a_label_map_is_an_error_that_counts_the_samples_before_it(label_only, other_images):
    label_maps = rd.LabelMaps(label_only, "tars")
    joined = rd.data.join(tar_samples(other_images, "webdataset"), label_maps)
    assert [next(joined)["__key__"] for _ in range(7)]
    with pytest.raises(rd.DatasetError, match=r"no label map of 'n01_77' among the 11 .*; 7 samples before.*'skip'"):
        next(joined)


@pytest.mark.parametrize("closed", [False, True])
def test_samples_without_a_label_map_are_left_out_and_counted_once(label_only, other_images, caplog, closed):
    label_maps = rd.LabelMaps(label_only, "tars")
    samples = [*tar_samples(other_images, "webdataset"), {"__key__": STEMS[0]}]
    joined = rd.data.join(samples, label_maps, unmatched="skip")
    assert len([next(joined) for _ in range(8)]) == 8
    assert not caplog.records
    joined.close() if closed else list(joined)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message == "2 samples without a label map left out, such as 'n01_77', 'n01_78'; 8 had one"


@pytest.mark.parametrize("unmatched", ["error", "skip"])
@pytest.mark.parametrize("complete", [False, True])
def test_with_complete_every_label_map_must_occur_once(label_only, complete, unmatched):
    def joined(keys):
        samples = [{"__key__": key} for key in keys]
        label_maps = rd.LabelMaps(label_only, "ImageFolderSource")
        return [
            sample["label_map"].key
            for sample in rd.data.join(samples, label_maps, complete=complete, unmatched=unmatched)
        ]

    assert joined(STEMS) == STEMS
    if not complete:
        assert joined([*STEMS[:2], STEMS[0]]) == [*STEMS[:2], STEMS[0]]
        return
    with pytest.raises(
        rd.DatasetError, match=r"4 of 11 label maps had no sample, such as 'n01_\d\d', 'n01_\d\d', 'n01_\d\d':"
    ):
        joined(STEMS[4:])
    with pytest.raises(rd.DatasetError, match="key 'val/n01_00' is repeated"):
        joined(["n01_00", "val/n01_00"])
