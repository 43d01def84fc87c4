"""Hugging Face datasets as they exist: empty cells, labels of every type, columns of every name."""

import io
import re

import datasets
import pytest

import relabel_datasets as rd
from relabel_datasets.cli import main
from tests.conftest import picture
from tests.readers import IGNORED_WARNINGS, assert_read_everywhere
from tests.versions import needs

pytestmark = [pytest.mark.filterwarnings(each) for each in IGNORED_WARNINGS]

CLASSES = ["cat", "dog", "emu"]


def jpeg(seed):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "JPEG")
    return buffer.getvalue()


def rows_of(labels, label_feature, cells=None):
    cells = [{"bytes": jpeg(i), "path": f"k{i}.jpg"} for i in range(len(labels))] if cells is None else cells
    features = datasets.Features({"image": datasets.Image(), "label": label_feature})
    return datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features)


def value(dtype):
    return datasets.Value(dtype)


def class_label(names=CLASSES):
    return datasets.ClassLabel(names=names)


# Labels of three or four rows, their type, and the class index of each; -1: no class
LABELS = {
    "ClassLabel": ([0, 2, 1], class_label(), [0, 2, 1]),
    "ClassLabel with None": ([0, None, 1], class_label(), [0, -1, 1]),
    "ClassLabel of an unlabelled split": ([0, -1, 1], class_label(), [0, -1, 1]),
    "integers": ([0, 2, 1], value("int32"), [0, 2, 1]),
    "integers with None": ([0, None, 1], value("uint8"), [0, -1, 1]),
    "negative integers": ([0, -7, 1], value("int64"), [0, -1, 1]),
    "bools": ([False, True, None], value("bool"), [0, 1, -1]),
    "whole floats": ([0.0, 2.0, None], value("float32"), [0, 2, -1]),
    "floats with NaN": ([0.0, float("nan"), 1.0], value("float64"), [0, -1, 1]),
    "strings": (["dog", "cat", "emu", "dog"], value("string"), [1, 0, 2, 1]),
    "strings with None": (["dog", None, "cat", ""], value("large_string"), [1, -1, 0, -1]),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_of_every_type_are_class_indices_or_skipped_and_listed(name, tmp_path, annotator):
    labels, feature, expected = LABELS[name]
    source = rd.data.HFSource(rows_of(labels, feature), label_column="label")
    assert list(source.labels) == expected
    if feature == value("string"):
        assert source.classes == ("cat", "dog", "emu")
    build_config = rd.annotate.BuildConfig(images=False)
    if "strings" in name and len(source.classes) < 3:
        annotator.classes = None
        mapping = {label: i for i, label in enumerate(source.classes)}
    else:
        mapping = None
    manifest = rd.build(source, tmp_path, annotator, build_config=build_config, class_mapping=mapping, progress=False)
    maps = rd.LabelMaps(tmp_path, split="train")
    assert {key: maps[key].label for key in maps} == {f"k{i}": c for i, c in enumerate(expected) if c >= 0}
    skipped = {entry["key"]: entry["error"] for entry in manifest.splits["train"].skipped}
    assert set(skipped) == {f"k{i}" for i, c in enumerate(expected) if c < 0}
    for i, c in enumerate(expected):
        assert c >= 0 or f"row {i} of column 'image' (k{i}) has no class" in skipped[f"k{i}"]


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0.0, 1.7, 2.0], value("float32"), r"row 1 of column 'label' is 1\.7.*: expected a class index"),
        ([0, 3, 1], class_label(), r"row 1 of column 'label' is 3: expected a class index in 0 \.\. 2"),
        ([0, 2**40, 1], value("int64"), r"row 1 of column 'label' is 1099511627776: expected a class index"),
        ([0.0, float("inf"), 1.0], value("float64"), r"row 1 of column 'label' is inf: expected a class index"),
        (
            [[0], [1, 2], []],
            datasets.Sequence(value("int64")),
            r"column 'label' cannot be the labels: .*(List|Sequence)",
        ),
        ([{"a": 0}] * 3, {"a": value("int64")}, r"column 'label' cannot be the labels"),
        ([b"0"] * 3, value("binary"), r"column 'label' cannot be the labels: .*binary"),
        ([None] * 3, class_label(), r"no image has a class \(3 images\), first row 0 of column 'image' \(k0\)"),
        ([-1] * 3, class_label(), r"no image has a class"),
        ([0, 1, 7], value("int64"), r"row 2 of column 'image' \(k2\) has class index 7, but the annotator has only 3"),
    ],
)
def test_labels_that_are_not_class_indices_are_refused_with_column_and_row(
    labels, feature, message, tmp_path, annotator
):  # fmt: skip
    stored = value("int64") if isinstance(feature, datasets.ClassLabel) else feature
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    # As from an Arrow file, whose values `datasets` does not check
    dataset = datasets.Dataset(rows_of(labels, stored).data.table, info=datasets.DatasetInfo(features=features))
    with pytest.raises(ValueError, match=message):
        rd.build(rd.data.HFSource(dataset, label_column="label"), tmp_path / "data", annotator, progress=False)
    assert not (tmp_path / "data").exists()


