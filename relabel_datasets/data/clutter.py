"""Files of operating systems and file managers in folders of images, which are not part of a dataset."""

from __future__ import annotations

_FOLDERS = frozenset(
    {
        "__MACOSX",  # in archives made by macOS
        "@eaDir",  # thumbnails of Synology
        "$RECYCLE.BIN",
        "System Volume Information",
        "lost+found",
        "__pycache__",
    }
)
_FILES = frozenset({"thumbs.db", "desktop.ini"})  # in lower case


def is_clutter(path: str) -> bool:
    """Return whether a file or folder is ignored silently: hidden ones (with a leading dot) and those of file managers.

    AppleDouble files (`._photo.jpg`) and `.ipynb_checkpoints` are hidden.

    Args:
        path: Relative path with forward slashes. Components may be `.` and `..`.
    """
    return any(map(is_clutter_name, path.split("/")))


def is_clutter_name(name: str) -> bool:
    """Return whether one component of a path is ignored, see `is_clutter`."""
    return (name.startswith(".") and name not in (".", "..")) or name in _FOLDERS or name.lower() in _FILES
