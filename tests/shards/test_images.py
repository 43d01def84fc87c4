import io

import numpy as np
import PIL.Image
import pytest

from relabel_datasets.data.folder_scan import scan_image_folder
from relabel_datasets.errors import ImageError
from relabel_datasets.shards.images import (
    decode_image,
    decode_reduced,
)
from tests.conftest import picture


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def assert_close(image: PIL.Image.Image, expected: PIL.Image.Image, tolerance: float = 0) -> None:
    assert image.mode == "RGB"
    assert image.size == expected.size
    assert np.abs(np.asarray(image, float) - np.asarray(expected.convert("RGB"), float)).max() <= tolerance


GREY = picture(1).convert("L")
DEEP = np.asarray(GREY).astype(np.uint16) * 257  # the same picture in 16 bits


@pytest.mark.parametrize(
    ("data", "expected", "tolerance"),
    [
        pytest.param(encoded(picture(0)), picture(0), 0, id="png"),
        pytest.param(encoded(picture(0), "JPEG", quality=98), picture(0), 12, id="jpeg"),
        pytest.param(encoded(picture(0), "WEBP", lossless=True), picture(0), 0, id="webp"),
        pytest.param(encoded(picture(0), "BMP"), picture(0), 0, id="bmp"),
        pytest.param(encoded(picture(0).convert("CMYK"), "JPEG", quality=98), picture(0), 16, id="cmyk-jpeg"),
        pytest.param(encoded(picture(0).convert("CMYK"), "TIFF"), picture(0), 1, id="cmyk-tiff"),
        pytest.param(encoded(GREY, "JPEG", quality=98), GREY, 6, id="grey-jpeg"),
        pytest.param(encoded(GREY), GREY, 0, id="grey-png"),
        pytest.param(encoded(PIL.Image.fromarray(DEEP)), GREY, 0, id="16-bit-png"),
        pytest.param(encoded(PIL.Image.fromarray(DEEP.astype(np.int32)), "TIFF"), GREY, 0, id="32-bit-tiff"),
        pytest.param(encoded(GREY.convert("1")), GREY.convert("1"), 0, id="black-and-white"),
        pytest.param(encoded(picture(0).quantize(256)), picture(0).quantize(256), 0, id="palette"),
        pytest.param(encoded(picture(0).quantize(256), "GIF"), picture(0).quantize(256), 0, id="gif"),
        pytest.param(encoded(picture(0).convert("RGBA")), picture(0), 0, id="rgba"),
        pytest.param(encoded(GREY.convert("LA")), GREY, 0, id="grey-alpha"),
    ],
)
def test_formats_and_modes_are_converted_to_the_same_rgb(data, expected, tolerance):
    assert_close(decode_image(data), expected, tolerance)


def test_a_palette_with_transparent_entries_is_read():
    data = encoded(picture(0).quantize(16), transparency=bytes(range(0, 256, 16)))
    assert_close(decode_image(data), picture(0).quantize(16))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_rotation_is_applied(orientation, mode, kind):
    upright = picture(3, (20, 30)).convert(mode)
    undo = {  # how a camera would have stored the upright picture under each orientation
        2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
        3: PIL.Image.Transpose.ROTATE_180,
        4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
        5: PIL.Image.Transpose.TRANSPOSE,
        6: PIL.Image.Transpose.ROTATE_90,
        7: PIL.Image.Transpose.TRANSVERSE,
        8: PIL.Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    assert_close(decode_image(encoded(stored, kind, exif=exif)), upright)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize(("target", "share"), [((19, 30), 4), ((38, 60), 2), ((76, 120), 1), ((38, 20), 2), (None, 1)])
def test_a_large_jpeg_may_be_decoded_at_reduced_size(mode, orientation, target, share):
    """It is upright, at least twice as large as the target, and nearly the same after resizing."""
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(0, (160, 250)).convert(mode), "JPEG", quality=95, exif=exif)
    whole = decode_image(data)
    reduced, size = decode_reduced(data, target if target is None or orientation < 5 else target[::-1])
    assert size == (whole.height, whole.width)
    assert reduced.size == (-(-whole.width // share), -(-whole.height // share))
    assert_close(reduced.resize((30, 19)), whole.resize((30, 19)), 10)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF"])
def test_other_formats_are_decoded_at_full_size(kind):
    data = encoded(picture(0, (160, 250)), kind)
    image, size = decode_reduced(data, (8, 8))
    assert size == (image.height, image.width) == (160, 250)


JPEG = encoded(picture(0), "JPEG")


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", JPEG[: len(JPEG) // 2], JPEG[:20], encoded(picture(0))[:-40]],
    ids=["empty", "text", "half-a-jpeg", "header-only", "cut-png"],
)
def test_damaged_images_raise_an_error_that_names_the_file(data):
    with pytest.raises(ImageError, match=r"n01/bad\.JPEG"):
        decode_image(data, "n01/bad.JPEG")
    with pytest.raises(ImageError, match=r"n01/bad\.JPEG"):
        decode_reduced(data, (5, 7), "n01/bad.JPEG")


def test_float_pixels_are_refused():
    with pytest.raises(ImageError, match="float pixels"):
        decode_image(encoded(PIL.Image.fromarray(np.zeros((4, 5), np.float32)), "TIFF"))


def test_scanning_finds_what_torchvision_finds(image_folder):
    from torchvision.datasets import ImageFolder

    (image_folder / "dog" / "deeper").mkdir()
    picture(50).save(image_folder / "dog" / "deeper" / "more.PNG")
    (image_folder / "dog" / "notes.txt").write_text("not an image")
    classes, files = scan_image_folder(image_folder)
    reference = ImageFolder(image_folder)
    assert list(classes) == reference.classes
    assert {(str(image_folder / file.path), file.label) for file in files} == set(reference.samples)
    assert files == sorted(files, key=lambda file: (file.label, file.path))


def test_missing_folders_and_empty_classes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        scan_image_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no class folders"):
        scan_image_folder(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match="cat"):
        scan_image_folder(tmp_path)
