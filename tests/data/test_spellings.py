"""Label maps and images whose names differ as in real distributions are joined by a safe spelling or cause a clear error."""

import io
import logging
import tarfile
import unicodedata

import datasets
import pytest
import webdataset

import relabel_datasets as rd
from relabel_datasets.analysis.metrics import real_labels
from tests.conftest import ColourNet, picture

# webdataset leaves its tars to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
SYNSETS = ("n01440764", "n01443537", "n01484850")
COUNT = 6


def synset(i):
    return SYNSETS[i % 3]


def nfd(text):
    return unicodedata.normalize("NFD", text)


NAMES = {  # how image i is called, with its path
    "folder": lambda i: f"{synset(i)}/{synset(i)}_{i}.JPEG",
    "hub": lambda i: f"{synset(i)}_{i}_{synset(i)}.JPEG",
    "hub in folders": lambda i: f"{synset(i)}/{synset(i)}_{i}_{synset(i)}.JPEG",
    "val": lambda i: f"{synset(i)}/ILSVRC2012_val_{i:08d}.JPEG",
    "val flat": lambda i: f"ILSVRC2012_val_{i:08d}.JPEG",
    "hub val": lambda i: f"ILSVRC2012_val_{i:08d}_{synset(i)}.JPEG",
    "kaggle": lambda i: f"ILSVRC/Data/CLS-LOC/train/{synset(i)}/{synset(i)}_{i}.JPEG",
    "kaggle val": lambda i: f"ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_{i:08d}.JPEG",
    "train": lambda i: f"train/{synset(i)}/{synset(i)}_{i}.JPEG",
    "upper": lambda i: f"{synset(i)}/{synset(i).upper()}_{i}.JPG",
    "extension in the name": lambda i: f"{synset(i)}/{synset(i)}_{i}.JPEG.png",
    "numbers": lambda i: f"{synset(i)}/{i // 3}.JPEG",  # unique only with their folders
    "numbers in train": lambda i: f"data/train/{synset(i)}/{i // 3}.JPEG",
    "composed": lambda i: f"{synset(i)}/größe_é_{i}.jpg",
    "decomposed": lambda i: nfd(f"{synset(i)}/größe_é_{i}.jpg"),
    "hangul": lambda i: f"{synset(i)}/사과_{i}.jpg",
    "hangul decomposed": lambda i: nfd(f"{synset(i)}/사과_{i}.jpg"),
    "others": lambda i: f"{synset(i)}/another_{i}.JPEG",
}


def png(i):
    buffer = io.BytesIO()
    picture(i, (24, 32)).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(root, names):
    for i in range(COUNT):
        path = root / NAMES[names](i)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    return root


def write_tar(path, names):
    with tarfile.open(path, "w") as tar:
        for i in range(COUNT):
            member = tarfile.TarInfo(NAMES[names](i))
            member.size = len(png(i))
            tar.addfile(member, io.BytesIO(png(i)))
    return path


def hugging_face(names):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(SYNSETS))})
    paths = [None if names is None else NAMES[names](i) for i in range(COUNT)]
    images = [{"bytes": png(i), "path": path} for i, path in enumerate(paths)]
    return datasets.Dataset.from_dict({"image": images, "label": [i % 3 for i in range(COUNT)]}, features=features)


@pytest.fixture(scope="module")
def label_only(tmp_path_factory):
    """Return a function that builds label maps of images with given names, without images, once per set of names."""
    built = {}

    def build(names):
        if names not in built:
            root = tmp_path_factory.mktemp("label-only")
            if names is None:
                source = rd.data.HFSource(hugging_face(None))
            elif names.startswith("hub") and "folders" not in names:
                source = rd.data.HFSource(hugging_face(names))
            else:
                source = rd.data.ImageFolderSource(write_folder(root / "images", names))
            annotator = rd.ModuleAnnotator(ColourNet(), (24, 32), classes=SYNSETS, name="colours")
            build_config = rd.annotate.BuildConfig(images=False)
            rd.build(source, root / "data", annotator, build_config=build_config, shard_size=4, progress=False)
            built[names] = root / "data"
        return built[names]

    return build


