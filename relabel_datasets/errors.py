"""Every error class of the package."""

from __future__ import annotations

__all__ = ["DatasetError", "ImageError", "LabelMapError", "RefusedError", "UnavailableError"]


class DatasetError(ValueError):
    """Corrupt, inconsistent or unreadable dataset files."""


class RefusedError(DatasetError):
    """A server refused access: credentials are missing or invalid. S3 may answer so for a file that does not exist."""


class UnavailableError(DatasetError):
    """A temporary failure of the Hub, or a concurrent change of the repository: the same request may succeed later."""


class LabelMapError(ValueError):
    """Bytes that are not a valid label map."""


class ImageError(ValueError):
    """Bytes that cannot be decoded as an image."""
