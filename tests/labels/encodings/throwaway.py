"""An encoding of another form than those of the package: dense logits in float16, without class indices and base."""

import math

import numpy as np
import torch

from relabel_datasets.errors import LabelMapError
from relabel_datasets.labels.encodings import EncodingEntry, MapEncoding
from relabel_datasets.labels.encodings.base import StoredTensor
from relabel_datasets.labels.encodings.grid_pooling import pool_scales
from relabel_datasets.labels.precision import pooling_dtype

ENTRY = EncodingEntry(
    "plain",
    "tests.labels.encodings.throwaway:Plain",
    "the logits of all classes",
    1,
    "classes to keep per image",
    ("float16",),
)


class Plain(MapEncoding):
    stored_tensors = ("logits",)

    def encode(self, dense, k):
        return {"logits": dense.clone()}

    def check_storable(self, encoded):
        if not torch.isfinite(encoded.logits).all():
            raise ValueError("logits must be finite")

    def store(self, encoded, storage_dtype):
        return {"logits": encoded.logits.half().cpu().numpy()}

    def num_bytes(self, num_classes, k, map_size, storage_dtype):
        return 2 * num_classes * math.prod(map_size)

    def check_header(self, tensors, num_classes):
        shape, dtype = tensors["logits"]
        if len(shape) != 3 or shape[0] != num_classes or dtype != np.float16:
            raise LabelMapError(f"logits must be float16 [{num_classes}, H, W], got {StoredTensor(shape, dtype)}")
        return "float16"

    def decode(self, arrays, num_classes, storage_dtype):
        logits = arrays["logits"].astype(np.float32)
        if not np.isfinite(logits).all():
            raise LabelMapError("logits must be finite, got nan or inf")
        return {"logits": torch.from_numpy(logits)}

    def check(self, logits, arguments, num_classes):
        if arguments or logits.shape[0] != num_classes:
            raise ValueError(f"plain maps are made of logits [{num_classes}, H, W]")
        return {}

    def pool(self, encoded, views, output_size=1, temperature=1.0):
        return pool_scales([encoded], views, _mean_logits, output_size, temperature)

    def dense(self, encoded):
        return encoded.logits.clone()


def _mean_logits(encoded, weights, shape):
    weights = weights if isinstance(weights, torch.Tensor) else weights.product()
    logits = encoded.logits.to(pooling_dtype(encoded.logits))
    return (weights.to(logits.dtype) @ logits.flatten(2).mT).reshape(shape)
