"""Imports between subpackages point down the list of layers, so that each layer can be used without those above it."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From the lowest layer to the highest.
LAYERS = [
    "_version",
    "compatibility",
    "words",
    "cpus",
    "errors",
    "extras",
    "keywords",
    "devices",
    "naming",
    "schema",
    "labels",
    "storage",
    "shards",
    "data",
    "annotate",
    "analysis",
    "train",
    "report",
    "hub",
    "demo",
    "cli",
]
PACKAGE = ROOT / "relabel_datasets"


def _imports(path: Path) -> set[str]:
    """Return the subpackages, or top-level modules, that a module imports at its top or inside functions."""
    package = path.relative_to(PACKAGE).parts[:-1]
    imports = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            imports |= {(*base, *name.split("."))[0] for name in names}
    return imports


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/**/*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_the_layers(path):
    layer = path.relative_to(PACKAGE).parts[0]
    if path.stem == "__main__":  # the command of a subpackage
        layer = "cli"
    below = LAYERS[: LAYERS.index(layer) + 1]
    assert _imports(path) <= {*below, "_lazy"}
