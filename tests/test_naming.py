"""Rules for names: one table per type of name, and agreement with `datasets`."""

from __future__ import annotations

import re

import datasets
import pytest
from datasets.builder import BuilderConfig
from datasets.naming import _split_re

from relabel_datasets.errors import DatasetError
from relabel_datasets.naming import (
    MAX_KEY_BYTES,
    MAX_NAME_BYTES,
    check_config,
    check_extension,
    check_file_name,
    check_key,
    check_sha256,
    check_split,
    default_config,
    escape_key,
    is_config,
    is_key,
)
from tests.bad_names import BAD_CONFIGS, BAD_FILES, BAD_KEYS, BAD_SHA256, BAD_SPLITS

GOOD_CONFIGS = ["a", "_", "0", "resnet50.a1_in1k", "x" * MAX_NAME_BYTES, "conx", "a..b", "README", "all"]
GOOD_SPLITS = ["train", "validation", "test", "a.b", "A1_2.3", "x" * MAX_NAME_BYTES]
OTHER_TYPES = {"null": None, "number": 1, "list": ["train"], "bytes": b"train"}


def table(kind, values):
    return [pytest.param(kind, value, id=f"{kind.__name__}-{name}") for name, value in values.items()]


def _check_shard(name, source):
    return check_file_name(name, source, ".tar")


@pytest.mark.parametrize(
    ("check", "value"),
    [
        *table(check_config, {**BAD_CONFIGS, **OTHER_TYPES}),
        *table(check_split, {**BAD_SPLITS, **OTHER_TYPES}),
        *table(_check_shard, {**BAD_FILES, **OTHER_TYPES}),
        *table(check_key, {**BAD_KEYS, **OTHER_TYPES}),
        *table(check_sha256, BAD_SHA256),
        *table(check_extension, {"dot": ".jpg", "two": "a.jpg", "cls": "cls", "map": "safetensors", "capitals": "JPG",
                                 "slash": "a/b", "empty": "", "long": "x" * 17, **OTHER_TYPES}),
    ],
)  # fmt: skip
def test_the_error_for_an_invalid_name_has_its_source_the_name_and_the_rule_in_one_line(check, value):
    with pytest.raises(DatasetError) as caught:
        check(value, "--some-option")
    message = str(caught.value)
    assert message.startswith("--some-option: ")
    assert repr(value)[:40] in message
    assert re.search(r"is not a valid [a-z0-9 ]+: .{10}", message)
    assert message.isprintable()
    assert len(message) < 700


@pytest.mark.parametrize("name", GOOD_CONFIGS)
def test_a_valid_config_is_returned_and_is_valid_in_datasets(name):
    assert check_config(name, "config=") == name
    assert BuilderConfig(name=name).name == name


@pytest.mark.parametrize("name", GOOD_SPLITS)
def test_a_valid_split_is_returned_and_is_valid_in_datasets(name):
    assert check_split(name, "split=") == name
    assert re.fullmatch(_split_re, name)
    assert str(datasets.Split(name)) == name


@pytest.mark.parametrize("name", ["dash-ed", "a b", "a/b", "", ".a", "a.", "a..b"])
def test_a_split_that_datasets_rejects_is_rejected(name):
    assert not re.match(_split_re, name)
    with pytest.raises(DatasetError):
        check_split(name, "split=")


@pytest.mark.parametrize(
    "key", ["a", "n01440764/n01440764_10026", "__a", "é", "a b", "a:b", "%2E", "x" * MAX_KEY_BYTES]
)
def test_a_valid_key_is_returned(key):
    assert check_key(key, "index") == key


@pytest.mark.parametrize("name", [*BAD_KEYS.values(), "v1.0/a", "100%", "plain"])
def test_an_escaped_name_is_a_key_unless_its_parts_or_its_length_are_wrong(name):
    key = escape_key(name)
    wrong = not all(name.split("/")) or len(name) > MAX_KEY_BYTES
    assert is_key(key) != wrong


def test_escaping_can_be_reversed():
    names = ["a.b", "a%2Eb", "a%b", "a\nb", "a%0Ab", "a\udcffb", "a%FFb", "a\\b"]
    assert len(set(map(escape_key, names))) == len(names)
    assert escape_key("a.b/c%\n\udcff") == "a%2Eb/c%25%0A%FF"


@pytest.mark.parametrize(
    ("annotator", "config"),
    [
        ("resnet50.a1_in1k", "resnet50.a1_in1k"),
        ("google/vit-base-patch16-224", "google-vit-base-patch16-224"),
        ("../../x", "x"),
        ("nul", "annotator-nul"),
        ("", "annotator-"),
        ("README.md", "annotator-README.md"),
        ("a" * 300, "a" * MAX_NAME_BYTES),
        ("  é\n", "e"),
        *((name, None) for name in BAD_CONFIGS.values()),
    ],
)
def test_every_annotator_has_a_default_config(annotator, config):
    made = default_config(annotator)
    assert is_config(made)
    assert config in (None, made)
