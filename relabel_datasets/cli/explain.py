"""Errors as the command line shows them: one line that says what was wrong and what to change."""

from __future__ import annotations

import errno
import os
import re

from ..storage.redaction import redact_path

_MAX_LENGTH = 1500  # characters
_EXTRAS = {"ray": "ray", "s3fs": "s3", "tensorboard": "tensorboard", "transformers": "hf"}
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
_NETWORK_MODULES = {"aiohttp", "botocore", "httpcore", "httpx", "httpx2", "requests", "urllib3"}
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "cannot allocate memory")


def explain(error: BaseException) -> str:
    """Return what to print for an error that ends a command: one line, without the name of the command.

    Errors of this package are printed as they are. Of other errors, those that users can act on are explained, and the rest
    are printed with their type and the advice to look at the traceback.
    """
    text = _from_worker(error) or _explain(error)
    text = " ".join(text.split())
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]} ..."


def _from_worker(error: BaseException) -> str | None:
    """Return the last line of the traceback that torch makes the message of an error in a DataLoader worker."""
    text = str(error)
    if "DataLoader worker" not in text or "Traceback" not in text:
        return None
    lines = [line for line in text.splitlines() if line and not line.startswith(" ")]
    return re.sub(r"^(?:\w+\.)*(DatasetError|LabelMapError|ImageError|ValueError|OSError): ", "", lines[-1])


def _explain(error: BaseException) -> str:
    text = str(error)
    kind = type(error).__name__
    if kind == "OutOfMemoryError":
        return f"the GPU is out of memory: lower --batch-size or the image size. {text.partition('. ')[0]}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _is_any_in(_OUT_OF_MEMORY, text.lower())):
        return f"out of memory: lower --batch-size, the number of workers or the image size ({text or kind})"
    if isinstance(error, ModuleNotFoundError):
        return _missing_package(error)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return _explain_system_error(error)
    if isinstance(error, OSError) and error.errno is not None:
        return _explain_errno(error)
    if _is_of_network(error):
        return f"the network cannot be reached: check the connection and the proxy, or use local files ({kind}: {text})"
    if isinstance(error, (ValueError, OSError, ImportError)) and text and not isinstance(error, UnicodeError):
        return text
    return f"unexpected {kind}: {text or 'no message'}. Run the command with --debug and report the traceback"


def _missing_package(error: ModuleNotFoundError) -> str:
    package = (error.name or "").partition(".")[0]
    if not package or package == "relabel_datasets":
        return f"{error}: install relabel-datasets again"
    what = f'"relabel-datasets[{_EXTRAS[package]}]"' if package in _EXTRAS else package
    return f"this needs the Python package {package!r}, which is not installed: pip install {what}"


def _explain_system_error(error: OSError) -> str:
    """Return what the operating system says of a file, and what to do."""
    path = redact_path(error.filename if isinstance(error.filename, (str, bytes)) else repr(error.filename))
    if error.errno in _DISK_FULL:
        return f"{path} cannot be written, the disk is full: free some space and run the same command again"
    if error.errno in _TOO_MANY_FILES:
        return f"too many open files at {path}: raise the limit of this shell, such as `ulimit -n 4096`"
    advice = {
        errno.ENOENT: "check the path",
        errno.EACCES: "check who may read and write it",
        errno.EPERM: "check who may read and write it",
        errno.EROFS: "choose another folder",
        errno.EISDIR: "give a file, not a folder",
        errno.ENOTDIR: "one of the folders in this path is a file",
        errno.EEXIST: "choose another name",
        errno.ENAMETOOLONG: "choose a shorter name",
    }.get(error.errno or 0, "run the command with --debug for the place")
    reason = (error.strerror or type(error).__name__).lower()
    return f"{path}: {reason}: {advice}"


def _explain_errno(error: OSError) -> str:
    """Return the message of an error with an error number but without a path."""
    if error.errno in _TOO_MANY_FILES:
        return "too many open files: raise the limit of this shell, such as `ulimit -n 4096`"
    if _is_of_network(error):
        return f"the network cannot be reached: check the connection and the proxy, or use local files ({error})"
    if error.strerror != os.strerror(error.errno or 0):
        return error.strerror or str(error)  # a message of this package
    if error.errno in _DISK_FULL:
        return "the disk is full: free some space and run the same command again"
    return f"{error.strerror}: run the command with --debug for the place"


def _is_of_network(error: BaseException) -> bool:
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    is_refused = isinstance(error, ConnectionError) and not isinstance(error, BrokenPipeError)
    return bool(modules & _NETWORK_MODULES) or type(error).__name__ == "URLError" or is_refused


def _is_any_in(texts: tuple[str, ...], text: str) -> bool:
    return any(each in text for each in texts)
