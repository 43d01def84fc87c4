"""Error classes of the package."""

from __future__ import annotations

__all__ = ["DatasetError", "ImageError", "LabelMapError", "MissingExtraError", "RefusedError", "UnavailableError"]


class DatasetError(ValueError):
    """Corrupt, inconsistent or unreadable dataset files."""


class RefusedError(DatasetError):
    """Access refused by a server: credentials are missing or invalid. S3 may also refuse a file that does not exist."""


class UnavailableError(DatasetError):
    """Temporary failure of the Hub or concurrent change of the repository. The same request may succeed later."""


class LabelMapError(ValueError):
    """Invalid bytes of a label map."""


class ImageError(ValueError):
    """Image that cannot be read or decoded."""


class MissingExtraError(ImportError):
    """Optional package that is not installed. The message names the extra that installs it."""
