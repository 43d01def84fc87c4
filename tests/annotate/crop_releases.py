"""Artificial labels of crops in the formats of FKD and ImageNet+, and the arithmetic of their readers."""

import io

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as nnf
from torchvision.transforms import functional as F

K = {"hard": 1, "smoothing": 1, "marginal_smoothing_k5": 5, "marginal_smoothing_k10": 10, "marginal_renorm": 5}
NUM_CLASSES = 12


def save(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def random_crops(seed, image_size, num_classes=NUM_CLASSES, num_crops=7):
    """Return boxes (top, left, height, width) in whole pixels, flips, and softmax probabilities of all classes."""
    rng = np.random.default_rng(seed)
    height, width = image_size
    sides = np.stack([rng.integers(1, height + 1, num_crops), rng.integers(1, width + 1, num_crops)], 1)
    corners = np.stack([rng.integers(0, height - sides[:, 0] + 1), rng.integers(0, width - sides[:, 1] + 1)], 1)
    logits = 3 * torch.from_numpy(rng.standard_normal((num_crops, num_classes))).float()
    return np.concatenate([corners, sides], 1), rng.random(num_crops) < 0.5, logits.softmax(1)


def fkd_labels(probs, label_type):
    """Return labels as label_quantization of FKD_SLG/generate_soft_label.py computes them."""
    order = probs.argsort(1, descending=True)[:, : K[label_type]]
    if label_type == "hard":
        return order[:, 0].numpy()
    pairs = torch.stack([order.float(), probs.gather(1, order)], 1)
    return (pairs[:, :, 0] if label_type == "smoothing" else pairs).numpy()


def fkd_file(seed, image_size, label_type="marginal_smoothing_k5", dtype=np.float32, num_classes=NUM_CLASSES):
    """Return boxes, flips and labels as FKD's writer stores them."""
    boxes, flips, probs = random_crops(seed, image_size, num_classes)
    labels = fkd_labels(probs, label_type)
    shares = np.stack([np.float32(torch.tensor(box / np.tile(image_size, 2))) for box in boxes])
    return [shares.astype(dtype), flips, labels if label_type == "hard" else labels.astype(dtype)]


def read_fkd_labels(labels, label_type, num_classes=NUM_CLASSES):
    """Return soft labels as Recover_soft_label of FKD's utils_FKD.py computes them."""
    labels = torch.as_tensor(labels)
    if label_type == "hard":
        return torch.zeros(len(labels), num_classes).scatter_(1, labels.view(-1, 1), 1)
    labels = labels.float()
    pairs = labels[:, :, None] if label_type == "smoothing" else labels
    index, value = pairs[:, 0].long(), pairs[:, 1]
    if label_type == "marginal_renorm":
        return nnf.normalize(torch.zeros(len(labels), num_classes).scatter_(1, index, value), p=1.0, dim=1, eps=1e-12)
    rest = (torch.ones(len(labels), 1) - value.sum(1, keepdim=True)) / (num_classes - index.shape[1])
    return rest.repeat(1, num_classes).scatter_(1, index, value)


def read_fkd_crop(image, box, flip, size):
    """Return a crop of an image as RandomResizedCrop_FKD and RandomHorizontalFlip_FKD of FKD's utils_FKD.py cut it out."""
    top, left, height, width = (box[i].item() * image.size[1 - i % 2] for i in range(4))
    crop = F.resized_crop(image, top, left, height, width, [size, size], F.InterpolationMode.BILINEAR)
    return F.hflip(crop) if flip else crop


STEPS = {"uint8": {"enable": True}, "random_resized_crop": {"enable": True, "size": 224}, "random_horizontal_flip": {"p": 0.5},
         "rand_augment": {"enable": False}, "to_tensor": {}, "normalize": {"mean": [0.5], "std": [0.5]}}  # fmt: skip


def plus_config(num_samples=7, steps=STEPS, **more):
    return {
        "seed": None,
        "reinforce": {"num_samples": num_samples, "compress": True, "image_augmentation": steps, **more},
    }


def plus_file(seed, index, image_size, form="compressed", topk=10):
    """Return the content of a file of ImageNet+ as transform_batch and sparsify of apple/ml-dr make it, and its crops."""
    boxes, flips, probs = random_crops(seed, image_size)
    samples = []
    for box, flip, row in zip(boxes.tolist(), flips.tolist(), probs.numpy(), strict=True):
        ids = np.argpartition(row, -topk)[-topk:]
        prob = row.tolist() if form == "dense" else (row[ids].tolist(), ids.tolist())
        second = (0, 0, 9, 9), not flip  # of a second image, which is not mixed in
        params = {
            "uint8": ((), ()),
            "random_resized_crop": (tuple(box), second[0]),
            "random_horizontal_flip": (flip, second[1]),
        }
        samples.append({"params": params if form == "dict" else [tuple(box), flip], "prob": prob})
    return (index, samples), (boxes, flips, probs)


def read_plus_labels(prob, num_classes=NUM_CLASSES):
    """Return a soft label as densify of apple/ml-dr computes it with the method "smooth"."""
    if not isinstance(prob, tuple):
        return torch.tensor(prob)
    values, ids = torch.tensor(prob[0]), prob[1]
    dense = torch.ones(num_classes) * (1.0 - values.sum()) / (num_classes - len(values))
    dense[ids] = values
    return dense


CLASSES = ("cat", "dog", "emu", *(f"other {i}" for i in range(NUM_CLASSES - 3)))


def size_of(path):
    with PIL.Image.open(path) as image:
        return image.height, image.width


def write_fkd(root, image_folder, *arguments):
    """Write a release of FKD for all images of a folder; return the content of the files by key."""
    contents = {}
    for seed, path in enumerate(sorted(image_folder.glob("*/*"))):
        contents[path.stem] = fkd_file(seed, size_of(path), *arguments)
        target = root / path.parent.name / f"{path.stem}.tar"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(save(contents[path.stem]))
    return contents


def write_plus(root, image_folder):
    """Write a release of ImageNet+ for all images of a folder; return the samples of the files by key."""
    root.mkdir()
    (root / "config.pth.tar").write_bytes(save(plus_config()))
    samples = {}
    for index, path in enumerate(sorted(image_folder.glob("*/*"))):
        content, _ = plus_file(index, index, size_of(path))
        samples[path.stem] = content[1]
        (root / f"{index}.pth.tar").write_bytes(save(content, pickle_protocol=4))
    return samples
