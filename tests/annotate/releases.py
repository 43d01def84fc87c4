"""Artificial label maps in the formats of ReLabel and TokenLabeling."""

import io
import tarfile

import torch

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import ModuleAnnotator
from tests.conftest import ColourNet

CLASSES = ("cat", "dog", "emu")
DTYPES = {"relabel": torch.float32, "tokenlabeling": torch.float16}


def publish(dense, k=2, order="hw", source_format="relabel"):
    """Convert dense logits `[C, H, W]` to the format of a release, `[2, K, H, W]` or `[2, K, W, H]`."""
    scores, indices = dense.topk(k, dim=0)
    tensor = torch.stack([scores, indices.float()]).to(DTYPES[source_format])
    return tensor if order == "hw" else tensor.mT.contiguous()


def dense_of(tensor, num_classes, order="hw"):
    """Return dense logits `[C, H, W]` as get_labelmaps of https://github.com/naver-ai/relabel_imagenet computes them."""
    tensor = tensor.float() if order == "hw" else tensor.float().mT
    return torch.zeros(num_classes, *tensor.shape[2:]).scatter_(0, tensor[1].long(), tensor[0])


def random_map(seed, size=(5, 7), num_classes=3):
    logits = 10 * torch.randn(num_classes, *size, generator=torch.Generator().manual_seed(seed))
    return logits.half().float()


def save(tensor, **options):
    buffer = io.BytesIO()
    torch.save(tensor, buffer, **options)
    return buffer.getvalue()


def write_release(root, image_folder, tensor_of):
    """Write a release with maps of all images of a folder; return the tensors by key."""
    tensors = {}
    for i, path in enumerate(sorted(image_folder.glob("*/*"))):
        tensors[path.stem] = tensor_of(i, path)
        target = root / path.parent.name / f"{path.stem}.pt"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(save(tensors[path.stem]))
    return tensors


def annotated_release(root, image_folder, size, order):
    """Write a release of another annotator with another input size."""
    other = ModuleAnnotator(ColourNet(), size, classes=CLASSES)

    def tensor_of(_, path):
        image = rd.decode_image(path.read_bytes())
        return publish(other(other.preprocess(image)[None])[0], order=order)

    write_release(root, image_folder, tensor_of)
    return rd.annotate.PublishedMaps(root, "relabel")


def run(release, root, source_format="relabel", classes=None, **options):
    maps = rd.annotate.PublishedMaps(release, source_format, classes)
    return rd.annotate.import_label_maps(maps, root, **{"order": "hw", "progress": False, **options})


def pack(release, path, *, prefix="relabel_imagenet/", mode="w"):
    with tarfile.open(path, mode) as tar:
        tar.add(release, prefix.rstrip("/"))
    return path
