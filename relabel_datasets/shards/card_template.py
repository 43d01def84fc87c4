"""Templates of dataset cards: where they come from, how they are rendered, and the mark that names a card's template.

A template is one of this package, by name, or a file that the caller gives. A card never decides what is rendered: its mark
is compared with the names of the package's templates. Rendering is sandboxed, and the filters `code` and `python` make
values of a manifest inert in Markdown and in Python code.
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
_SHARED = "shared"  # part of the other templates
_NOT_TEMPLATES = (_SHARED, "README")  # README.md is the guide of the folder
_MARK = "<!-- Made by relabel_datasets from the template {name}: edit the template, not this text. -->"
_MARKED = re.compile(re.escape(_MARK).replace(r"\{name\}", "(?P<name>.*)"))
_YAML = re.compile(r"---[ \t]*\r?\n.*?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_FILE = "a file"  # in the mark of a template whose file has a name that could be read as something else


def package_templates() -> tuple[str, ...]:
    """Return the names of the package's templates, sorted."""
    return tuple(sorted(path.stem for path in _folder().glob("*.md") if path.stem not in _NOT_TEMPLATES))


def read_template(template: str | os.PathLike[str]) -> str:
    """Return the text of a template.

    Args:
        template: Name of one of the package's templates, or path of a file. A name takes precedence over a file of that
            name in the current folder, which is `./NAME`.

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
        raise DatasetError(f"card template {path} is not UTF-8, save it as such: {error}") from error


def marked_template(card: str) -> str | None:
    """Return the template that a card's mark names, which may be none of the package's; None if the card has no mark.

    The mark is the first line after the YAML: elsewhere it is part of somebody's text.
    """
    text = card.removeprefix("\ufeff").lstrip()
    yaml = _YAML.match(text)
    match = _MARKED.fullmatch(text[yaml.end() if yaml else 0 :].lstrip().partition("\n")[0].rstrip())
    return match["name"] if match else None


def render_card(template: str | os.PathLike[str], card_data: str, use: Callable[..., dict[str, Any]]) -> str:
    """Return a rendered card.

    Args:
        template: See `read_template`.
        card_data: YAML of what the manifests say, without `---`.
        use: Returns the variables of the package's shared text, given the arguments of `{{ use(...) }}`.

    Raises:
        FileNotFoundError: There is no such template.
        DatasetError: The template is not valid, or does what the sandbox forbids.
    """
    shared = (_folder() / f"{_SHARED}.md").read_text(encoding="utf-8")

    def render_shared(*args: Any, **kwargs: Any) -> str:
        return _render(shared, _SHARED, use(*args, **kwargs), trim_blocks=True, lstrip_blocks=True)

    variables = {"card_data": card_data, "mark": _mark_of(template), "use": render_shared}
    return _render(read_template(template), str(template), variables)


def code(value: object) -> str:
    """Return a value as Markdown code that ends neither the code nor the cell of a table, in one line."""
    text = " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())
    text = text.replace("|", "\N{BROKEN BAR}")  # GitHub's tables end a cell at a pipe in code, too
    text = text or "(none)"
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def python_literal(value: object) -> str:
    """Return a string as a literal of Python in one line, without the backticks that end Markdown code."""
    return json.dumps(str(value)).replace("`", "\\u0060")


def _render(text: str, name: str, variables: dict[str, Any], **options: Any) -> str:
    from jinja2 import StrictUndefined  # readers do not need it
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
    except Exception as error:  # a template of the caller's may raise anything
        line = f", line {error.lineno}" if hasattr(error, "lineno") else ""
        raise DatasetError(f"card template {name}{line}: {type(error).__name__}: {error}") from error


def _mark_of(template: str | os.PathLike[str]) -> str:
    """Return the mark of a card: the name of a package's template, or of a file without its folders."""
    if template in package_templates():
        return _MARK.format(name=template)
    name = Path(template).name
    is_plain = re.fullmatch(r"\w[\w. -]*", name) is not None and name not in package_templates()
    return _MARK.format(name=name if is_plain else _FILE)


def _folder() -> Path:
    """Return the folder of the package's templates: in the wheel it is in the package, in the repository beside it."""
    package = Path(__file__).parents[1]
    installed = package / "cards"
    return installed if installed.is_dir() else package.parent / "cards"
