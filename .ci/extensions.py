"""Build hook of hatchling: compile the C extensions into the package, those that can be compiled.

The package works without them. Without a compiler, label maps are decoded before they are pooled; without a compiler or the headers of
libjpeg-turbo, JPEGs are decoded as a whole. `CFLAGS` and `LDFLAGS` may name the folders of the headers and the library.
"""

from __future__ import annotations

import os
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_EXTENSIONS: Mapping[str, Mapping[str, list[str]]] = {  # module with the options of the compiler
    "relabel_datasets.labels._pooling": {"libraries": ["m"], "extra_compile_args": ["-O3", "-ffp-contract=off"]},
    "relabel_datasets.shards._jpeg": {"libraries": ["jpeg"]},
}


class Extensions(BuildHookInterface):
    """Hook that adds the compiled extensions to the wheel, or to the source tree of an editable installation."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the extensions, and mark the wheel as one for this platform and all versions of Python from 3.10 on."""
        root = Path(self.root)
        for name in _EXTENSIONS:
            for stale in _compiled(root, name):
                stale.unlink()
        _compile(root)
        missing = [name for name in _EXTENSIONS if not _compiled(root, name)]
        if missing:
            message = f"without the C {'extension' if len(missing) == 1 else 'extensions'} {' and '.join(missing)}"
            if os.environ.get("RELABEL_REQUIRE_EXTENSIONS"):
                raise RuntimeError(f"{message}, see the output of the compiler above")
            self.app.display_warning(message)
        if len(missing) == len(_EXTENSIONS):
            return
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"cp310-abi3-{platform}"
        for name in _EXTENSIONS:
            build_data["artifacts"] += [f"/{file.relative_to(root).as_posix()}" for file in _compiled(root, name)]


def _compiled(root: Path, name: str) -> list[Path]:
    """Return the files of a compiled extension, which are next to its source."""
    return list(root.glob(f"{name.replace('.', '/')}.*.so"))


def _compile(root: Path) -> None:
    """Compile the extensions next to their sources. One that cannot be compiled is left out."""
    from setuptools import Distribution, Extension

    modules = [
        Extension(name, [f"{name.replace('.', '/')}.c"], py_limited_api=True, optional=True, **options)
        for name, options in _EXTENSIONS.items()
    ]
    command = Distribution({"ext_modules": modules}).get_command_obj("build_ext")
    before = Path.cwd()
    os.chdir(root)
    try:
        with tempfile.TemporaryDirectory() as folder:
            command.build_temp, command.build_lib = folder, str(root)
            command.ensure_finalized()
            command.run()
    finally:
        os.chdir(before)
