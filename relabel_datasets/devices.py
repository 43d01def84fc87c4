"""The device to compute on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def find_device(device: str | torch.device | None = None) -> torch.device:
    """Return a device that can be used.

    Args:
        device: Such as `"cuda"`, `"cuda:1"`, `"mps"` or `"cpu"`. Default: the current CUDA device, or the CPU if there is none.

    Raises:
        ValueError: PyTorch does not know the device, or cannot use it on this machine.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        if found.type == "cuda":  # without a context on the first GPU, which each rank would make
            if not 0 <= (found.index or 0) < torch.cuda.device_count():
                raise RuntimeError("PyTorch finds no such GPU")
        else:
            torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # of torch without CUDA, of drivers
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        mps = ["mps"] if torch.backends.mps.is_available() else []
        usable = ", ".join(["cpu", *mps, *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
        raise ValueError(
            f"the device {str(device)!r} of device= cannot be used on this machine: {reason}. Usable devices: {usable}"
        ) from error
    if found.type == "meta":
        raise ValueError("the device 'meta' computes nothing: give cpu or cuda")
    return found


def widest_float(device: torch.device) -> torch.dtype:
    """Return the dtype for sums on a device: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def copy_to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU. The calling thread waits for their device once, however many there are.

    Args:
        tensors: Tensors by name, all on one device. Those on the CPU are returned as they are.

    Returns:
        The tensors on the CPU, in pinned memory if they were on a GPU.
    """
    copies = {name: tensor.to("cpu", non_blocking=tensor.is_cuda) for name, tensor in tensors.items()}
    devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
    for device in devices:
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # the CPU core is free while it waits
        copied.record(torch.cuda.current_stream(device))
        copied.synchronize()
    return copies
