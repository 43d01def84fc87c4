"""Random weights that behave: without this, the activations of some families fade to nothing."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def settle(model: nn.Module, size: tuple[int, int]) -> None:
    """Give the batch norms of a model in evaluation mode the statistics of random images."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = 1.0
        if norm.weight is not None:  # some begin with nearly none, the last of a residual branch with none
            norm.weight.fill_(1.0)
    if norms:
        model(torch.randn(2, 3, *size))
        model.eval()
