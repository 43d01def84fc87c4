"""Catalog of timm models as annotators."""

from __future__ import annotations

import json
import logging

import pytest
import timm

import relabel_datasets as rd
from relabel_datasets.annotate.catalogue import cheap_models, format_annotators
from relabel_datasets.cli import main


def test_models_are_selected_by_pattern():
    entries = rd.annotate.describe_annotators("test_resnet*", progress=False)
    assert [entry.model for entry in entries] == timm.list_models("test_resnet*")
    assert entries[0].to_json() == {
        "module": "resnet", "model": "test_resnet", "input_size": (160, 160), "grid": (5, 5), "head": "exact",
        "reason": "", "stride": "32",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("test_vit", None, ("approximate", (10, 10), "16", "")),
        ("test_convnext", (96, 128), ("approximate", (3, 4), "32", "")),
        ("test_efficientnet", 128, ("exact", (4, 4), "32", "")),
        ("convit_tiny", (96, 128), ("refused", None, "", "size of the tensor")),
        ("nest_tiny", (96, 128), ("refused", None, "", "does not support input_size=(96, 128), only (224, 224)")),
    ],
)  # fmt: skip
def test_entries_rate_the_map_or_give_the_reason_of_a_refusal(name, size, expected):
    (entry,) = rd.annotate.describe_annotators(name, input_size=size, progress=False)
    assert (entry.head, entry.grid, entry.stride) == expected[:3]
    assert expected[3] in entry.reason
    assert bool(entry.reason) == (entry.head == "refused")


def test_models_published_without_a_classifier_are_run_with_one():
    (entry,) = rd.annotate.describe_annotators("eva02_tiny_patch14_224", input_size=56, progress=False)
    assert (entry.head, entry.grid, entry.reason) == ("approximate", (4, 4), "published without a classifier")


def test_there_is_one_model_of_each_module():
    modules = [timm.model_entrypoint(name).__module__ for name in cheap_models()]
    assert len(set(modules)) == len(modules) == len([m for m in timm.list_modules() if timm.list_models(module=m)])


def test_a_pattern_without_matches_is_an_error():
    with pytest.raises(ValueError, match=r"no timm model matches 'resnot\*': use a name with wildcards"):
        rd.annotate.describe_annotators("resnot*")


def test_random_weights_do_not_log_a_warning_in_the_catalogue(caplog):
    with caplog.at_level(logging.WARNING):
        rd.annotate.describe_annotators("test_resnet", progress=False)
    assert caplog.text == ""


def test_the_command_prints_a_table_and_totals(tmp_path, capsys):
    path = tmp_path / "list.json"
    assert main(["annotators", "test_[rv]*t", "--input-size", "64", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "| resnet | test_resnet | 64x64 | 2x2 | 32 | exact |  |" in printed
    entries = json.loads(path.read_text())
    exact = sum(entry["head"] == "exact" for entry in entries)
    assert f"of {len(entries)} models, {exact} exact, {len(entries) - exact} approximate, 0 refused" in printed
    assert main(["annotators", "nothing"]) == 1


def test_non_square_strides_have_two_numbers():
    entry = rd.annotate.AnnotatorEntry("m", "n", (64, 96), (4, 4), "exact", "a|b")
    assert entry.stride == "16x24"
    assert "| 64x96 | 4x4 | 16x24 | exact | a\\|b |" in format_annotators([entry])
