"""Tensors of image files are those of Pillow, with every decoder, and Pillow decides what is damaged."""

import contextlib
import io
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision import tv_tensors

import relabel_datasets as rd
from relabel_datasets.errors import ImageError
from relabel_datasets.shards import tensor_images
from tests.conftest import picture


def encoded(image: PIL.Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(2, (40, 61)), exif=exif)


SIZES = [(1, 1), (1, 40), (17, 31), (64, 48), (375, 500)]
FILES = {
    **{
        f"{name}-{size[0]}x{size[1]}": encoded(picture(0, size), quality=92, subsampling=subsampling)
        for name, subsampling in (("444", "4:4:4"), ("422", "4:2:2"), ("420", "4:2:0"))
        for size in SIZES
    },
    "progressive": encoded(picture(0, (75, 100)), progressive=True),
    "optimized": encoded(picture(0), optimize=True),
    "restart-markers": encoded(picture(0, (75, 100)), restart_marker_blocks=3),
    "restart-rows": encoded(picture(0, (75, 100)), restart_marker_rows=1),
    "stored-as-rgb": encoded(picture(0), keep_rgb=True),
    "gray": encoded(picture(0).convert("L")),
    "cmyk": encoded(picture(0).convert("CMYK")),
    "icc-profile": encoded(picture(0), icc_profile=bytes(70_000)),
    "comment": encoded(picture(0), comment="a comment"),
    **{f"orientation-{orientation}": turned(orientation) for orientation in range(1, 9)},
    "bytes-after-the-end": encoded(picture(0)) + bytes(100),
    "png": encoded(picture(0), "PNG"),
    "palette": encoded(picture(0).quantize(16), "PNG"),
    "16-bit": encoded(PIL.Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27), "PNG"),
    "webp": encoded(picture(0), "WEBP"),
}
with contextlib.suppress(ImportError):  # Pillow cannot write these
    import simplejpeg

    FILES |= {
        subsampling: simplejpeg.encode_jpeg(np.array(picture(0, (75, 100))), colorsubsampling=subsampling)
        for subsampling in ("440", "411")
    }
WHOLE = FILES["420-375x500"]
DAMAGED = {
    "empty": b"",
    "text": b"not an image",
    "no-end-marker": WHOLE[:-2],
    "half-an-end-marker": WHOLE[:-1],
    "cut-near-the-end": WHOLE[:-40],
    "half": WHOLE[: len(WHOLE) // 2],
    "headers-only": WHOLE[:300],
    "first-marker-only": WHOLE[:3],
    "cut-png": encoded(picture(0), "PNG")[:-40],
}
DECODERS = ["simplejpeg", "torchvision"]


@pytest.fixture(params=DECODERS)
def decoder(request, monkeypatch):
    if request.param == "torchvision":
        monkeypatch.setitem(sys.modules, "simplejpeg", None)
    else:
        pytest.importorskip(request.param)
    tensor_images.jpeg_decoder.cache_clear()
    yield request.param
    tensor_images.jpeg_decoder.cache_clear()


@pytest.mark.parametrize("name", FILES)
def test_pixels_equal_those_of_pillow(name, decoder):
    tensor, image = rd.decode_image(FILES[name], image_format="tensor"), rd.decode_image(FILES[name])
    assert type(tensor) is tv_tensors.Image
    assert tensor.dtype == torch.uint8
    np.testing.assert_array_equal(tensor.permute(1, 2, 0).numpy(), np.asarray(image))


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_images_raise_the_error_of_pil_images(name, decoder):
    errors = []
    for image_format in ("pil", "tensor"):
        with pytest.raises(ImageError, match=r"n01/bad\.JPEG") as error:
            rd.decode_image(DAMAGED[name], "n01/bad.JPEG", image_format=image_format)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_bytes_that_are_wrong_give_the_pixels_or_the_error_of_pil_images(decoder):
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(WHOLE)
        for place in rng.integers(2, len(data), 3):
            data[place] = rng.integers(256)
        try:
            expected = np.asarray(rd.decode_image(bytes(data)))
        except ImageError:
            with pytest.raises(ImageError):
                rd.decode_image(bytes(data), image_format="tensor")
        else:
            pixels = rd.decode_image(bytes(data), image_format="tensor").permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(pixels, expected)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [100_000, 50_000])
def test_the_pixel_limit_of_pillow_holds(limit, decoder, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
    height, width = rd.decode_image(WHOLE, image_format="tensor").shape[1:]
    assert (width, height) == rd.decode_image(WHOLE).size
    assert width * height <= 2 * limit
    with pytest.raises(ImageError, match="more than the limit"):
        rd.decode_image(encoded(picture(0, (375, 600)), "PNG"), image_format="tensor")


def test_the_image_format_is_one_of_two():
    with pytest.raises(ValueError, match=r"image_format must be one of \('pil', 'tensor'\), got 'numpy'"):
        rd.decode_image(WHOLE, image_format="numpy")
