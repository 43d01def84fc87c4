"""Dataclasses as options of a command line: one for each field, with the help that the docstring has."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import types
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def add_options(parser: argparse.ArgumentParser, cls: type, title: str, leave_out: tuple[str, ...] = ()) -> None:
    """Add an option for each field of a dataclass; those that are not given are not set in the namespace."""
    group = parser.add_argument_group(title)
    hints, helps = get_type_hints(cls), _attribute_texts(cls)
    for each in fields(cls):
        if each.name in leave_out:
            continue
        flag, text = f"--{each.name.replace('_', '-')}", helps[each.name].replace("%", "%%")
        common: dict[str, Any] = {"dest": each.name, "default": argparse.SUPPRESS, "help": text}
        kind = hints[each.name]
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif get_origin(kind) is Literal:
            group.add_argument(flag, choices=get_args(kind), **common)
        elif get_origin(kind) is Mapping:
            group.add_argument(flag, type=json_object, metavar="JSON", **common)
        else:
            group.add_argument(flag, type=_plain_type(kind), metavar=each.name.rpartition("_")[2].upper(), **common)


def given_options(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """Return the fields of a dataclass that were given."""
    return {each.name: getattr(args, each.name) for each in fields(cls) if hasattr(args, each.name)}


def json_object(text: str) -> dict[str, Any]:
    """Return the object that a text in JSON is.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'expected JSON such as {{"depth": 12}}, got {text!r}: {error}') from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'expected a JSON object such as {{"depth": 12}}, got {text!r}')
    return value


def _plain_type(kind: Any) -> Any:
    """Return the type of a value that may also be None."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(option for option in get_args(kind) if option is not type(None))
    return kind


def _attribute_texts(cls: type) -> dict[str, str]:
    """Return what the docstring says of each attribute."""
    section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
    texts: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        if match := re.match(r" {4}(\w+): (.*)", line):
            name = match[1]
            texts[name] = match[2]
        elif name and line.strip():
            texts[name] += " " + line.strip()
    return texts
