"""What DataLoader workers need before they start: short paths of sockets, and a fork server with imported libraries."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import multiprocessing.util
import os
import sys
from typing import Any

# Libraries that unpickling a dataset and its transforms may import. The server imports those that this process has imported.
_LIBRARIES = ("torch", "torchvision.transforms.v2", "timm.data", "datasets", "webdataset")
_MAX_FOLDER = 89  # bytes: the path of a socket has at most 107, and the name in the folder 18


def check_temp_folder() -> None:
    """Check that workers can open the sockets through which they send tensors. They are in the temporary folder.

    Raises:
        ValueError: The path of the temporary folder is too long. A DataLoader would wait for its workers without end.
    """
    from torch import multiprocessing as torch_multiprocessing  # heavy

    if torch_multiprocessing.get_sharing_strategy() != "file_descriptor":  # type: ignore[no-untyped-call]
        return  # without sockets, such as on macOS
    folder = multiprocessing.util.get_temp_dir()  # in some versions of Python, another one if TMPDIR is long
    num_bytes = len(os.fsencode(folder))
    if num_bytes > _MAX_FOLDER:
        parent = os.path.dirname(folder)  # noqa: PTH120  a string
        max_bytes = _MAX_FOLDER - (num_bytes - len(os.fsencode(parent)))
        raise ValueError(
            f"the path of the temporary folder {parent} is too long for the sockets of DataLoader workers: set the environment "
            f"variable TMPDIR to a folder whose path has at most {max_bytes} bytes, or use num_workers=0"
        )


def prepare_workers(context: Any) -> None:
    """Start the fork server, if workers come from it, with the modules that they need.

    Otherwise every worker imports torch and torchvision when it starts, in every epoch, which takes seconds. The server imports
    them once, while this process prepares its model. It starts here only if it is not running, and keeps the modules that the
    program chose with `multiprocessing.set_forkserver_preload`.

    Args:
        context: `multiprocessing_context` of a DataLoader: a context, or None for the default.
    """
    if getattr(multiprocessing.process.current_process(), "_inheriting", False):
        return  # a worker or the server is importing a main module that makes a loader
    method = (context or multiprocessing).get_start_method(allow_none=True)
    if (method or multiprocessing.get_all_start_methods()[0]) != "forkserver":
        return
    from multiprocessing import forkserver  # not on Windows

    chosen = getattr(forkserver._forkserver, "_preload_modules", None) or []
    forkserver.set_forkserver_preload(list(dict.fromkeys([*chosen, *_modules()])))
    forkserver.ensure_running()


def _modules() -> list[str]:
    package = __name__.partition(".")[0]
    own = [name for name in sys.modules if name.startswith(f"{package}.") and "__main__" not in name]
    return [*(name for name in _LIBRARIES if name in sys.modules), *own]
