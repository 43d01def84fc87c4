import json

import pytest

from relabel_datasets.schema import (
    FieldError,
    dict_of,
    fields,
    free_form,
    integer,
    list_of,
    number,
    one_of,
    optional,
    parse_json,
    record,
    shown,
    string,
    text,
    tuple_of,
)

NESTED = record(name=text(), sizes=list_of(integer(1)), note=optional(text()))

BROKEN = {
    "true for an integer": (integer(), True, "f must be an integer of at least 0, got True"),
    "a float for an integer": (integer(), 1.0, "f must be an integer of at least 0, got 1.0"),
    "text for an integer": (integer(), "1", "got '1'"),
    "null for an integer": (integer(), None, "got None"),
    "too small": (integer(1, 5), 0, "f must be an integer in 1 .. 5, got 0"),
    "too large": (integer(1, 5), 6, "got 6"),
    "beyond 64 bits": (integer(), 2**63, "got 9223372036854775808"),
    "a fixed number": (integer(3, 3), 4, "f must be 3, got 4"),
    "true for a number": (number(), True, "f must be a finite number, got True"),
    "a number beyond all bounds": (number(), 10**400, "f must be a finite number, got 1000"),
    "not the pattern": (text("[a-z]+", "letters"), "a1", "f must be letters, got 'a1'"),
    "a newline after the pattern": (text("[a-z]+"), "a\n", r"got 'a\\n'"),
    "a lone surrogate": (text(), "\ud800", r"got '\\ud800'"),
    "bytes for text": (string(), b"a", "f must be text, got b'a'"),
    "none of the choices": (one_of("U8", "U16"), "I8", "f must be one of U8, U16, got 'I8'"),
    "a list for a choice": (one_of("U8"), ["U8"], "must be one of"),
    "a dict for a list": (list_of(text()), {}, "f must be a list, got {}"),
    "too few": (list_of(text(), 1), [], "f must be a list of at least 1 values"),
    "too many": (list_of(text(), 1, 2), list("abc"), "f must be a list of 1 to 2 values"),
    "a wrong entry": (list_of(integer()), [0, 1, "2"], r"f\[2\] must be an integer"),
    "a pair of three": (tuple_of(integer(), integer()), [1, 2, 3], "f must be a list of 2 values"),
    "a list for a dict": (dict_of(text()), [], r"f must be a dict, got \[\]"),
    "an empty dict": (dict_of(text(), 1), {}, "f must be a dict with at least 1 keys"),
    "a wrong value": (dict_of(text()), {"a": 1}, r"f\['a'\] must be text, got 1"),
    "a missing field": (NESTED, {"name": "a", "note": None}, "f.sizes is missing"),
    "an unknown field": (NESTED, {"name": "a", "sizes": [], "note": None, "x": 1}, "f.'x' is not a known field"),
    "a wrong field": (NESTED, {"name": "a", "sizes": [1, 0], "note": None}, r"f.sizes\[1\] must be"),
    "a list for a record": (NESTED, ["a"], "f must be a dict"),
    "no name": (free_form(name=text()), {"k": 1}, "f.name is missing"),
    "deep values": (free_form(), {"a": json.loads("[" * 40 + "]" * 40)}, "is nested deeper than 32 levels"),
    "surrogates within": (free_form(), {"a": ["\udcff"]}, r"f.a\[0\] must be text"),
    "surrogates in a key": (free_form(), {"\udcff": 1}, "a key of f must be text"),
}


@pytest.mark.parametrize(("rule", "value", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_rule_names_field_expectation_and_value(rule, value, message):
    with pytest.raises(FieldError, match=message):
        rule(value, "f")


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        (integer(), 0),
        (integer(-5, 5), -5),
        (number(), 1.5),
        (number(), -3),
        (text(), "größe\n"),
        (string(), "\udcff"),
        (optional(integer()), None),
        (NESTED, {"name": "", "sizes": [1, 2], "note": "x"}),
        (fields({"a": integer(), "b": integer()}, optional={"b"}), {"a": 1}),
        (free_form(name=text()), {"name": "a", "more": [1, 2.5, None, True, {"x": "y"}]}),
    ],
)
def test_a_value_that_satisfies_its_rule_passes(rule, value):
    assert rule(value, "f") is None


NO_JSON = {
    "nothing": (b"", "Expecting value"),
    "cut off": (b'{"a": 1', "Expecting"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "utf-8"),
    "Latin-1": (b'{"a": "\xe9"}', "utf-8"),
    "a repeated key": (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is repeated"),
    "a repeated key below": (b'[{"a": {"b": 1, "b": 1}}]', "the key 'b' is repeated"),
    "NaN": (b'{"a": NaN}', "NaN is not a finite number"),
    "infinity": (b"[-Infinity]", "-Infinity is not a finite number"),
    "an infinite exponent": (b"[1e999]", "1e999 is not a finite number"),
    "an endless integer": (b"[" + b"9" * 5000 + b"]", "integer string conversion"),
    "endless lists": (b"[" * 100_000, "nested too deeply"),
    "endless dicts": (b'{"a":' * 100_000, "nested too deeply"),
    "millions of lists": (b"[" + b"[]," * 3_000_001 + b"[]]", "too many"),
}


@pytest.mark.parametrize(("data", "message"), NO_JSON.values(), ids=NO_JSON)
def test_json_that_is_not_strict_is_a_value_error(data, message):
    with pytest.raises(ValueError, match=message):
        parse_json(data)


def test_strict_json_is_read_as_json_reads_it():
    value = {"a": [1, -2.5e3, None, True, "größe \ud83d"], "b": {}}
    assert parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize("value", ["x" * 10**6, [0] * 10**6, {i: i for i in range(1000)}, 10**4000, [[["y" * 70]] * 3]])
def test_an_invalid_value_is_abbreviated_in_errors(value):
    assert len(shown(value)) < 100
