"""Image formats: which are read, their extensions in shards, and that every reader decodes them."""

import io
import json

import datasets
import numpy as np
import PIL.Image
import pytest

import relabel_datasets as rd
from relabel_datasets.data.folder_scan import scan_image_folder
from relabel_datasets.shards.formats import FORMATS, IMAGE_EXTENSIONS, common_field, field_of
from tests.conftest import picture
from tests.readers import IGNORED_WARNINGS, assert_read_everywhere

pytestmark = [pytest.mark.filterwarnings(each) for each in IGNORED_WARNINGS]

CLASSES = ["cat", "dog", "emu"]
WRITABLE = [kind for kind in FORMATS if kind not in ("PSD", "SUN")]  # Pillow does not write these


def encoded(kind, seed=0):
    PIL.Image.init()
    if kind not in PIL.Image.SAVE:
        pytest.skip(f"Pillow {PIL.__version__} has no {kind}")
    buffer = io.BytesIO()
    picture(seed, (40, 40) if kind == "ICO" else (40, 56)).save(buffer, kind)
    return buffer.getvalue()


def hugging_face(images, paths):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    cells = [{"bytes": data, "path": path} for data, path in zip(images, paths, strict=True)]
    return datasets.Dataset.from_dict({"image": cells, "label": [i % 3 for i in range(len(cells))]}, features=features)


