"""Files that operating systems and programs leave beside images, and that are no part of a dataset."""

from __future__ import annotations

_FOLDERS = frozenset(
    {
        "__MACOSX",  # of archives that macOS made
        "@eaDir",  # thumbnails of Synology
        "$RECYCLE.BIN",
        "System Volume Information",
        "lost+found",
        "__pycache__",
    }
)
_FILES = frozenset({"thumbs.db", "desktop.ini"})  # in lower case


def is_clutter(path: str) -> bool:
    """Return whether a path is of a file or folder to ignore silently: hidden ones, by a dot, and those of file managers.

    AppleDouble files (`._photo.jpg`) and `.ipynb_checkpoints` are hidden.

    Args:
        path: Relative, with forward slashes; its components may be `.` and `..`.
    """
    return any(map(is_clutter_name, path.split("/")))


def is_clutter_name(name: str) -> bool:
    """Return whether one component of a path is to be ignored, see `is_clutter`."""
    return (name.startswith(".") and name not in (".", "..")) or name in _FOLDERS or name.lower() in _FILES
