"""Optional check of the SHA-256 of shards and indexes on disk, once per process that opens them.

Files are verified when they are downloaded or built. Afterwards only their size is checked, so a bit that flips on the disk
goes unnoticed unless it breaks a label map or an image. The check is enabled by an environment variable instead of an argument,
so that it reaches the workers and every command.
"""

from __future__ import annotations

import os
from typing import BinaryIO

from ..compatibility import sha256_digest
from ..errors import DatasetError

VARIABLE = "RELABEL_CHECK_ON_OPEN"
_checked: set[tuple[str, int, int, int]] = set()  # inherited by forked workers


def has_other_content(file: BinaryIO, sha256: str) -> bool:
    """Compare the SHA-256 of a file, if the check is on and this process has not verified the file yet.

    Args:
        file: File open for reading, at its start. It is closed if an error is raised.
        sha256: Expected SHA-256, in hex.

    Returns:
        True if the SHA-256 differs. False if it is equal or was not compared.

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
        actual = sha256_digest(file).hexdigest()
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
