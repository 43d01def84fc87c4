"""An opt-in check of shards and indexes that are on disk already: their SHA-256, once in each process that opens them.

Without it, a file that was verified when it was downloaded or built is trusted afterwards as long as its size is right: a bit
that flips on the disk is then served, unless it breaks the label map or the image. The check is set by an environment
variable and not by an argument, so that it reaches the workers and every command.
"""

from __future__ import annotations

import hashlib
import os
from typing import BinaryIO

from ..errors import DatasetError

VARIABLE = "RELABEL_CHECK_ON_OPEN"
_checked: set[tuple[str, int, int, int]] = set()  # inherited by forked workers


def has_other_content(file: BinaryIO, sha256: str) -> bool:
    """Return whether a file has another SHA-256; always False where the check is off or this process has made it already.

    Args:
        file: A file open for reading, at its start; closed after an error.
        sha256: The SHA-256 that it should have, in hex.

    Raises:
        DatasetError: The environment variable is neither 0 nor 1.
        OSError: The file cannot be read.
    """
    try:
        if not is_on():
            return False
        stat = os.fstat(file.fileno())
        identity = sha256, stat.st_dev, stat.st_ino, stat.st_size
        if identity in _checked:
            return False
        actual = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        file.seek(0)
    except BaseException:
        file.close()
        raise
    if actual == sha256:
        _checked.add(identity)
    return actual != sha256


def is_on() -> bool:
    """Return whether `RELABEL_CHECK_ON_OPEN` is 1.

    Raises:
        DatasetError: It is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "0")
    if value not in ("", "0", "1"):
        raise DatasetError(f"the environment variable {VARIABLE} must be 0 or 1, got {value!r}")
    return value == "1"