def test_rows_without_a_readable_image_are_skipped_and_listed(tmp_path, annotator, hf_home):
    cells = [
        {"bytes": jpeg(0), "path": "k0.jpg"}, None, {"bytes": jpeg(2)[:300], "path": "k2.jpg"}, {"bytes": b"", "path": "k3.jpg"},
        {"bytes": b"text", "path": "k4.jpg"}, {"bytes": None, "path": str(tmp_path / "missing.jpg")},
        {"bytes": jpeg(6), "path": "k6.jpg"},
    ]  # fmt: skip
    source = rd.data.HFSource(rows_of([0, 1, 2, 0, 1, 2, 0], class_label(), cells))
    manifest = rd.build(source, tmp_path / "data", annotator, progress=False)
    skipped = {entry["key"]: entry["error"] for entry in manifest.splits["train"].skipped}
    assert {int(key) for key in skipped} == {1, 2, 3, 4, 5}
    for row, reason in (
        (1, "the cell is empty"),
        (2, "cannot be read"),
        (3, "cannot be read"),
        (4, "cannot be read as an image: its format is unknown"),
    ):
        assert skipped[f"{row:08d}"].startswith(f"row {row} of column 'image' ({row:08d}): {reason}"), skipped
    assert re.match(r"row 5 of column 'image' \(00000005\): .*missing\.jpg", skipped["00000005"])
    assert_read_everywhere(tmp_path / "data", {"00000000": (0, jpeg(0)), "00000006": (0, jpeg(6))})


def images_as(kind, folder):
    """Return a dataset whose column `img` has three images."""
    paths = []
    for i in range(3):
        paths.append(str(folder / f"k{i}.jpg"))
        (folder / f"k{i}.jpg").write_bytes(jpeg(i))
    columns = {
        "bytes": ([jpeg(i) for i in range(3)], value("binary")),
        "large bytes": ([jpeg(i) for i in range(3)], value("large_binary")),
        "paths": (paths, value("string")),
        "Image of paths": (paths, datasets.Image()),
        "Image of bytes": ([{"bytes": jpeg(i), "path": None} for i in range(3)], datasets.Image(decode=False)),
        "pictures": ([picture(i) for i in range(3)], datasets.Image()),
    }
    cells, feature = columns[kind]
    features = datasets.Features({"img": feature, "label": class_label()})
    return datasets.Dataset.from_dict({"img": cells, "label": [0, 1, 2]}, features=features)


@pytest.mark.parametrize(
    "kind",
    [
        "bytes",
        pytest.param("large bytes", marks=needs("datasets", 4)),
        "paths",
        "Image of paths",
        "Image of bytes",
        "pictures",
    ],
)
def test_an_image_column_of_every_type_is_read(kind, tmp_path, annotator, hf_home):
    source = rd.data.HFSource(images_as(kind, tmp_path), image_column="img")
    rd.build(source, tmp_path / "data", annotator, progress=False)
    names = ["k0", "k1", "k2"] if "paths" in kind else ["00000000", "00000001", "00000002"]
    if kind != "pictures":
        assert_read_everywhere(tmp_path / "data", {key: (i, jpeg(i)) for i, key in enumerate(names)})
        return
    assert_read_everywhere(tmp_path / "data", {key: (i, source.read(i)) for i, key in enumerate(names)})
    assert rd.decode_image(source.read(1)).tobytes() == picture(1).tobytes()


@pytest.mark.parametrize(
    ("feature", "cell"),
    [(datasets.Sequence(datasets.Image()), [{"bytes": jpeg(0), "path": None}]), (value("int64"), 3)],
)
def test_a_column_without_one_image_per_row_is_rejected(feature, cell):
    features = datasets.Features({"photo": feature, "label": class_label()})
    dataset = datasets.Dataset.from_dict({"photo": [cell], "label": [0]}, features=features)
    with pytest.raises(ValueError, match="column 'photo' cannot be the images: expected one image per row"):
        rd.data.HFSource(dataset, image_column="photo")
    with pytest.raises(ValueError, match=r"no column has the type Image.*image_column=.*label \(ClassLabel\)"):
        rd.data.HFSource(dataset)


def test_a_dict_of_splits_or_a_stream_is_rejected():
    rows = rows_of([0, 1], class_label())
    with pytest.raises(TypeError, match=r"dict of splits: pass one of \['test', 'train'\]"):
        rd.data.HFSource(datasets.DatasetDict({"train": rows, "test": rows}))
    with pytest.raises(TypeError, match=r"got IterableDataset: .*without streaming=True"):
        rd.data.HFSource(rows.to_iterable_dataset())
    with pytest.raises(TypeError, match="dict of splits"):
        rd.data.HFSource(datasets.IterableDatasetDict({"train": rows.to_iterable_dataset()}))


