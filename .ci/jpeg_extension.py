"""Build hook of hatchling: compile the C extension `relabel_datasets/shards/_jpeg.c` into the package, if that is possible.

Without a compiler or the headers of libjpeg-turbo, the package is installed without the extension, and decodes JPEGs with Pillow.
`CFLAGS` and `LDFLAGS` may name the folders of the headers and the library.
"""

from __future__ import annotations

import os
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_SOURCE = Path("relabel_datasets", "shards", "_jpeg.c")


class JpegExtension(BuildHookInterface):
    """Hook that adds the compiled extension to the wheel, or to the source tree of an editable installation."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the extension, and mark the wheel as one for this platform and all versions of Python from 3.10 on."""
        for stale in Path(self.root).glob(f"{_SOURCE.with_suffix('')}.*.so"):
            stale.unlink()
        built = _compile(Path(self.root))
        if built is None:
            if os.environ.get("RELABEL_REQUIRE_JPEG_EXTENSION"):
                raise RuntimeError("the C extension was not built, see the output of the compiler above")
            self.app.display_warning("without the C extension: JPEGs are decoded as a whole")
            return
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"cp310-abi3-{platform}"
        build_data["artifacts"].append(f"/{built.relative_to(self.root).as_posix()}")


def _compile(root: Path) -> Path | None:
    """Return the compiled extension next to its source, or None if it cannot be compiled."""
    from setuptools import Distribution, Extension

    name = ".".join(_SOURCE.with_suffix("").parts)
    extension = Extension(name, [str(_SOURCE)], libraries=["jpeg"], py_limited_api=True, optional=True)
    command = Distribution({"ext_modules": [extension]}).get_command_obj("build_ext")
    before = Path.cwd()
    os.chdir(root)
    try:
        with tempfile.TemporaryDirectory() as folder:
            command.build_temp, command.build_lib = folder, str(root)
            command.ensure_finalized()
            command.run()
    finally:
        os.chdir(before)
    return next(root.glob(f"{_SOURCE.with_suffix('')}.*.so"), None)
