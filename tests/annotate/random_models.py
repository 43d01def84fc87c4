"""Make models with random weights usable: without this, the activations of some families vanish."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def settle(model: nn.Module, size: tuple[int, int]) -> None:
    """Set the batch norm statistics of a model in evaluation mode to those of random images."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = 1.0
        if (
            norm.weight is not None
        ):  # often initialized with small weights, or with zeros at the end of a residual branch
            norm.weight.fill_(1.0)
    if norms:
        model(torch.randn(2, 3, *size))
        model.eval()