def images_as(kind, names, folder):
    """Return a value of `images=`."""
    match kind:
        case "folder":
            return write_folder(folder / "images", names)
        case "tar":
            return write_tar(folder / "images.tar", names)
        case "hf":
            return hugging_face(names)
        case "mapping":
            return {NAMES[names](i): png(i) for i in range(COUNT)}
    raise AssertionError(kind)


JOINED = [  # names of the label maps, kind and names of the images, what is compared; None: keys are the same
    ("folder", "folder", "folder", None),
    ("folder", "hf", "hub", "without class suffix"),
    ("folder", "tar", "hub", "without class suffix"),
    ("folder", "folder", "hub in folders", "without class suffix"),
    ("folder", "mapping", "hub", "without class suffix"),
    ("hub", "folder", "folder", "without class suffix"),
    ("hub", "tar", "kaggle", "without class suffix"),
    ("hub", "folder", "kaggle", "without class suffix"),
    ("hub in folders", "folder", "folder", "without class suffix"),
    ("val", "hf", "hub val", "without class suffix"),
    ("val", "folder", "val flat", None),
    ("val", "folder", "kaggle val", None),
    ("hub val", "folder", "val flat", "without class suffix"),
    ("hub val", "folder", "kaggle val", "without class suffix"),
    ("folder", "folder", "kaggle", None),
    ("folder", "tar", "kaggle", None),
    ("folder", "folder", "train", None),
    ("folder", "tar", "train", None),
    ("folder", "mapping", "train", None),
    ("folder", "folder", "upper", "lower case"),
    ("upper", "tar", "folder", "lower case"),
    ("folder", "folder", "extension in the name", "without extension"),
    ("extension in the name", "folder", "folder", "without extension"),
    ("folder", "mapping", "extension in the name", "without folders"),
    ("numbers", "folder", "numbers", None),
    ("numbers", "tar", "numbers in train", "last two parts"),
    ("composed", "folder", "composed", None),
    ("composed", "folder", "decomposed", "Unicode form"),
    ("decomposed", "folder", "composed", "Unicode form"),
    ("composed", "tar", "decomposed", "without folders"),
    ("decomposed", "hf", "composed", "Unicode form"),
    ("hangul", "folder", "hangul decomposed", "Unicode form"),
    ("hangul decomposed", "tar", "hangul", "without folders"),
]


@pytest.mark.parametrize(("label_names", "kind", "names", "what"), JOINED)
def test_images_with_other_spellings_of_their_names_are_joined_and_one_line_says_so(
    label_only, tmp_path, caplog, label_names, kind, names, what
):
    root = label_only(label_names)
    caplog.clear()
    split = {"split": "train"}
    if "val" in names:  # the folder of a split is found by its name
        write_folder(tmp_path / "images", names)
        images = tmp_path / "images" / ("ILSVRC/Data/CLS-LOC/val" if "kaggle" in names else "") if kind == "folder" else (
            images_as(kind, names, tmp_path)
        )  # fmt: skip
    else:
        images = images_as(kind, names, tmp_path)
    with caplog.at_level(logging.WARNING):
        dataset = rd.RelabelDataset(root, images=images, **split)
    assert len(dataset) == COUNT
    for i in range(COUNT):
        number = picture_of(dataset.image(i))
        assert dataset.targets[i] == number % 3
        assert str(number) in dataset.keys[i] or "numbers" in label_names
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("relabel_datasets")]
    assert len(lines) == (what is not None)
    if what is not None:
        assert what in lines[0]
        assert "images are joined by " in lines[0]


def picture_of(image):
    return next(i for i in range(COUNT) if picture(i, (24, 32)).tobytes() == image.tobytes())


def test_the_folder_of_kaggles_validation_images_is_found_below_its_root(tmp_path):
    source = rd.data.ImageFolderSource(write_folder(tmp_path / "val", "val"))
    annotator = rd.ModuleAnnotator(ColourNet(), (24, 32), classes=SYNSETS, name="colours")
    build_config = rd.annotate.BuildConfig(images=False)
    rd.build(source, tmp_path / "data", annotator, split="validation", build_config=build_config, progress=False)
    for root in (write_folder(tmp_path / "kaggle", "kaggle val"), tmp_path / "kaggle" / "ILSVRC"):
        dataset = rd.RelabelDataset(tmp_path / "data", split="validation", images=root)
        for i, key in enumerate(dataset.keys):
            assert picture_of(dataset.image(i)) == int(key.rpartition("_")[2])


