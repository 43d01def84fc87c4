"""Docstrings: parameter descriptions are complete phrases, and public functions say what they return."""

import ast
import inspect
import re
from importlib import import_module

import pytest

from tests.conftest import ROOT

MODULES = sorted((ROOT / "relabel_datasets").rglob("*.py"))
SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Yields", "Example", "Reference", "Note")
# Words that continue the name of a parameter instead of describing it.
FRAGMENTS = {
    "after", "as", "at", "before", "by", "for", "from", "how", "in", "of", "on", "that", "to", "what", "where", "which",
    "whose", "with",
}  # fmt: skip
ARCHAIC = re.compile(r"\b(anew|so many|whoever|for ever|is told|are told|goes on|gone on|nobody waits)\b")
SUBPACKAGES = ("analysis", "annotate", "data", "labels", "report", "shards", "storage", "train")


def _docstrings(path):
    """Yield the name and the docstring of everything in a module that has one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
            node
        ):
            yield getattr(node, "name", path.stem), ast.get_docstring(node)


def _descriptions(docstring):
    """Yield the parameters and attributes that a docstring describes, with the first words of their descriptions."""
    for section in ("Args", "Attributes"):
        text = re.split(
            rf"^(?:{'|'.join(SECTIONS)}):", docstring.partition(f"\n{section}:\n")[2], maxsplit=1, flags=re.M
        )[0]
        yield from re.findall(r"^ {4}\*{0,2}(\w+): (\S+)", text, flags=re.M)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_descriptions_of_parameters_stand_alone(path):
    wrong = [
        f"{name}: {parameter}: {first} ..."
        for name, docstring in _docstrings(path)
        for parameter, first in _descriptions(docstring)
        if first.lower() in FRAGMENTS or first[0].islower()
    ]
    assert wrong == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_words_are_plain(path):
    assert ARCHAIC.findall(path.read_text(encoding="utf-8")) == []


def _public_functions():
    """Yield the public functions, and the public methods of public classes, with their full names."""
    for package in ("relabel_datasets", *(f"relabel_datasets.{name}" for name in SUBPACKAGES)):
        module = import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                yield f"{package}.{name}", value


def test_public_functions_that_return_something_say_what():
    missing = [
        name
        for name, function in _public_functions()
        if inspect.signature(function).return_annotation not in ("None", None, inspect.Signature.empty)
        and not re.search(r"^(Returns|Yields):", inspect.getdoc(function) or "", flags=re.M)
    ]
    assert missing == []
