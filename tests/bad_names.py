"""Names that no dataset may have, and what tests of them share."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

# Refused as a config, as a split and as a file name.
BAD_NAMES = {
    "empty": "",
    "dot": ".",
    "dots": "..",
    "parent": "../x",
    "far parent": "../../x",
    "within": "a/../../x",
    "absolute": "/tmp/x",
    "slash": "a/b",
    "trailing slash": "a/",
    "backslash": "a\\b",
    "Windows parent": "..\\x",
    "drive": "C:x",
    "newline": "a\nb",
    "final newline": "a\n",
    "tab": "a\tb",
    "NUL": "a\0b",
    "escape sequence": "a\x1b[31m",
    "hidden": ".hidden",
    "option": "-rf",
    "device": "nul",
    "device in capitals": "CON",
    "device with an extension": "aux.txt",
    "numbered device": "com1",
    "final dot": "end.",
    "space": "a b",
    "glob": "a*",
    "brackets": "[ab]",
    "braces": "{0..9}",
    "home": "~root",
    "variable": "$HOME",
    "encoded parent": "%2e%2e",
    "query": "a?b=c",
    "fragment": "a#b",
    "URL": "https://host/x",
    "pipe": "a|b",
    "backtick": "a`b",
    "quote": 'a"b',
    "template": "{{7*7}}",
    "full-width slash": "a\uff0fb",
    "dot leader": "\u2025",
    "right to left": "a\u202eb",
    "zero width": "a\u200bb",
    "accent": "é",
    "lone surrogate": "a\udc80",
    "too long": "x" * 256,
}
BAD_CONFIGS = {**BAD_NAMES, "card": "README.md", "card in capitals": "readme.MD", "manifest": "_info.json"}
BAD_SPLITS = {**BAD_NAMES, "dash": "a-b", "two dots": "a..b", "all": "all", "All": "All"}
BAD_FILES = {**BAD_NAMES, "another extension": "train-00000-of-00001.zip", "only the extension": ".tar"}
BAD_SHA256 = {
    "empty": "", "short": "0" * 63, "long": "0" * 65, "capitals": "A" * 64, "parent": "../" * 21 + "x", "newline": "0" * 64 + "\n",
    "other digits": "\u0661" * 64, "number": 7, "null": None,
}  # fmt: skip
BAD_KEYS = {
    "empty": "", "absolute": "/a", "parent": "../a", "dot": "a.b", "empty part": "a//b", "trailing slash": "a/", "newline": "a\nb",
    "NUL": "a\0", "escape sequence": "\x1b]0;x\x07", "C1 control": "\x9b1m", "backslash": "..\\a", "line separator": "a\u2028b",
    "lone surrogate": "a\udcff", "too long": "x" * 4097,
}  # fmt: skip


def snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """Return everything below a folder: kind, content, and time of the last change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        content = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = (stat.st_mode, content, None if path.is_dir() else stat.st_mtime_ns)
    return found


def change_manifest(path: Path, change: Any) -> None:
    """Change the content of a manifest, with a checksum that fits."""
    content = json.loads(path.read_text())
    del content["checksum"]
    change(content)
    content["checksum"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))