def test_an_image_next_to_tars_or_a_saved_dataset_is_ignored(label_only, tmp_path):
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "s.tar", "hub")
    hugging_face("hub").save_to_disk(tmp_path / "saved")
    for root in (tmp_path / "tars", tmp_path / "saved"):
        (root / "preview.png").write_bytes(png(0))
        assert len(rd.RelabelDataset(label_only("folder"), images=root)) == COUNT


@pytest.mark.parametrize(
    ("label_names", "kind", "names", "message"),
    [
        ("folder", "folder", "others", r"No key is in both: .*the keys of the images are such as 'another_0'"),
        ("folder", "hf", None, "row numbers, since the Hugging Face dataset has no file names: pass images with"),
        ("hub", "hf", None, "row numbers, since the Hugging Face dataset has no file names"),
        (None, "folder", "folder", "row numbers of a Hugging Face dataset without file names: pass the source"),
        ("numbers", "hf", "numbers", r"row numbers"),
        ("numbers", "mapping", "numbers flat", "by their file names without folders, but then several"),
        ("composed", "folder", "others", r"such as 'größe_é_\d' \(gr\\xf6\\xdfe_\\xe9_\d\)"),
    ],
)
@pytest.mark.parametrize("unmatched", ["error", "skip"])
def test_names_that_cannot_be_joined_safely_are_explained(
    label_only, tmp_path, label_names, kind, names, message, unmatched
):
    images = {"0.JPEG": png(0), "1.JPEG": png(3)} if names == "numbers flat" else images_as(kind, names, tmp_path)
    with pytest.raises(rd.DatasetError, match=message):
        rd.RelabelDataset(label_only(label_names), images=images, unmatched=unmatched)


def test_row_numbers_do_not_match_file_names(label_only, tmp_path):
    """`train/00000003.jpg` is not row 3."""
    for i in range(COUNT):
        path = tmp_path / "train" / "a" / "b" / f"{i:08d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    images = {f"a/{i:08d}.JPEG": png(i) for i in range(COUNT)}
    with pytest.raises(rd.DatasetError, match="No key is in both"):
        rd.RelabelDataset(label_only(None), images=images)
    stream = ({"__key__": f"a/{i:08d}.jpg"} for i in range(COUNT))
    with pytest.raises(rd.DatasetError, match=r"no label map of 'a/00000000\.jpg'"):
        list(rd.data.join(stream, rd.LabelMaps(label_only(None))))


def test_one_equal_key_rules_out_all_other_spellings(label_only, tmp_path):
    """The origin of the images is then mixed, so spellings are not compared."""
    images = {NAMES["hub"](i)[:-5]: png(i) for i in range(1, COUNT)} | {f"{synset(0)}_0": png(0)}
    with pytest.raises(rd.DatasetError, match="5 label maps have no image"):
        rd.RelabelDataset(label_only("folder"), images=images)
    dataset = rd.RelabelDataset(label_only("folder"), images=images, unmatched="skip")
    assert list(dataset.keys) == [f"{synset(0)}_0"]
    samples = [{"__key__": f"{synset(0)}_0"}, {"__key__": NAMES["hub"](1)[:-5]}]
    with pytest.raises(rd.DatasetError, match="no label map of 'n01443537_1_n01443537'"):
        list(rd.data.join(samples, rd.LabelMaps(label_only("folder"))))


