"""Every place where a name enters refuses a bad one, before anything is written, and touches nothing."""

from __future__ import annotations

import hashlib
import shutil

import datasets
import numpy as np
import pytest
import yaml
from safetensors.numpy import load, save

import relabel_datasets as rd
from relabel_datasets.analysis.analysis import analyze
from relabel_datasets.annotate.annotator import ModuleAnnotator
from relabel_datasets.annotate.importers import import_label_maps
from relabel_datasets.annotate.published import PublishedMaps
from relabel_datasets.cli import main
from relabel_datasets.report.html_report import write_report
from relabel_datasets.report.terminal import describe
from relabel_datasets.shards.tars import ShardWriter
from relabel_datasets.storage.folders import LocalFolder, card_configs, remote_folder
from relabel_datasets.storage.hub import HubFolder, HubRepo
from tests.annotate.releases import publish, random_map, write_release
from tests.bad_names import (
    BAD_CONFIGS,
    BAD_FILES,
    BAD_KEYS,
    BAD_NAMES,
    BAD_SHA256,
    BAD_SPLITS,
    change_manifest,
    snapshot,
)
from tests.conftest import ColourNet, picture


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a dataset, images, a release of label maps, and an empty `work` to run in."""
    root = tmp_path_factory.mktemp("names") / "place"  # not beside the files of other tests, which may be huge
    for i, name in enumerate(("cat", "dog", "emu")):
        (root / "images" / name).mkdir(parents=True)
        picture(i).save(root / "images" / name / f"photo_{i}.jpg")
    write_release(root / "release", root / "images", lambda i, _: publish(random_map(i)))
    _build(root)
    (root / "work").mkdir()
    return root


def _annotator():
    return ModuleAnnotator(ColourNet(), (48, 64), classes=("cat", "dog", "emu"), name="colours")


def _build(root, config="colours", split="train", out="data"):
    return rd.build(
        rd.data.ImageFolderSource(root / "images"), root / out, _annotator(), config=config, split=split, progress=False
    )


def _import(root, config="relabel", split="train"):
    maps = PublishedMaps(root / "release", "relabel", ["cat", "dog", "emu"])
    return import_label_maps(maps, root / "out", order="hw", config=config, split=split, progress=False)


API_CONFIGS = {
    "build": lambda root, name: _build(root, config=name, out="out"),
    "import": lambda root, name: _import(root, config=name),
    "load_dataset": lambda root, name: rd.load_dataset(root / "data", name, "train"),
    "load_dataset of all splits": lambda root, name: rd.load_dataset(root / "data", name),
    "stream": lambda root, name: rd.load_dataset(root / "data", name, "train", streaming=True),
    "LabelMaps": lambda root, name: rd.LabelMaps(root / "data", name),
    "verify": lambda root, name: rd.verify(root / "data", name, progress=False),
    "publish": lambda root, name: rd.publish(root / "data", "org/name", config=name, progress=False),
    "analyze": lambda root, name: analyze(root / "data", name, progress=False),
    "report": lambda root, name: write_report(root / "data", root / "work" / "r.html", name, progress=False),
    "inspect": lambda root, name: describe(root / "data", name),
    "local folder": lambda root, name: LocalFolder(root / "data").child(name),
    "remote folder": lambda root, name: remote_folder("memory://data").child(name),
    "Hub folder": lambda root, name: HubFolder(HubRepo("org/name")).child(name),
    "card": lambda root, name: card_configs(
        f"---\n{yaml.safe_dump({'configs': [{'config_name': name}]})}\n---\n".encode(), "config= of README.md"
    ),
}
NEW_SPLITS = {
    "build": lambda root, name: _build(root, split=name, out="out"),
    "import": lambda root, name: _import(root, split=name),
}
EXISTING_SPLITS = {
    "load_dataset": lambda root, name: rd.load_dataset(root / "data", "colours", name),
    "stream": lambda root, name: rd.load_dataset(root / "data", "colours", name, streaming=True),
    "RelabelDataset": lambda root, name: rd.RelabelDataset(root / "data", "colours", name),
    "LabelMaps": lambda root, name: rd.LabelMaps(root / "data", "colours", name),
    "analyze": lambda root, name: analyze(root / "data", "colours", name, progress=False),
    "report": lambda root, name: write_report(root / "data", root / "work" / "r.html", "colours", name, progress=False),
}


FOLDERS = {
    "local": lambda root: LocalFolder(root / "data" / "colours"),
    "remote": lambda root: remote_folder("http://127.0.0.1:9/data").child("colours"),  # where nobody answers
    "Hub": lambda root: HubFolder(HubRepo("org/name"), "colours/"),
}


def _refusal(call):
    """Return the message of the DatasetError that a call raises."""
    try:
        call()
    except rd.DatasetError as error:
        return str(error)
    return "not refused"


@pytest.fixture
def untouched(place, monkeypatch):
    """Run in an empty folder; nothing around it may change."""
    monkeypatch.chdir(place / "work")
    before = snapshot(place.parent)
    yield
    assert snapshot(place.parent) == before


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("call", API_CONFIGS.values(), ids=API_CONFIGS)
def test_a_bad_config_is_refused_by_every_function_and_nothing_is_touched(place, call):
    answers = {what: _refusal(lambda name=name: call(place, name)) for what, name in BAD_CONFIGS.items()}
    assert {what: text for what, text in answers.items() if "is not a valid config name: a config" not in text} == {}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("call", NEW_SPLITS.values(), ids=NEW_SPLITS)
def test_a_bad_split_is_not_written_by_any_function_and_nothing_is_touched(place, call):
    answers = {what: _refusal(lambda name=name: call(place, name)) for what, name in BAD_SPLITS.items()}
    assert {what: text for what, text in answers.items() if "is not a valid split name: a split" not in text} == {}


# Expressions of `datasets`, and other objects that mean more or less than one split.
NOT_ONE_SPLIT = {
    "slice": "train[:10%]",
    "sum": "train+validation",
    "list": ["train", "validation"],
    "tuple": ("train",),
    "Split": datasets.Split.TRAIN,
    "ReadInstruction": datasets.ReadInstruction("train", to=10, unit="%"),
    "number": 0,
}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("call", EXISTING_SPLITS.values(), ids=EXISTING_SPLITS)
def test_what_is_not_the_name_of_one_split_is_answered_with_the_splits_and_how_to_read_parts_and_several(place, call):
    answers = {
        what: _refusal(lambda name=name: call(place, name)) for what, name in {**BAD_SPLITS, **NOT_ONE_SPLIT}.items()
    }
    for what, text in answers.items():
        assert "only ['train']: split= is the name of one split" in text, what
        assert "Subset(dataset, range(n))" in text, what
        assert "ConcatDataset([dataset, other])" in text, what
        assert text.isprintable(), what


def test_a_missing_split_of_a_valid_name_is_answered_with_the_splits_alone(place):
    assert (
        _refusal(lambda: rd.load_dataset(place / "data", "colours", "test"))
        == "config 'colours' has no split 'test', only ['train']"
    )


COMMANDS = {
    "build": ["build", "images", "../out", "--annotator", "resnet10t"],
    "import": ["import", "release", "../out", "--format", "relabel", "--order", "hw"],
    "verify": ["verify", "../data"],
    "publish": ["publish", "../data", "org/name"],
    "analyze": ["analyze", "../data", "--out", "../out"],
    "train": ["train", "../data", "--out", "../out"],
    "compare": ["compare", "../data", "--out", "../out"],
    "pictures": ["pictures", "../data", "--out", "../out"],
    "report": ["report", "../data", "--out", "../out/report.html"],
    "inspect": ["inspect", "../data"],
    "evaluate": ["evaluate", "model", "../data"],
}
NO_SPLIT = {"verify", "publish", "evaluate"}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("make", FOLDERS.values(), ids=FOLDERS)
def test_a_bad_file_name_is_refused_before_anything_is_opened_or_requested(place, make):
    folder = make(place)
    answers = {what: _refusal(lambda name=name: folder.open(name, 1, "0" * 64)) for what, name in BAD_NAMES.items()}
    assert {what: text for what, text in answers.items() if "is not a valid file name" not in text} == {}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", ["train[:10%]", "train+validation", "all"])
def test_commands_say_that_they_work_on_one_whole_split(capsys, name):
    for command in sorted(COMMANDS.keys() - NO_SPLIT):
        assert main([*COMMANDS[command], "--split", name]) == 1
        assert "works on one whole split" in capsys.readouterr().err, command


OPTIONS = [
    *((command, "--configs" if command == "compare" else "--config", BAD_CONFIGS) for command in COMMANDS),
    *((command, "--split", BAD_SPLITS) for command in COMMANDS if command not in NO_SPLIT),
    ("train", "--validation", BAD_SPLITS),
]


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("command", "option", "names"), OPTIONS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_bad_name_is_refused_by_every_command_in_one_line_that_names_the_option(capsys, command, option, names):
    for what in ("empty", "dot", "parent", "absolute", "newline", "option", "escape sequence", "lone surrogate"):
        name = names[what]
        assert main([*COMMANDS[command], f"{option}={name}"]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"relabel {command}: {option}: {name!r:.20}")
        assert error.removesuffix("\n").isprintable()


def _set(*path):
    """Return a function that sets a field of a manifest to a value."""

    def change(content, value):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def _rename_split(content, value):
    content["splits"][value] = {**content["splits"].pop("train"), "name": value}


FIELDS = {
    "config": (_set("config"), "config", BAD_CONFIGS),
    "splits": (_rename_split, "splits", BAD_SPLITS),
    "name": (_set("splits", "train", "name"), "name", {"another": "validation", "null": None}),
    "index": (_set("splits", "train", "index"), "index", BAD_FILES),
    "index_sha256": (_set("splits", "train", "index_sha256"), "index_sha256", BAD_SHA256),
    "filenames": (_set("splits", "train", "filenames", 0), "filenames", {**BAD_FILES, "number": 7}),
    "shard_sha256": (_set("splits", "train", "shard_sha256", 0), "shard_sha256", BAD_SHA256),
    "image_extension": (
        _set("splits", "train", "image_extension"), "image_extension",
        {"path": "../x", "cls": "cls", "long": "j" * 17, "dots": "a.b"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_a_bad_name_in_a_manifest_is_an_error_that_names_file_and_field(place, tmp_path, name):
    change, field, values = FIELDS[name]
    path = tmp_path / "data" / "colours" / "_info.json"
    for what, value in values.items():
        shutil.copytree(place / "data", tmp_path / "data")
        change_manifest(path, lambda content, value=value: change(content, value))
        before = snapshot(tmp_path)
        message = _refusal(lambda: rd.load_dataset(tmp_path / "data", "colours", "train"))
        assert message.startswith(f"{path} is damaged: "), what
        assert field in message, what
        assert snapshot(tmp_path) == before
        shutil.rmtree(tmp_path / "data")


@pytest.mark.parametrize("field", FIELDS)
def test_verify_reports_a_bad_name_and_checks_the_other_configs(place, tmp_path, field):
    folder = tmp_path / "data"
    shutil.copytree(place / "data", folder)
    shutil.copytree(folder / "colours", folder / "bad")
    change, _, values = FIELDS[field]
    change_manifest(folder / "bad" / "_info.json", lambda content: change(content, list(values.values())[1]))
    report = rd.verify(folder, num_workers=0, progress=False)
    assert [split.num_samples for split in report.splits if split.config == "colours"] == [3]
    assert any(problem.config == "bad" and field in problem.problem for problem in report.problems)


def test_a_folder_whose_name_is_no_config_is_left_out_and_reported(place, tmp_path, caplog):
    folder = tmp_path / "data"
    shutil.copytree(place / "data", folder)
    shutil.copytree(folder / "colours", folder / "a b")
    assert list(rd.load_dataset(folder)) == ["train"]
    assert "folder 'a b'" in caplog.text
    report = rd.verify(folder, num_workers=0, progress=False)
    assert [problem.config for problem in report.problems] == ["a b"]


def test_a_manifest_of_another_config_is_refused(place, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(place / "data" / "colours", folder / "other")
    with pytest.raises(rd.DatasetError, match=r"belongs to config 'colours', not 'other'"):
        rd.load_dataset(folder, "other", "train")


def test_file_names_that_differ_by_case_alone_are_refused(place, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(place / "data", folder)

    def change(content):
        split = content["splits"]["train"]
        content["splits"]["Train"] = {**split, "name": "Train", "index": "TRAIN.index.safetensors"}

    change_manifest(folder / "colours" / "_info.json", change)
    with pytest.raises(rd.DatasetError, match="is used twice"):
        rd.load_dataset(folder, "colours", "train")


@pytest.mark.parametrize("key", BAD_KEYS.values(), ids=BAD_KEYS)
def test_a_bad_key_is_not_written(tmp_path, key):
    path = tmp_path / "train-00000-of-00001.tar"
    with ShardWriter(path, None) as writer, pytest.raises(rd.DatasetError, match="is not a valid sample key"):
        writer.add(key, 0, None, b"map")
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("key", BAD_KEYS.values(), ids=BAD_KEYS)
def test_a_bad_key_of_an_index_is_an_error_that_names_the_row(place, tmp_path, key):
    folder = tmp_path / "data"
    shutil.copytree(place / "data", folder)
    path = folder / "colours" / "train.index.safetensors"
    index = rd.LabelMaps(folder).index
    columns = load(path.read_bytes())
    encoded = [index.key(0).encode(), key.encode(errors="surrogateescape"), index.key(2).encode()]
    columns["key_bytes"] = np.frombuffer(b"".join(encoded), np.uint8)
    columns["key_end"] = np.cumsum([len(each) for each in encoded], dtype=np.uint64)
    path.write_bytes(save(columns))

    def change(content):
        size, sha256 = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
        content["splits"]["train"].update(index_bytes=size, index_sha256=sha256)

    change_manifest(folder / "colours" / "_info.json", change)
    with pytest.raises(
        rd.DatasetError, match=r"train\.index\.safetensors.*(row 1.*key|key_bytes of row 1|no key is empty)"
    ):
        list(rd.LabelMaps(folder))
    report = rd.verify(folder, num_workers=0, progress=False)
    assert any("row 1" in problem.problem or "no key is empty" in problem.problem for problem in report.problems)
