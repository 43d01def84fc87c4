"""Every way in which real files store an orientation, through build, verify and every reader."""

import io
import struct

import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.TiffImagePlugin
import pytest
import webdataset

import relabel_datasets as rd
from relabel_datasets.shards.images import decode_image, decode_reduced, orientation_of, read_size
from tests.conftest import ColourNet, picture

pytestmark = [
    pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning"),  # Pillow's, of the damaged files below
    pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning"),
    pytest.mark.filterwarnings("ignore:Metadata Warning, tag 274 had too many entries:UserWarning"),
    pytest.mark.filterwarnings("ignore:Possibly corrupt EXIF data:UserWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # webdataset leaves its tars to the collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
BYTE, ASCII, SHORT, LONG, RATIONAL, UNDEFINED, SSHORT, DOUBLE = 1, 2, 3, 4, 5, 7, 8, 12
STORED = picture(3, (24, 40))
UNDO = [None, None, *range(2, 9)]


def exif(kind, count, value, order="<"):
    """Return EXIF bytes whose only tag is an orientation of the given type."""
    head = b"Exif\0\0" + (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    at = 8 + 2 + 12 + 4
    inline = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(order + "I", at)
    entry = struct.pack(order + "HHI", 0x0112, kind, count) + inline
    return head + struct.pack(order + "H", 1) + entry + bytes(4) + (value if len(value) > 4 else b"")


def short(value, order="<"):
    return exif(SHORT, 1, struct.pack(order + "H", value), order)


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'
EXIF = {  # name: (EXIF bytes, how the image is turned)
    **{f"short-{value}": (short(value), value) for value in range(1, 9)},
    **{f"short-{value}": (short(value), 1) for value in (0, 9, 255, 65535)},
    "big-endian-6": (short(6, ">"), 6),
    "long-6": (exif(LONG, 1, struct.pack("<I", 6)), 6),
    "long-4294967295": (exif(LONG, 1, struct.pack("<I", 2**32 - 1)), 1),
    "signed-6": (exif(SSHORT, 1, struct.pack("<h", 6)), 6),
    "signed-minus-6": (exif(SSHORT, 1, struct.pack("<h", -6)), 1),
    "rational-6": (exif(RATIONAL, 1, struct.pack("<II", 6, 1)), 6),  # as Pillow's own exif_transpose
    "rational-13/2": (exif(RATIONAL, 1, struct.pack("<II", 13, 2)), 1),
    "rational-6/0": (exif(RATIONAL, 1, struct.pack("<II", 6, 0)), 1),
    "double-6": (exif(DOUBLE, 1, struct.pack("<d", 6.0)), 6),
    "double-nan": (exif(DOUBLE, 1, struct.pack("<d", float("nan"))), 1),
    "byte-6": (exif(BYTE, 1, b"\6"), 1),
    "undefined-6": (exif(UNDEFINED, 1, b"\6"), 1),
    "ascii-6": (exif(ASCII, 2, b"6\0"), 1),
    "ascii-long": (exif(ASCII, 11, b"Rotate 90\0\0"), 1),
    "array-6-6": (exif(SHORT, 2, struct.pack("<HH", 6, 6)), 6),  # the first one, as in Pillow
    "array-of-none": (exif(SHORT, 0, b""), 1),
    "truncated": (short(6)[:-8], 1),
    "offset-outside": (exif(RATIONAL, 1, struct.pack("<II", 6, 1))[:-8], 1),
    "no-tiff": (b"Exif\0\0garbage that is no TIFF", 1),
    "empty": (b"Exif\0\0", 1),
}
PIL.Image.init()
FORMATS = tuple(
    kind for kind in ("JPEG", "PNG", "WEBP", "AVIF", "MPO") if kind in PIL.Image.SAVE
)  # Pillow 11.3 has AVIF


def encode(kind, **options):
    """Return the stored image in a format whose decoder returns exactly the same pixels on each call."""
    buffer = io.BytesIO()
    if kind == "MPO":  # as stereo cameras and phones write it
        options.update(save_all=True, append_images=[STORED.rotate(180)])
    if kind == "WEBP":
        options["lossless"] = True
    STORED.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(kind, value):
    tags = PIL.TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[0x0112] = kind
    tags[0x0112] = value
    return encode("TIFF", tiffinfo=tags)


def png_with_raw_profile(hexadecimal):
    """Return EXIF as ImageMagick stores it in PNGs."""
    info = PIL.PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(hexadecimal) // 2:8}\n{hexadecimal}\n", zip=True)
    return encode("PNG", pnginfo=info)


def xmp(kind, value, **options):
    text = XMP.format(value)
    if kind == "PNG":
        info = PIL.PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", text)
        return encode("PNG", pnginfo=info, **options)
    if kind == "TIFF":
        tags = PIL.TiffImagePlugin.ImageFileDirectory_v2()
        tags[700] = text.encode()
        return encode("TIFF", tiffinfo=tags)
    return encode(kind, xmp=text.encode(), **options)


def files():
    """Return the content and the orientation of every file, by name."""
    members = {}
    for kind in FORMATS:
        for name, (data, orientation) in EXIF.items():
            if kind == "AVIF" and not name.startswith("short-"):
                continue  # Pillow writes AVIF only with EXIF of the right form
            members[f"{kind}-{name}"] = encode(kind, exif=data), orientation
        members[f"{kind}-none"] = encode(kind), 1
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):  # where EXIF has none, XMP counts: so does it in Pillow
        members[f"{kind}-xmp-6"] = xmp(kind, 6), 6
        members[f"{kind}-xmp-9"] = xmp(kind, 9), 1
        members[f"{kind}-xmp-left"] = xmp(kind, "left"), 1
    for kind in ("JPEG", "PNG", "WEBP"):
        members[f"{kind}-xmp-6-exif-1"] = xmp(kind, 6, exif=short(1)), 1
        members[f"{kind}-xmp-6-exif-9"] = xmp(kind, 6, exif=short(9)), 1
    for value in (0, *range(1, 9), 9, 255):
        members[f"TIFF-short-{value}"] = tiff(SHORT, value), value if 1 <= value <= 8 else 1
    members["TIFF-long-6"] = tiff(LONG, 6), 6
    members["TIFF-ascii-6"] = tiff(ASCII, "6"), 1
    members["TIFF-byte-6"] = tiff(BYTE, b"\6"), 1
    members["PNG-raw-profile-6"] = png_with_raw_profile(short(6).hex()), 6
    members["PNG-raw-profile-9"] = png_with_raw_profile(short(9).hex()), 1
    members["PNG-raw-profile-no-hex"] = png_with_raw_profile("zz"), 1
    return members


FILES = files()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Dataset of all files: its folder, and the images from `load_dataset` by key."""
    root = tmp_path_factory.mktemp("orientation")
    for name, (data, orientation) in FILES.items():
        path = root / "images" / ("other" if orientation == 1 else "turned") / f"{name.replace('/', '_')}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    annotator = rd.ModuleAnnotator(ColourNet(), (24, 24), classes=("other", "turned", "c"), name="colours")
    rd.build(rd.data.ImageFolderSource(root / "images"), root / "data", annotator, shard_size=500, progress=False)
    dataset = rd.load_dataset(root / "data", split="train")
    return root / "data", {key: dataset[i] for i, key in enumerate(dataset.keys)}


@pytest.mark.parametrize("name", FILES)
def test_an_orientation_outside_1_to_8_counts_as_1_and_all_others_are_applied(name, built):
    data, orientation = FILES[name]
    expected = turned(data, orientation)
    image, label_map = built[1][name.replace("/", "_")]
    assert label_map.canvas_size == expected.shape[:2]
    for read in (image, decode_image(data), decode_reduced(data, (24, 40))[0]):
        assert np.array_equal(np.asarray(read), expected)
        assert PIL.ImageOps.exif_transpose(read).tobytes() == read.tobytes()  # no later reader turns it once more
    assert decode_reduced(data, (3, 5))[1] == read_size(io.BytesIO(data), name) == expected.shape[:2]


def turned(data, orientation):
    """Return the upright pixels according to the definition of the orientation in EXIF."""
    opened = PIL.Image.open(io.BytesIO(data))
    pixels = np.asarray(STORED if opened.format == "TIFF" else opened.convert("RGB"))  # Pillow itself turns a TIFF
    flips = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1]}
    if orientation in flips:
        return flips[orientation]
    transposed = pixels.swapaxes(0, 1)
    return {5: transposed, 6: transposed[:, ::-1], 7: transposed[::-1, ::-1], 8: transposed[::-1]}[orientation]


def test_verify_accepts_all_files(built):
    report = rd.verify(built[0], num_workers=0, progress=False)
    assert report.ok, report.problems[:3]
    assert rd.LabelMaps(built[0]).manifest.splits["train"].skipped == []


def test_decode_sample_agrees_for_bytes_and_images_decoded_by_webdataset(built):
    root, expected = built
    tars = sorted(map(str, root.glob("*/*.tar")))
    seen = set()
    for stage in (lambda dataset: dataset, lambda dataset: dataset.decode("pil")):
        for raw in stage(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)):
            sample = rd.decode_sample(raw)
            image, label_map = expected[sample["key"]]
            assert np.array_equal(np.asarray(sample["image"]), np.asarray(image)), sample["key"]
            assert sample["label_map"].canvas_size == label_map.canvas_size
            seen.add(sample["key"])
    assert seen == set(expected)


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("TIFF")])
def test_the_orientation_is_that_of_pillow_where_pillow_has_one(name):
    """Otherwise images that other libraries have rotated would not fit their label maps."""
    opened = PIL.Image.open(io.BytesIO(FILES[name][0]))
    try:
        theirs = PIL.ImageOps.exif_transpose(opened)
    except Exception:  # noqa: BLE001  of EXIF that it cannot read
        theirs = opened
    assert theirs.size == (opened.size if orientation_of(opened) < 5 else opened.size[::-1])
