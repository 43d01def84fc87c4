"""Find and render the templates of dataset cards, and read the mark that names the template of a card.

A template is one of the package's, given by name, or a file. A card cannot cause a file to be rendered: its mark is only
compared with the names of the package's templates. Rendering is sandboxed, and the filters `code` and `python` escape values of
a manifest for Markdown and for Python code.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import DatasetError
from ..storage.folders import local_path

DEFAULT_TEMPLATE = "default"
_SHARED = "shared"  # included by the other templates
_NOT_TEMPLATES = (_SHARED, "README")  # README.md is the guide of the folder
_MARK = "<!-- Made by relabel_datasets from the template {name}: edit the template, not this text. -->"
_MARKED = re.compile(re.escape(_MARK).replace(r"\{name\}", "(?P<name>.*)"))
_YAML = re.compile(r"---[ \t]*\r?\n.*?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_FILE = "a file"  # in the mark if the name of the template's file is ambiguous


def package_templates() -> tuple[str, ...]:
    """Return the names of the package's templates, sorted."""
    return tuple(sorted(path.stem for path in _folder().glob("*.md") if path.stem not in _NOT_TEMPLATES))


def read_template(template: str | os.PathLike[str]) -> str:
    """Return the text of a template.

    Args:
        template: Name of one of the package's templates, or path of a file. A name takes precedence over a file with that
            name in the working directory, which can be given as `./NAME`.

    Raises:
        FileNotFoundError: There is no such template.
        DatasetError: The file is not UTF-8.
    """
    if template in package_templates():
        return (_folder() / f"{template}.md").read_text(encoding="utf-8")
    path = local_path(template, "the template of a card")
    if not path.is_file():
        names = ", ".join(package_templates())
        raise FileNotFoundError(f"there is no card template {str(path)!r}: give the path of a file or one of {names}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(f"card template {path} is not UTF-8: {error}. Save it as UTF-8") from error


def marked_template(card: str) -> str | None:
    """Return the template named by the mark of a card, which may not be one of the package's; None if there is no mark.

    The mark must be the first line after the YAML. Elsewhere it counts as text.

    Args:
        card: Text of the card.
    """
    text = card.removeprefix("\ufeff").lstrip()
    yaml = _YAML.match(text)
    match = _MARKED.fullmatch(text[yaml.end() if yaml else 0 :].lstrip().partition("\n")[0].rstrip())
    return match["name"] if match else None


def render_card(template: str | os.PathLike[str], card_data: str, use: Callable[..., dict[str, Any]]) -> str:
    """Return a rendered card.

    Args:
        template: Name or path of the template, see `read_template`.
        card_data: YAML from the manifests, without `---`.
        use: Function that returns the variables of cards/shared.md for the arguments of `{{ use(...) }}`.

    Raises:
        FileNotFoundError: There is no such template.
        DatasetError: The template is not valid, or uses something that the sandbox forbids.
    """
    shared = (_folder() / f"{_SHARED}.md").read_text(encoding="utf-8")

    def render_shared(*args: Any, **kwargs: Any) -> str:
        return _render(shared, _SHARED, use(*args, **kwargs), trim_blocks=True, lstrip_blocks=True)

    variables = {"card_data": card_data, "mark": _mark_of(template), "use": render_shared}
    return _render(read_template(template), str(template), variables)


def code(value: object) -> str:
    """Return a value as one line of Markdown code, escaped so that it cannot end the code or the cell of a table.

    Args:
        value: Value to convert with `str`.
    """
    text = " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())
    text = text.replace("|", "\N{BROKEN BAR}")  # on GitHub, a pipe ends a cell even in code
    text = text or "(none)"
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def python_literal(value: object) -> str:
    """Return a value as a Python string literal in one line, without backticks, which would end Markdown code.

    Args:
        value: Value to convert with `str`.
    """
    return json.dumps(str(value)).replace("`", "\\u0060")


def _render(text: str, name: str, variables: dict[str, Any], **options: Any) -> str:
    from jinja2 import StrictUndefined  # not needed by readers
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined,
        autoescape=False,
        **options,
    )
    environment.filters.update(code=code, python=python_literal)
    try:
        return environment.from_string(text).render(variables)
    except DatasetError:
        raise
    except Exception as error:  # a user's template may raise anything
        line = f", line {error.lineno}" if hasattr(error, "lineno") else ""
        raise DatasetError(f"card template {name}{line}: {type(error).__name__}: {error}") from error


def _mark_of(template: str | os.PathLike[str]) -> str:
    """Return the mark of a card: the name of a package's template, or the file name of another one."""
    if template in package_templates():
        return _MARK.format(name=template)
    name = Path(template).name
    is_plain = re.fullmatch(r"\w[\w. -]*", name) is not None and name not in package_templates()
    return _MARK.format(name=name if is_plain else _FILE)


def _folder() -> Path:
    """Return the folder of the package's templates: in the package (wheel) or next to it (repository)."""
    package = Path(__file__).parents[1]
    installed = package / "cards"
    return installed if installed.is_dir() else package.parent / "cards"
