"""Convert errors to the one line that the command line prints: what was wrong and what to change."""

from __future__ import annotations

import argparse
import errno
import os
import re
from collections.abc import Mapping

from ..extras import EXTRAS, install_command
from ..storage.redaction import redact_path

_MAX_LENGTH = 1500  # characters
_EXTRAS = {package: extra for extra, package in EXTRAS.items()}
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
_NETWORK_MODULES = {"aiohttp", "botocore", "httpcore", "httpx", "httpx2", "requests", "urllib3"}
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "cannot allocate memory", "killed by signal: killed")
_OUT_OF_SHARED_MEMORY = (
    "killed by signal: bus error",
    "shared memory object </torch",
    "to file </torch",
    "for file </torch",
)
# `epochs=` or `epochs=5` in a message of this package, but not in a path such as data/split=train.
_OTHER_NAMES = {"classes": "classes_file", "name": "config"}  # keyword: option that sets it
_KEYWORD = re.compile(r"(?<![^\s(`])(?P<name>[a-z]\w*)=(?P<value>'[^']*'|[\w.+-]*\w)?(?=[\s,;:.)`]|$)")


def explain(error: BaseException, options: Mapping[str, argparse.Action] = {}) -> str:
    """Convert an error that ends a command to one line, without the name of the command.

    The messages of this package are kept, except that keyword arguments become options: `warmup_epochs=5` becomes
    `--warmup-epochs 5`. Other errors are explained if users can act on them. The rest are shown with their type and the advice
    to look at the traceback.

    Args:
        error: Error to explain.
        options: Options of the command by keyword argument, see `options_of`. Default: none.

    Returns:
        The line to print.
    """
    text = _from_worker(error) or _explain(error)
    text = _KEYWORD.sub(lambda match: _as_typed(match, options), " ".join(text.split()))
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]} ..."


def options_of(parser: argparse.ArgumentParser, command: str | None) -> dict[str, argparse.Action]:
    """Return the options of a command by the keyword arguments that they set.

    Args:
        parser: Parser of the program.
        command: Name of the subcommand, or None for a program without subcommands.
    """
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and command in action.choices:
            return options_of(action.choices[command], None)
    options = {_shown(action).strip("-").replace("-", "_").lower(): action for action in parser._actions}
    for keyword, option in _OTHER_NAMES.items():
        if option in options:
            options.setdefault(keyword, options[option])
    return options


def _shown(action: argparse.Action) -> str:
    """Return an option, or the metavar of a positional argument, as the help text shows it."""
    return next((text for text in action.option_strings if text.startswith("--")), str(action.metavar))


def _as_typed(match: re.Match[str], options: Mapping[str, argparse.Action]) -> str:
    """Return a keyword argument of a message as the option of the command line, if there is one."""
    action, value = options.get(match["name"]), match["value"]
    if action is None:
        return match[0]
    if value is None or (action.nargs == 0 and value == "True"):
        return _shown(action)
    return match[0] if action.nargs == 0 or not action.option_strings else f"{_shown(action)} {value}"


def _from_worker(error: BaseException) -> str | None:
    """Return the original message of an error in a DataLoader worker, the last line of its traceback."""
    text = str(error)
    if "DataLoader worker" not in text or "Traceback" not in text:
        return None
    lines = [line for line in text.splitlines() if line and not line.startswith(" ")]
    return re.sub(r"^(?:\w+\.)*(DatasetError|LabelMapError|ImageError|ValueError|OSError): ", "", lines[-1])


