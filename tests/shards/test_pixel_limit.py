"""Images above Pillow's pixel limit, and Pillow's switch for truncated images, through build, verify and the datasets."""

import io
import subprocess
import sys

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest

import relabel_datasets as rd
from relabel_datasets.errors import ImageError
from relabel_datasets.shards.images import decode_image, decode_reduced, read_size
from tests.conftest import ROOT, ColourNet, picture

LIMIT = 10_000  # Pillow warns above it, and refuses above twice of it
BELOW, WARNED, ABOVE, FAR_ABOVE = (40, 56), (120, 140), (300, 400), (900, 1000)


def encode(size, kind="JPEG", mode="RGB", **options):
    buffer = io.BytesIO()
    if kind == "MPO":
        options.update(save_all=True, append_images=[picture(1, BELOW)])
    picture(0, size).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def in_several_scans(data):
    """Return a baseline JPEG whose first scan has one of three components, so that libjpeg must keep all of it in memory."""
    scan = b"\xff\xda\x00\x0c\x03"
    assert data.count(scan) == 1
    start = data.index(scan)
    return data[:start] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + data[start + 14 :]


def orientation(value):
    exif = PIL.Image.Exif()
    exif[0x0112] = value
    return exif


FILES = {  # name: (bytes, (height, width) in the label map, of how many pixels a side one is decoded; None: skipped)
    "below": (encode(BELOW), BELOW, 1),
    "between": (encode(WARNED), WARNED, 1),
    "above": (encode(ABOVE), ABOVE, 4),
    "above-grey": (encode(ABOVE, mode="L"), ABOVE, 4),
    "above-cmyk": (encode(ABOVE, mode="CMYK"), ABOVE, 4),
    "above-mpo": (encode(ABOVE, "MPO"), ABOVE, 4),
    "above-turned": (encode(ABOVE, exif=orientation(6)), ABOVE[::-1], 4),
    "above-orientation-9": (encode(ABOVE, exif=orientation(9)), ABOVE, 4),
    "above-narrow": (encode((20_000, 2)), (20_000, 2), 2),
    "above-progressive": (encode(ABOVE, progressive=True), None, None),
    "above-in-scans": (in_several_scans(encode(ABOVE)), None, None),
    "above-at-any-scale": (encode(FAR_ABOVE), None, None),
    "above-png": (encode(ABOVE, "PNG"), None, None),
    "above-tiff": (encode(ABOVE, "TIFF"), None, None),
    "above-webp": (encode(ABOVE, "WEBP"), None, None),
    "above-gif": (encode(ABOVE, "GIF"), None, None),
    "above-bmp": (encode(ABOVE, "BMP"), None, None),
}
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture(autouse=True)
def _limit(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", LIMIT)


@pytest.mark.parametrize("name", FILES)
def test_above_the_limit_a_jpeg_is_reduced_and_other_formats_are_refused(name, monkeypatch):
    data, size, share = FILES[name]
    if size is None:
        with pytest.raises(
            ImageError, match=rf"{name}: has \d+ pixels, more than the limit of 20000, and cannot be dec"
        ):
            decode_image(data, name)
        with pytest.raises(ImageError, match=name):
            decode_reduced(data, (3, 5), name)
        return
    image, full = decode_reduced(data, None)
    assert full == size == read_size(io.BytesIO(data), name)
    assert (image.height, image.width) == tuple(-(-side // share) for side in size)
    smaller, full = decode_reduced(data, (3, 5))
    assert full == size
    assert smaller.width * smaller.height <= image.width * image.height
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)  # no limit
    whole = decode_image(data)
    assert (whole.height, whole.width) == size
    if name != "above-narrow":
        difference = np.asarray(whole.resize(image.size, PIL.Image.Resampling.BOX), float) - np.asarray(image, float)
        assert np.abs(difference).mean() < 4


def test_images_that_cannot_be_decoded_are_skipped_and_listed(tmp_path):
    for name, (data, size, _) in FILES.items():
        path = tmp_path / "images" / ("bad" if size is None else "good") / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    annotator = rd.ModuleAnnotator(ColourNet(), (24, 24), classes=("good", "bad", "c"), name="colours")
    source = rd.data.ImageFolderSource(tmp_path / "images")
    manifest = rd.build(source, tmp_path / "data", annotator, shard_size=50, progress=False)
    reasons = {entry["key"]: entry["error"] for entry in manifest.splits["train"].skipped}
    assert set(reasons) == {name for name, (_, size, _) in FILES.items() if size is None}
    assert all("more than the limit of 20000" in reason for reason in reasons.values())
    report = rd.verify(tmp_path / "data", num_workers=0, progress=False)
    assert report.ok, report.problems
    label_maps, dataset = rd.LabelMaps(tmp_path / "data"), rd.load_dataset(tmp_path / "data", split="train")
    for i, key in enumerate(dataset.keys):
        image, label_map = dataset[i]
        assert label_maps[key].canvas_size == FILES[key][1]  # full size is recorded
        assert label_map.canvas_size == (image.height, image.width)


def test_truncated_images_never_count_as_complete(tmp_path, image_folder, annotator, monkeypatch):
    whole = (image_folder / "cat" / "photo_00.jpg").read_bytes()
    (image_folder / "cat" / "photo_00.jpg").write_bytes(whole[:-400])
    source = rd.data.ImageFolderSource(image_folder)
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(
        ValueError, match=r"LOAD_TRUNCATED_IMAGES is set, .*: set it to False before building label maps"
    ):
        rd.build(source, tmp_path / "data", annotator, progress=False)
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", False)

    def sets_it():  # as a module that a worker process imports may
        PIL.ImageFile.LOAD_TRUNCATED_IMAGES = True
        return annotator

    with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES is set"):
        rd.build(source, tmp_path / "data", sets_it, progress=False)
    PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False
    manifest = rd.build(source, tmp_path / "data", annotator, progress=False)
    assert [entry["key"] for entry in manifest.splits["train"].skipped] == ["photo_00"]
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="before verifying a dataset"):
        rd.verify(tmp_path / "data", progress=False)


BOMB = """
import io, resource, sys
import PIL.Image, torch, relabel_datasets as rd
data = open(sys.argv[1], "rb").read()
PIL.Image.new("RGB", (8, 8)).save(io.BytesIO(), "JPEG")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(rd.decode_image(data).size)
except rd.errors.ImageError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "expected", "most"),
    [
        ("JPEG", {}, "(10000, 7500)", 450),  # at half its size, 75 million pixels of 4 bytes
        ("JPEG", {"progressive": True}, "image: has 300000000 pixels, more than the limit of 178956970", 50),
        ("PNG", {"compress_level": 1}, "image: has 300000000 pixels, more than the limit of 178956970", 50),
    ],
)
def test_memory_is_bounded_by_the_limit_for_any_file(tmp_path, monkeypatch, kind, options, expected, most):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    PIL.Image.new("L", (20_000, 15_000), 90).save(tmp_path / "bomb", kind, **options)
    script = [sys.executable, "-c", BOMB, str(tmp_path / "bomb")]
    out = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0].startswith(expected)
    assert int(out[1]) < most  # MiB