def test_images_without_a_label_map_count_as_extra_unless_they_were_skipped(tmp_path, label_only):
    root = write_folder(tmp_path / "images", "folder")
    (root / NAMES["folder"](4)).write_bytes(b"broken")
    annotator = rd.ModuleAnnotator(ColourNet(), (24, 32), classes=SYNSETS, name="colours")
    rd.build(
        rd.data.ImageFolderSource(root),
        tmp_path / "data",
        annotator,
        build_config=rd.annotate.BuildConfig(images=False),
        progress=False,
    )
    hub = {NAMES["hub"](i)[:-5]: png(i) for i in range(COUNT)}
    dataset = rd.RelabelDataset(tmp_path / "data", images=hub)
    assert (len(dataset), dataset.unmatched) == (COUNT - 1, (0, 0))
    samples = [{"__key__": key} for key in sorted(hub, key=lambda key: "_4_" not in key)]  # the skipped one comes first
    joined = list(rd.data.join(samples, dataset.label_maps, complete=True))
    assert sorted(sample["label_map"].key for sample in joined) == sorted(dataset.keys)
    more = hub | {"n01440764_99_n01440764": png(9)}
    with pytest.raises(rd.DatasetError, match="1 image has no label map, such as 'n01440764_99_n01440764'"):
        rd.RelabelDataset(tmp_path / "data", images=more)


def test_real_labels_are_found_by_the_names_on_the_hub():
    names = [
        "ILSVRC2012_val_00000293_n01440764",
        "val/ILSVRC2012_val_00000293.JPEG",
        "ILSVRC2012_val_00000293",
        "n0_293",
    ]
    labels = real_labels(names)
    assert labels[0] == labels[1] == labels[2] != []
    assert labels[3] == []


@pytest.mark.parametrize(
    ("label_names", "names", "what"),
    [row[:1] + row[2:] for row in JOINED if row[1] == "tar"] + [("hub", "folder", "without class suffix")],
)
def test_streams_are_joined_by_the_same_spellings(label_only, tmp_path, caplog, label_names, names, what):
    root = label_only(label_names)
    caplog.clear()
    pipeline = webdataset.WebDataset(str(write_tar(tmp_path / "s.tar", names)), shardshuffle=False)
    joined = list(rd.data.join(pipeline, rd.LabelMaps(root), complete=True))
    for i, sample in enumerate(joined):
        assert sample["label_map"].label == i % 3
        assert str(i) in sample["label_map"].key or "numbers" in label_names
    assert len(joined) == COUNT
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("relabel_datasets")]
    assert [what in line for line in lines] == ([] if what is None else [True])


def test_a_stray_first_sample_does_not_take_the_label_map_of_another(label_only):
    label_maps = rd.LabelMaps(label_only("numbers"))
    keys = list(label_maps)
    stream = [{"__key__": key} for key in (f".hidden/{keys[0]}", *keys)]
    with pytest.raises(rd.DatasetError, match=r"no label map of '.hidden/"):
        list(rd.data.join(stream, label_maps))
    joined = list(rd.data.join(stream, label_maps, unmatched="skip", complete=True))
    assert [sample["__key__"] for sample in joined] == keys
    assert [sample["label_map"].key for sample in joined] == keys


@pytest.mark.parametrize("pair", [("é", nfd("é")), ("\u00c5", "\u212b"), ("각", nfd("각"))])
def test_names_in_one_source_that_differ_only_by_unicode_form_are_refused_with_their_code_points(tmp_path, pair):
    for i, text in enumerate(pair):
        path = tmp_path / "images" / SYNSETS[i] / f"{text}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    annotator = rd.ModuleAnnotator(ColourNet(), (24, 32), classes=SYNSETS, name="colours")
    with pytest.raises(rd.DatasetError, match=r"differ only by their Unicode form: .* rename one") as error:
        rd.build(
            rd.data.ImageFolderSource(tmp_path / "images"),
            tmp_path / "data",
            annotator,
            all_classes=True,
            progress=False,
        )
    for text in pair:
        assert f"({ascii(text)[1:-1]})" in str(error.value)
    assert not (tmp_path / "data").exists()


def test_class_folders_in_another_unicode_form_are_the_same_classes(tmp_path):
    for i, name in enumerate(("café", "crêpe", "thé")):
        path = tmp_path / "images" / nfd(name) / f"{i}.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(png(i))
    annotator = rd.ModuleAnnotator(ColourNet(), (24, 32), classes=("thé", "café", "crêpe"), name="colours")
    manifest = rd.build(rd.data.ImageFolderSource(tmp_path / "images"), tmp_path / "data", annotator, progress=False)
    assert manifest.classes == sorted(map(nfd, ("café", "crêpe", "thé")))
