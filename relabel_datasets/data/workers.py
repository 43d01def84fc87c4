"""Let workers that multiprocessing's fork server starts begin as fast as forked ones."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import sys
from typing import Any

# Libraries that unpickling a dataset and its transforms may import. The server imports those that this process has imported.
_LIBRARIES = ("torch", "torchvision.transforms.v2", "timm.data", "datasets", "webdataset")


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