def test_a_split_without_rows_is_refused_before_any_output(tmp_path, annotator):
    source = rd.data.HFSource(rows_of([], class_label()))
    with pytest.raises(rd.DatasetError, match="there are no images to annotate: the source is empty"):
        rd.build(source, tmp_path / "data", annotator, progress=False)
    assert not (tmp_path / "data").exists()


def test_keys_are_row_numbers_if_file_names_are_not_valid_keys(tmp_path):
    for path in ("/", ".", f"{'x' * 5000}.jpg"):
        cells = [{"bytes": jpeg(0), "path": "k0.jpg"}, {"bytes": jpeg(1), "path": path}]
        assert list(rd.data.HFSource(rows_of([0, 1], class_label(), cells)).keys) == ["00000000", "00000001"]


@pytest.fixture
def cifar(tmp_path):
    """A saved dataset with the columns of CIFAR-100."""
    features = datasets.Features(
        {"img": datasets.Image(), "fine_label": class_label(), "coarse_label": class_label(["animal", "bird"])}
    )
    rows = {"img": [picture(i) for i in range(4)], "fine_label": [0, 1, 2, 1], "coarse_label": [0, 0, 1, 0]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(
        tmp_path / "cifar"
    )
    return tmp_path / "cifar"


def test_columns_are_chosen_on_the_command_line(cifar, tmp_path, capsys):
    annotator = tmp_path / "colours.py"
    annotator.write_text(
        "from relabel_datasets import ModuleAnnotator\nfrom tests.conftest import ColourNet\n\n\n"
        "def make():\n    return ModuleAnnotator(ColourNet(), (48, 64), classes=('cat', 'dog', 'emu'), name='colours')\n"
    )
    command = ["build", str(cifar), str(tmp_path / "out"), "--annotator", f"{annotator}:make"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "several columns could be the label column: ['fine_label', 'coarse_label']" in error
    assert "--label-column" in error
    assert "img (Image), fine_label (ClassLabel), coarse_label (ClassLabel)" in error
    assert not (tmp_path / "out").exists()
    assert main([*command, "--label-column", "fine", "--image-column", "img"]) == 1
    assert "there is no label column 'fine'" in capsys.readouterr().err
    assert main([*command, "--label-column", "fine_label", "--image-column", "img"]) == 0
    manifest = rd.LabelMaps(tmp_path / "out", split="train").manifest
    assert manifest.classes == ["cat", "dog", "emu"]
    assert manifest.splits["train"].image_extension == "png"


def test_columns_are_chosen_in_python(cifar):
    source = rd.data.open_source(cifar, "train", label_column="coarse_label")
    assert (source.classes, list(source.labels)) == (("animal", "bird"), [0, 0, 1, 0])
    assert rd.data.open_source(cifar, "train").classes is None  # enough to join with


def test_columns_of_an_image_folder_are_refused(image_folder):
    with pytest.raises(ValueError, match=r"label_column=.* are for Hugging Face datasets and tars; .*ImageFolder"):
        rd.data.open_source(image_folder, label_column="fine_label")


def test_the_image_column_of_label_only_shards_is_chosen_on_the_command_line(tmp_path, annotator, capsys):
    features = datasets.Features({"left": datasets.Image(), "right": datasets.Image(), "label": class_label()})
    rows = {
        "left": [{"bytes": jpeg(i), "path": f"k{i}.jpg"} for i in range(3)],
        "right": [{"bytes": jpeg(9), "path": f"k{i}.jpg"} for i in range(3)], "label": [0, 1, 2],
    }  # fmt: skip
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    source = rd.data.HFSource(dataset, image_column="left")
    rd.build(source, tmp_path / "data", annotator, build_config=rd.annotate.BuildConfig(images=False), progress=False)
    command = ["pictures", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert main([*command, "--images", str(tmp_path / "saved")]) == 1
    assert "several columns could be the image column: ['left', 'right']" in capsys.readouterr().err
    assert main([*command, "--image-column", "left"]) == 1
    assert "--image-column left is a column of --images, which is missing: give --images" in capsys.readouterr().err
    assert main([*command, "--images", str(tmp_path / "saved"), "--image-column", "left", "--key", "k1"]) == 0
    assert list((tmp_path / "out").glob("*.png"))
    joined = rd.load_dataset(tmp_path / "data", split="train", images=source)
    assert {key: joined.image(row).tobytes() for row, key in enumerate(joined.keys)} == {
        f"k{i}": rd.decode_image(jpeg(i)).tobytes() for i in range(3)
    }


@pytest.mark.parametrize("command", ["build", "evaluate", "train", "compare", "pictures", "report"])
def test_commands_that_read_images_have_the_options(command):
    from relabel_datasets.cli import make_parser

    helps = make_parser()._subparsers._group_actions[0].choices[command].format_help()
    assert "--image-column" in helps
    assert ("--label-column" in helps) == (command in ("build", "evaluate"))
