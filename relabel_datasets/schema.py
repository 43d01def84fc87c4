"""Declarative checks of JSON files of a dataset. Errors name the field, the expected value and the value found.

A rule is a function of a value and the name of its field. Rules are built once, at import:

    >>> rule = record(name=text(), sizes=list_of(integer(1)))
    >>> rule({"name": "a", "sizes": [1, 2.5]}, "entry")
    Traceback (most recent call last):
    relabel_datasets.schema.FieldError: entry.sizes[1] must be an integer of at least 1, got 2.5
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

Rule = Callable[[Any, str], object]

MAX_INT = 2**63 - 1
_MAX_DEPTH = 32  # levels of free-form values, since other code walks them recursively
_MAX_BYTES, _MAX_VALUES = 64 << 20, 6_000_000  # both limits together keep the parsed value below 1 GiB
_SHOWN = 80  # largest number of characters of an invalid value in an error


class FieldError(ValueError):
    """Value that violates the rule of its field."""


def parse_json(data: bytes) -> Any:
    """Parse strict JSON.

    Args:
        data: UTF-8 text, at most 64 MiB.

    Returns:
        The parsed value.

    Raises:
        ValueError: The text is not UTF-8 or not JSON, is too large, is nested too deeply, repeats a key of an object, or
            has a number that is not finite.
    """
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it has {len(data)} bytes, more than {_MAX_BYTES}")
    if len(data) > _MAX_VALUES and sum(map(data.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise ValueError(f"it has too many values, more than {_MAX_VALUES}")
    try:
        return _DECODER.decode(data.decode())  # json.loads would also accept UTF-16 and UTF-32
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(repeated)} is repeated")
    return values


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:_SHOWN]} is not a finite number")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct, parse_float=_finite, parse_constant=_finite)


def shown(value: object) -> str:
    """Return a short `repr` of a value for an error message."""
    if isinstance(value, (str, list, dict)) and len(value) > _SHOWN:
        type_name = {str: "text", list: "list", dict: "dict"}[type(value)]
        return f"a {type_name} of length {len(value)}"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def fail(name: str, expected: str, value: object) -> NoReturn:
    """Raise the FieldError for a value."""
    raise FieldError(f"{name} must be {expected}, got {shown(value)}")


def integer(low: int = 0, high: int = MAX_INT) -> Rule:
    """Return the rule for an integer from `low` to `high`, inclusive. `true` and `1.0` are not integers."""
    expected = f"an integer of at least {low}" if high == MAX_INT else f"an integer in {low} .. {high}"
    expected = f"{low}" if low == high else expected

    def check(value: Any, name: str) -> None:
        if type(value) is not int or not low <= value <= high:
            fail(name, expected, value)

    return check


def number() -> Rule:
    """Return the rule for a finite number."""

    def check(value: Any, name: str) -> None:
        if type(value) not in (int, float) or abs(value) > MAX_INT:
            fail(name, "a finite number", value)

    return check


def boolean() -> Rule:
    """Return the rule for true or false."""

    def check(value: Any, name: str) -> None:
        if not isinstance(value, bool):
            fail(name, "true or false", value)

    return check


def text(pattern: str = r"(?s).*", expected: str = "text") -> Rule:
    """Return the rule for a string that matches a pattern and has no lone surrogates, which UTF-8 cannot encode."""
    compiled = re.compile(pattern)

    def check(value: Any, name: str) -> None:
        if not isinstance(value, str) or not compiled.fullmatch(value) or not _is_unicode(value):
            fail(name, expected, value)

    return check


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def string() -> Rule:
    """Return the rule for any string, such as a file name that is not UTF-8."""

    def check(value: Any, name: str) -> None:
        if not isinstance(value, str):
            fail(name, "text", value)

    return check


def one_of(*values: str) -> Rule:
    """Return the rule for a string that is one of `values`."""

    def check(value: Any, name: str) -> None:
        if not isinstance(value, str) or value not in values:
            fail(name, f"one of {', '.join(values)}", value)

    return check


def optional(rule: Rule) -> Rule:
    """Return the rule for null or a value that satisfies `rule`."""

    def check(value: Any, name: str) -> None:
        if value is not None:
            rule(value, name)

    return check


def list_of(rule: Rule, low: int = 0, high: int = MAX_INT) -> Rule:
    """Return the rule for a list of `low` to `high` values, inclusive, that each satisfy `rule`."""

    def check(value: Any, name: str) -> None:
        if not isinstance(value, list):
            fail(name, "a list", value)
        if not low <= len(value) <= high:
            limits = f"{low}" if low == high else f"at least {low}" if high == MAX_INT else f"{low} to {high}"
            fail(name, f"a list of {limits} values", value)
        for position, entry in enumerate(value):
            try:
                rule(entry, name)
            except ValueError:
                rule(entry, f"{name}[{position}]")  # fails again; names are made only for errors, for speed
                raise

    return check


def tuple_of(*rules: Rule, num_optional: int = 0) -> Rule:
    """Return the rule for a list with one value for each of `rules`, of which the last `num_optional` may be missing."""
    low, high = len(rules) - num_optional, len(rules)
    expected = f"a list of {high} values" if low == high else f"a list of {low} to {high} values"

    def check(value: Any, name: str) -> None:
        if not isinstance(value, list) or not low <= len(value) <= high:
            fail(name, expected, value)
        for position, (rule, entry) in enumerate(zip(rules, value, strict=False)):
            try:
                rule(entry, name)
            except ValueError:
                rule(entry, f"{name}[{position}]")
                raise

    return check


def dict_of(rule: Rule, low: int = 0) -> Rule:
    """Return the rule for a dict with at least `low` keys, whose values each satisfy `rule`."""

    def check(value: Any, name: str) -> None:
        if not isinstance(value, dict) or len(value) < low:
            fail(name, f"a dict with at least {low} keys" if low else "a dict", value)
        for key, entry in value.items():
            try:
                rule(entry, name)
            except ValueError:
                rule(entry, f"{name}[{shown(key)}]")
                raise

    return check


def record(**rules: Rule) -> Rule:
    """Return the rule for a dict that has exactly these fields."""
    return fields(rules)


def fields(rules: Mapping[str, Rule], optional: Collection[str] = ()) -> Rule:
    """Return the rule for a dict that has only these fields and all that are not in `optional`."""
    known, needed = rules.keys(), rules.keys() - set(optional)

    def check(value: Any, name: str) -> None:
        if not isinstance(value, dict):
            fail(name or "the content", "a dict", value)
        if not needed <= value.keys() <= known:
            prefix = f"{name}." if name else ""
            missing, unknown = sorted(needed - value.keys()), sorted(value.keys() - known)
            raise FieldError(
                f"{prefix}{missing[0]} is missing" if missing else f"{prefix}{shown(unknown[0])} is not a known field"
            )
        for field, entry in value.items():
            try:
                rules[field](entry, name)
            except ValueError:
                rules[field](entry, f"{name}.{field}" if name else field)
                raise

    return check


def free_form(**rules: Rule) -> Rule:
    """Return the rule for a dict of any JSON values, in which the fields of `rules` are required."""

    def check(value: Any, name: str) -> None:
        if not isinstance(value, dict):
            fail(name, "a dict", value)
        _check_json(value, name, 0)
        for field, rule in rules.items():
            if field not in value:
                raise FieldError(f"{name}.{field} is missing")
            rule(value[field], f"{name}.{field}")

    return check


_UNICODE, _NUMBER = text(), number()


def _check_json(value: Any, name: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise FieldError(f"{name} is nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, entry in value.items():
            _UNICODE(key, f"a key of {name}")
            _check_json(entry, f"{name}.{key}", depth + 1)
    elif isinstance(value, list):
        for position, entry in enumerate(value):
            _check_json(entry, f"{name}[{position}]", depth + 1)
    elif isinstance(value, str):
        _UNICODE(value, name)
    elif value is not None and not isinstance(value, bool):
        _NUMBER(value, name)
