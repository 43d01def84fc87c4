"""Weights of a frozen network in low precision, cast once.

Autocast casts the weights of convolutions and matrix products in every forward pass. It keeps a cast for later only if the weight
requires gradients, and those of annotators do not.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

logger = logging.getLogger(__name__)
_TOLERANCE = 1e-2  # relative to the largest logit; kernels may differ by rounding, a network that was not copied right by far more


def cast_weights(module: nn.Module, dtype: torch.dtype, run: Callable[[nn.Module, int], Tensor]) -> nn.Module:
    """Return a copy of a frozen network in which all weights that autocast would cast are cast already.

    Under autocast, the copy returns the bits that the network returns. Weights that any operation uses in their own dtype, such as those
    of norms and standardized convolutions, and position embeddings, are not cast. The copy shares them with the network, which is not
    changed.

    Args:
        module: Network whose weights do not require gradients.
        dtype: Dtype of autocast.
        run: Function that runs a network under autocast, and returns its logits for random images of a seed.

    Returns:
        The copy, or the network itself if it cannot be copied.
    """
    tensors = list(chain(module.parameters(), module.buffers()))
    with _Recorder(tensors, dtype) as recorder:
        run(module, 0)
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    for tensor in tensors:
        if id(tensor) in recorder.cast - recorder.used:
            cast = tensor.detach().to(dtype)
            memo[id(tensor)] = nn.Parameter(cast, requires_grad=False) if isinstance(tensor, nn.Parameter) else cast
    try:
        copied = copy.deepcopy(module, memo)
        # Of other images: a hook or a function of the network may still refer to the original, and to its features.
        logits, expected = run(copied, 1), run(module, 1)
        is_same = bool((logits - expected).abs().max() <= _TOLERANCE * expected.abs().max())
    except Exception as error:
        is_same = False
        logger.debug("%s", error, exc_info=True)
    if not is_same:
        logger.info("%s cannot be copied: its weights are cast in every forward pass", type(module).__name__)
    return copied if is_same else module


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Recorder of which tensors are cast to a dtype, and which are used in any other way.

    Attributes:
        cast: Ids of tensors that were cast.
        used: Ids of tensors that an operation used as they are.
    """

    def __init__(self, tensors: Iterable[Tensor], dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {id(tensor) for tensor in tensors}
        self._dtype = dtype
        self.cast: set[int] = set()
        self.used: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_cast = func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is self._dtype
        known = {id(leaf) for leaf in tree_leaves((args, kwargs)) if id(leaf) in self._known}
        (self.cast if is_cast else self.used).update(known)
        return func(*args, **kwargs)
