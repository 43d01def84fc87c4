"""Boxes of JPEGs have the pixels of a full decode, and what is unusual or damaged is decoded by Pillow."""

import io
import threading

import numpy as np
import PIL.Image
import pytest

import relabel_datasets as rd
from relabel_datasets.errors import ImageError
from relabel_datasets.labels.encoded import EncodedImage
from relabel_datasets.shards import encoded_jpeg
from relabel_datasets.shards.encoded_jpeg import box_size, open_image
from tests.conftest import picture
from tests.shards.test_tensor_images import DAMAGED, FILES, WHOLE, encoded

if encoded_jpeg.jpeg_extension() is None:
    pytest.skip("the C extension was not built", allow_module_level=True)

FORMATS = ["pil", "tensor"]
DECODED_WHOLE = {
    "progressive",
    "gray",
    "cmyk",
    "stored-as-rgb",
    "bytes-after-the-end",
    "png",
    "palette",
    "16-bit",
    "webp",
}
DECODED_WHOLE |= {
    name for name in FILES if name.startswith(("411", "440", "orientation")) or name.endswith(("1x1", "1x40", "17x31"))
}
DECODED_WHOLE -= {"orientation-1"}


def pixels_of(image):
    return np.asarray(image) if isinstance(image, PIL.Image.Image) else image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("name", FILES)
def test_usual_jpegs_are_decoded_in_part_and_others_as_a_whole(name, image_format):
    image = open_image(FILES[name], name, image_format)
    assert isinstance(image, EncodedImage) == (name not in DECODED_WHOLE)
    if isinstance(image, EncodedImage):
        assert image.size == pixels_of(image.decode()).shape[:2]
        image = image.decode()
    np.testing.assert_array_equal(pixels_of(image), np.asarray(rd.decode_image(FILES[name])))


@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 3}, {"optimize": True}], ids=str)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 96), (101, 143)])
def test_pixels_of_a_box_at_any_offset_equal_those_of_the_whole_image(subsampling, size, options):
    data = encoded(picture(1, size), quality=95, subsampling=subsampling, **options)
    whole, rng = np.asarray(rd.decode_image(data)), np.random.default_rng(0)
    height, width = size
    boxes = [(top, left, min(7, height - top), min(5, width - left)) for top in range(32) for left in range(32)]
    corners = np.sort(rng.integers(0, [height, width], (50, 2, 2)), axis=1)
    boxes += [(top, left, bottom - top + 1, right - left + 1) for (top, left), (bottom, right) in corners.tolist()]
    image = open_image(data, "image", "tensor")
    for top, left, height, width in boxes:
        part = pixels_of(image.decode_box((top, left, height, width)))
        np.testing.assert_array_equal(part, whole[top : top + height, left : left + width])
    top, left, height, width = boxes[-1]
    part = pixels_of(open_image(data, "image", "pil").decode_box(boxes[-1]))
    np.testing.assert_array_equal(part, whole[top : top + height, left : left + width])


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_images_raise_the_error_of_a_full_decode(name, image_format):
    with pytest.raises(ImageError, match=r"^n01/bad\.JPEG: ") as expected:
        rd.decode_image(DAMAGED[name], "n01/bad.JPEG")
    with pytest.raises(ImageError) as error:
        open_image(DAMAGED[name], "n01/bad.JPEG", image_format).decode_box((0, 0, 1, 1))
    assert str(error.value) == str(expected.value)


def test_damage_that_the_decoder_meets_leaves_the_whole_image_to_pillow():
    middle = len(WHOLE) // 2
    for wrong in (b"\xff\xd9", b"\xff\xc4\xff\xff", b"\x12\x34\x56"):
        data = WHOLE[:middle] + wrong + WHOLE[middle + len(wrong) :]
        try:
            expected = np.asarray(rd.decode_image(data))[-20:]
        except ImageError:
            with pytest.raises(ImageError, match="bad: "):
                open_image(data, "bad", "pil").decode_box((355, 0, 20, 500))
        else:
            np.testing.assert_array_equal(open_image(data, "bad", "pil").decode_box((355, 0, 20, 500)), expected)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_above_the_pixel_limit_are_not_decoded_in_part(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 375 * 500)
    assert box_size(WHOLE) == (375, 500)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 375 * 500 - 1)
    assert box_size(WHOLE) is None


def test_without_libjpeg_turbo_in_pillow_the_extension_is_not_used(monkeypatch):
    monkeypatch.setattr(PIL.features, "check_feature", lambda name: False)
    encoded_jpeg.jpeg_extension.cache_clear()
    try:
        assert box_size(WHOLE) is None
        assert open_image(WHOLE, "image", "pil").size == (500, 375)
    finally:
        encoded_jpeg.jpeg_extension.cache_clear()


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, 0, 0, 5), (0, 0, 5, 1 << 40), (1 << 62, 0, 5, 5)])
def test_the_extension_refuses_boxes_that_cannot_be(box):
    with pytest.raises(ValueError, match="expected a box"):
        encoded_jpeg.jpeg_extension().decode(WHOLE, *box, 3)


@pytest.mark.parametrize("box", [(370, 0, 6, 5), (0, 499, 5, 2), (400, 600, 5, 5)])
def test_the_extension_decodes_no_box_outside_the_image(box):
    assert encoded_jpeg.jpeg_extension().decode(WHOLE, *box, 3) is None


def test_threads_decode_at_the_same_time():
    image, parts = open_image(WHOLE, "image", "tensor"), {}

    def work(number):
        for _ in range(20):
            parts[number] = pixels_of(image.decode_box((number, 10 * number, 200, 100)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = np.asarray(PIL.Image.open(io.BytesIO(WHOLE)))
    for number, part in parts.items():
        np.testing.assert_array_equal(part, whole[number : number + 200, 10 * number : 10 * number + 100])
