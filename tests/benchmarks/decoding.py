"""Measure decoders of JPEGs: decode an image and resize a random crop of it to 224x224 pixels.

    python tests/benchmarks/decoding.py IMAGES

IMAGES is an ImageFolder or WebDataset tars. The crops are drawn beforehand. The decoders take turns, in one process and one thread,
and the CPU time of each round is measured. Images other than upright RGB JPEGs are left out. The difference of pixels is that
of the resized crops.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Callable

import PIL.Image
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from relabel_datasets.data.sources import open_source
from relabel_datasets.labels.encoded import EncodedImage
from relabel_datasets.shards import tensor_images
from relabel_datasets.shards.encoded_jpeg import jpeg_extension, open_image
from relabel_datasets.shards.images import ImageFormat

SIZE = [224, 224]
Box = tuple[int, int, int, int]
Decoder = Callable[[bytes, Box], Tensor]


def with_pillow(data: bytes, box: Box) -> Tensor:
    return F.pil_to_tensor(F.resized_crop(PIL.Image.open(io.BytesIO(data)), *box, SIZE))


def of_whole(decode: Callable[[bytes], Tensor]) -> Decoder:
    return lambda data, box: F.resized_crop(decode(data), *box, SIZE)


def of_box(image_format: ImageFormat) -> Decoder:
    def decode(data: bytes, box: Box) -> Tensor:
        image = open_image(data, "image", image_format)
        part = image.decode_box(box) if isinstance(image, EncodedImage) else F.crop(image, *box)
        resized = F.resize(part, SIZE)
        return F.pil_to_tensor(resized) if image_format == "pil" else resized

    return decode


def decoders() -> dict[str, Decoder]:
    """Return the decoders that are installed."""
    found: dict[str, Decoder] = {
        "Pillow": with_pillow,
        "torchvision, tensor": of_whole(tensor_images._torchvision()),
    }
    with contextlib.suppress(ImportError):
        found["simplejpeg, tensor"] = of_whole(tensor_images._simplejpeg())
    if jpeg_extension() is not None:
        found |= {"only the box, PIL image": of_box("pil"), "only the box, tensor": of_box("tensor")}
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="ImageFolder or WebDataset tars")
    parser.add_argument("--num-images", type=int, default=200, help="number of images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds per decoder (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    source = open_source(args.images)
    files = [source.read(i) for i in range(min(args.num_images, len(source.keys)))]
    files = [data for data in files if tensor_images.is_plain_jpeg(data)]
    crop, boxes = v2.RandomResizedCrop(SIZE), []
    for data in files:
        width, height = PIL.Image.open(io.BytesIO(data)).size
        params = crop.make_params([torch.empty(()).expand(3, height, width)])
        boxes.append((params["top"], params["left"], params["height"], params["width"]))
    pairs = list(zip(files, boxes, strict=True))
    expected, times = [with_pillow(*pair).int() for pair in pairs], {}
    for _ in range(args.rounds):
        for name, decode in decoders().items():
            start = time.process_time()
            for pair in pairs:
                decode(*pair)
            times.setdefault(name, []).append((time.process_time() - start) / len(pairs))
    print("| decoder | ms per image | speed relative to Pillow | largest difference of pixels |")
    print("| --- | ---: | ---: | ---: |")
    for name, decode in decoders().items():
        ratio = statistics.median(a / b for a, b in zip(times["Pillow"], times[name], strict=True))
        largest = max(int((decode(*pair).int() - want).abs().max()) for pair, want in zip(pairs, expected, strict=True))
        print(f"| {name} | {1e3 * statistics.median(times[name]):.2f} | {ratio:.2f} | {largest} |")


if __name__ == "__main__":
    main()
