"""Run small kernels on the CPU in the calling thread alone.

A parallel kernel ends when the last of its threads does. If other processes keep all cores busy, such as the workers of a loader,
that thread may wait for tens of milliseconds until it is scheduled, for a share of less than a millisecond of work.

`torch.set_num_threads` is no way out: it also sets the number for threads that start later. OpenMP and MKL can set the number for
the calling thread only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

MAX_ELEMENTS = 1 << 20  # about 2 ms of pooling in one thread; larger batches gain more from several threads


@contextmanager
def in_one_thread(num_elements: int) -> Iterator[None]:
    """Run torch's CPU kernels of the calling thread in this thread alone, without changing results or other threads.

    Does nothing for large tensors, and where torch has no OpenMP whose symbols can be found (Windows and macOS).

    Args:
        num_elements: Number of elements of the largest tensor.
    """
    num_threads = torch.get_num_threads()  # also lets torch set up the numbers of this thread
    library = _library() if num_threads > 1 and num_elements <= MAX_ELEMENTS else None
    if library is None:
        yield
        return
    library.omp_set_num_threads(1)
    mkl_threads = library.MKL_Set_Num_Threads_Local(1) if hasattr(library, "MKL_Set_Num_Threads_Local") else None
    try:
        yield
    finally:
        library.omp_set_num_threads(num_threads)
        if mkl_threads is not None:
            library.MKL_Set_Num_Threads_Local(mkl_threads)


@cache
def _library() -> Any:
    """Return torch's library, through which the symbols of its OpenMP and MKL are found, or None."""
    try:
        # Unlike CDLL, PyDLL keeps the GIL during these calls, which take less than a microsecond.
        library = ctypes.PyDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    except OSError:
        return None
    return library if hasattr(library, "omp_set_num_threads") else None