def _explain(error: BaseException) -> str:
    text = str(error)
    if "exited unexpectedly" in text and isinstance(error.__cause__, RuntimeError):
        text = str(error.__cause__)  # torch names the signal that killed a worker in one of the two
    error_type = type(error).__name__
    if error_type == "OutOfMemoryError":
        return f"the GPU is out of memory: lower --batch-size or the image size. {text.partition('. ')[0]}"
    if isinstance(error, RuntimeError) and _is_any_in(_OUT_OF_SHARED_MEMORY, text.lower()):
        return (
            "the DataLoader workers are out of shared memory: enlarge /dev/shm (in a container, such as docker run "
            f"--shm-size=8g), or lower --num-workers or --batch-size ({text.partition('. ')[0]})"
        )
    if text.startswith("DataLoader worker") and text.endswith("exited unexpectedly"):
        return (
            "a DataLoader worker was killed, usually because memory or shared memory ran out: lower --num-workers or "
            f"--batch-size, or enlarge /dev/shm ({text})"
        )
    if isinstance(error, RuntimeError) and text == "can't start new thread":
        return (
            "the system starts no more threads: raise the limit (ulimit -u, or that of the container), or lower --num-workers "
            "and --num-threads"
        )
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _is_any_in(_OUT_OF_MEMORY, text.lower())):
        return f"out of memory: lower --batch-size, the number of workers or the image size ({text or error_type})"
    if isinstance(error, ModuleNotFoundError):
        return _missing_package(error)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return _explain_system_error(error)
    if isinstance(error, OSError) and error.errno is not None:
        return _explain_errno(error)
    if _is_network_error(error):
        return (
            "the network cannot be reached: check the connection and the proxy, or use local files "
            f"({error_type}: {text})"
        )
    if isinstance(error, (ValueError, OSError, ImportError)) and text and not isinstance(error, UnicodeError):
        return text
    return f"unexpected {error_type}: {text or 'no message'}. Run the command with --debug and report the traceback"


def _missing_package(error: ModuleNotFoundError) -> str:
    package = (error.name or "").partition(".")[0]
    if not package or package == "relabel_datasets":
        return f"{error}: reinstall relabel-datasets"
    command = install_command(_EXTRAS[package]) if package in _EXTRAS else f"pip install {package}"
    return f"this needs the Python package {package!r}, which is not installed: {command}"


def _explain_system_error(error: OSError) -> str:
    """Return the message of the operating system about a file, and what to do."""
    path = redact_path(error.filename if isinstance(error.filename, (str, bytes)) else repr(error.filename))
    if error.errno in _DISK_FULL:
        return f"{path} cannot be written, the disk is full: free some space and run the same command again"
    if error.errno in _TOO_MANY_FILES:
        return f"too many open files at {path}: raise the limit of this shell, such as `ulimit -n 4096`"
    advice = {
        errno.ENOENT: "check the path",
        errno.EACCES: "check its permissions",
        errno.EPERM: "check its permissions",
        errno.EROFS: "choose another folder",
        errno.EISDIR: "give a file, not a folder",
        errno.ENOTDIR: "one of the folders in this path is a file",
        errno.EEXIST: "choose another name",
        errno.ENAMETOOLONG: "choose a shorter name",
    }.get(error.errno or 0, "run the command with --debug to see the traceback")
    reason = (error.strerror or type(error).__name__).lower()
    return f"{path}: {reason}: {advice}"


def _explain_errno(error: OSError) -> str:
    """Return the message of an error with an error number but without a path."""
    if error.errno in _TOO_MANY_FILES:
        return "too many open files: raise the limit of this shell, such as `ulimit -n 4096`"
    if _is_network_error(error):
        return f"the network cannot be reached: check the connection and the proxy, or use local files ({error})"
    if error.strerror != os.strerror(error.errno or 0):
        return error.strerror or str(error)  # a message of this package
    if error.errno in _DISK_FULL:
        return "the disk is full: free some space and run the same command again"
    return f"{error.strerror}: run the command with --debug to see the traceback"


def _is_network_error(error: BaseException) -> bool:
    modules = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    is_refused = isinstance(error, ConnectionError) and not isinstance(error, BrokenPipeError)
    return bool(modules & _NETWORK_MODULES) or type(error).__name__ == "URLError" or is_refused


def _is_any_in(parts: tuple[str, ...], text: str) -> bool:
    return any(part in text for part in parts)