@pytest.mark.parametrize("kind", WRITABLE)
def test_images_of_every_format_are_decoded(kind):
    image = rd.decode_image(encoded(kind))
    assert image.mode == "RGB"
    expected = PIL.Image.open(io.BytesIO(encoded(kind))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_formats_that_start_another_program_are_refused():
    with pytest.raises(rd.errors.ImageError, match="format is unknown or not one of JPEG, PNG"):
        rd.decode_image(encoded("EPS"))


# Formats of the images, extensions of their paths, and their extension in shards
SPLITS = {
    "JPEG called avif": (["JPEG"] * 4, "{}.avif", "jpg"),
    "JPEG called jp2": (["JPEG"] * 4, "{}.jp2", "jpg"),
    "JPEG of a URL": (["JPEG"] * 4, "{}.jpg?v=1.2", "jpg"),
    "JPEG called cls": (["JPEG"] * 4, "{}.cls", "jpg"),
    "JPEG called safetensors": (["JPEG"] * 4, "{}.safetensors", "jpg"),
    "JPEG called png": (["JPEG"] * 4, "{}.png", "jpg"),
    "JPEG without extension": (["JPEG"] * 4, "{}", "jpg"),
    "PNG called jpg": (["PNG"] * 4, "{}.jpg", "png"),
    "PNG without names": (["PNG"] * 4, None, "png"),
    "WEBP": (["WEBP"] * 4, "{}.WEBP", "webp"),
    "BMP": (["BMP"] * 4, "{}.bmp", "jpg"),
    "AVIF": (["AVIF"] * 4, "{}.avif", "jpg"),
    "PNG and one JPEG": (["PNG", "PNG", "PNG", "JPEG"], "{}.png", "jpg"),
    "PNG and WEBP": (["PNG", "WEBP"] * 2, "{}.png", "jpg"),
    "all formats": (WRITABLE, "{}.tif", "jpg"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_the_extension_in_shards_follows_the_bytes_and_every_reader_decodes_it(name, tmp_path, annotator, hf_home):
    kinds, path, extension = SPLITS[name]
    images = [encoded(kind, i) for i, kind in enumerate(kinds)]
    source = rd.data.HFSource(hugging_face(images, [path and path.format(f"k{i}") for i in range(len(images))]))
    manifest = rd.build(source, tmp_path, annotator, shard_size=10, progress=False)
    assert manifest.splits["train"].image_extension == extension
    assert manifest.splits["train"].skipped == []
    assert_read_everywhere(tmp_path, {key: (i % 3, images[i]) for i, key in enumerate(source.keys)})


@pytest.mark.parametrize("where", ["folder", "tar"])
def test_every_source_chooses_the_extension_by_the_bytes(where, tmp_path, annotator):
    for i in range(3):
        path = tmp_path / "images" / CLASSES[i] / f"k{i}.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(encoded("PNG", i))
    source = rd.data.ImageFolderSource(tmp_path / "images")
    if where == "tar":
        rd.build(source, tmp_path / "tars", annotator, progress=False)
        source = rd.data.open_source(tmp_path / "tars" / "colours")
    assert source.extension == "png"


def test_the_first_jpeg_decides_and_missing_images_do_not_count():
    heads = {
        "jpg": encoded("JPEG"),
        "png": encoded("PNG"),
        "webp": encoded("WEBP"),
        "other": encoded("BMP"),
        "none": None,
    }
    assert [field_of(head) for head in heads.values() if head] == ["jpg", "png", "webp", None]
    for names, expected in (
        (["jpg"], "jpg"), (["png", "none"], "png"), (["none", "webp"], "webp"), (["png", "other"], "jpg"), ([], "jpg"),
        (["none"], "jpg"), (["png"] * 3000 + ["webp"], "jpg"), (["png"] * 3000, "png"),
    ):  # fmt: skip
        assert common_field(len(names), lambda index, names=names: heads[names[index]]) == expected
    read = []
    assert common_field(10, lambda index: read.append(index) or heads["jpg"]) == "jpg"
    assert read == [0]


def test_images_of_every_extension_are_found_and_other_files_are_counted(tmp_path, caplog):
    cat = tmp_path / "cat"
    cat.mkdir()
    for extension in IMAGE_EXTENSIONS:
        (cat / f"{extension[1:]}{extension.upper()}").write_bytes(b"")
    for name in ("a.txt", "b.txt", "c.mp4", "LICENSE", ".hidden", "._d.jpg"):
        (cat / name).write_bytes(b"")
    (tmp_path / "outside.jpg").write_bytes(b"")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (cat / ".thumbnails").mkdir()
    (cat / ".thumbnails" / "small.jpg").write_bytes(b"")
    classes, files = scan_image_folder(tmp_path)
    assert classes == ("cat",)
    assert {file.path for file in files} == {f"cat/{ext[1:]}{ext.upper()}" for ext in IMAGE_EXTENSIONS}
    (message,) = caplog.messages
    assert "5 files ignored" in message
    for count in ("2 .txt", "1 .mp4", "1 file without extension", "1 image outside of class folders"):
        assert count in message


def test_every_extension_is_registered_in_pillow_for_these_formats():
    PIL.Image.init()
    known = PIL.Image.registered_extensions()
    assert {known[extension] for extension in IMAGE_EXTENSIONS} == {*FORMATS, "MPO"}


@pytest.fixture(scope="module")
def png_dataset(tmp_path_factory):
    from relabel_datasets.annotate.annotator import ModuleAnnotator
    from tests.conftest import ColourNet

    root = tmp_path_factory.mktemp("png")
    annotator = ModuleAnnotator(ColourNet(), (48, 64), classes=CLASSES, name="colours")
    source = rd.data.HFSource(hugging_face([encoded("PNG", i) for i in range(3)], ["a.png", "b.png", "c.png"]))
    rd.build(source, root, annotator, progress=False)
    return root


class Called:
    """Source whose extension contradicts the bytes of its images."""

    def __init__(self, source, extension):
        self.extension = extension
        for name in ("classes", "keys", "labels", "key_rule", "read", "name"):
            setattr(self, name, getattr(source, name))


@pytest.mark.parametrize(
    ("kinds", "extension", "problem"),
    [
        (["PNG"] * 3, "jpg", "all images are PNG, but their extension is .jpg"),
        (["WEBP"] * 3, "jpg", "all images are WEBP, but their extension is .jpg"),
        (["PNG", "JPEG", "PNG"], "png", "'b': the image is not PNG, although its extension is .png"),
        (["WEBP", "WEBP", "BMP"], "webp", "'c': the image is not WEBP, although its extension is .webp"),
        (["AVIF"] * 3, "avif", "the images have the extension .avif, but readers find only .jpg, .png, .webp"),
        (["JPEG"] * 3, "jp2", "the images have the extension .jp2"),
        (["BMP"] * 3, "bmp", "the images have the extension .bmp"),
    ],
)
def test_verify_reports_an_extension_that_contradicts_the_bytes(
    kinds, extension, problem, tmp_path, annotator, monkeypatch
):
    monkeypatch.setattr(
        "relabel_datasets.annotate.builder.FIELDS", ("jpg", extension)
    )  # as an earlier version built it
    images = [encoded(kind, i) for i, kind in enumerate(kinds)]
    source = Called(rd.data.HFSource(hugging_face(images, ["a.x", "b.x", "c.x"])), extension)
    rd.build(source, tmp_path, annotator, progress=False)
    report = rd.verify(tmp_path, num_workers=0, progress=False)
    assert problem in str(report)
    assert len(report.problems) == 1
    assert json.loads(report.to_json())["ok"] is False


def test_a_source_with_an_unknown_extension_is_refused_before_any_output(tmp_path, annotator):
    source = Called(rd.data.HFSource(hugging_face([encoded("AVIF")] * 2, ["a.avif", "b.avif"])), "avif")
    with pytest.raises(ValueError, match=r"extension must be one of \('jpg', 'png', 'webp'\), .* got 'avif'"):
        rd.build(source, tmp_path / "data", annotator, progress=False)
    assert not (tmp_path / "data").exists()
