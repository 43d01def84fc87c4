"""Ways from label maps to soft labels, which must all agree. Each is a function of label maps and a pooling transform."""

import PIL.Image
import torch
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.labels.compose import run_batch, run_pipeline

from .samples import CANVAS_SIZE

IMAGE = PIL.Image.new("RGB", CANVAS_SIZE[::-1])


def one_by_one(maps, pooling):
    return torch.stack([pooling(label_map) for label_map in maps])


def in_a_pipeline(maps, pooling):
    return torch.stack([run_pipeline(v2.Compose([pooling]), IMAGE, label_map)[1] for label_map in maps])


def in_batches(maps, pooling):
    return torch.stack([label for _, label in run_batch(v2.Compose([pooling]), [(IMAGE, each) for each in maps])])


def collated(maps, pooling):
    return rd.collate(maps).pool(
        pooling.output_size, pooling.temperature, label_weight=pooling.label_weight, calibrated=pooling.calibrated
    )
