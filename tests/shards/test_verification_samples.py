"""`verify` names samples and members whose damage changes neither sizes nor hashes."""

import json

import numpy as np
import pytest
from safetensors.numpy import load, save

from relabel_datasets.shards.index import Index
from relabel_datasets.shards.manifest import Manifest, _checksum
from relabel_datasets.storage.folders import LocalFolder
from tests.shards.damage import (
    bad_sample,
    check,
    jpeg,
    keys_of,
    map_bytes,
    members_of,
    named,
    positions_of,
    reseal,
    rewrite,
    set_field,
    shard_of,
    texts,
    write_members,
)


def without(extension):
    def damage(folder):
        key = keys_of(folder, 1)[2]
        members = [(name, data) for name, data in members_of(folder, 1) if name != f"{key}.{extension}"]
        write_members(folder, 1, members)
        return key

    return damage


def other_label(text):
    def damage(folder):
        key = keys_of(folder, 1)[2]
        members = [(name, text if name == f"{key}.cls" else data) for name, data in members_of(folder, 1)]
        write_members(folder, 1, members)
        return key

    return damage


def other_column(name, change):
    """Return a function that changes one row of a column of the index."""

    def damage(folder):
        key = keys_of(folder, 1)[2]
        path = folder / "train.index.safetensors"
        columns = load(path.read_bytes())
        row = Index(LocalFolder(folder), Manifest.load(folder).splits["train"], 3).row(key)
        columns[name] = columns[name].copy()
        if name == "sorted_row":
            row = int(np.flatnonzero(columns[name] == row)[0])
        columns[name][row] = change(columns[name][row])
        path.write_bytes(save(columns))
        return key

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (set_field(2, b"no image"), "cannot be read as an image"),
        (set_field(2, b""), "cannot be read as an image"),
        (bad_sample(lambda sample: sample.__setitem__(2, sample[2][:-200])), "cannot be read as an image"),
        (set_field(2, jpeg((41, 56))), "the image is 41x56, its label map is for an image of"),
        (set_field(3, b"no map"), "label map: 6 bytes are not a whole safetensors file"),
        (bad_sample(lambda sample: sample.__setitem__(3, sample[3][:-1])), "label map: the header describes"),
        (set_field(3, map_bytes(4)), "label map: has 4 classes, the manifest has 3"),
        (set_field(3, map_bytes(map_size=(5, 8))), "label map: has size [5, 8], the manifest says [6, 8]"),
        (set_field(3, map_bytes(canvas_size=(4, 5))), "its label map is for an image of 4x5"),
        (set_field(1, 3), ".cls must be a class index in 0 .. 2, got b'3'"),
        (set_field(1, -1), ".cls must be a class index in 0 .. 2, got b'-1'"),
        (without("jpg"), "has no .jpg"),
        (without("cls"), "has no .cls"),
        (without("safetensors"), "has no .safetensors"),
        (other_label(b"cat"), "got b'cat'"),
        (other_label(b" 1"), "got b' 1'"),
        (other_label(b""), "got b''"),
        (other_column("label", lambda label: (label + 1) % 3), "the index says"),
        (other_column("map_offset", lambda offset: offset + 512), "not at their positions in the index"),
        (other_column("image_size", lambda size: size - 1), "not at their positions in the index"),
        (other_column("sorted_row", lambda row: (row + 1) % 13), "the index returns another sample for its key"),
    ],
)
def test_a_bad_sample_with_valid_hashes_is_named(dataset_folder, damage, message):
    folder = dataset_folder / "colours"
    key = damage(folder)
    reseal(folder)
    report = check(dataset_folder)
    assert named(report) - {("colours", 1, None), ("colours", None, None)} == {("colours", 1, key)}
    assert message in texts(report, key)
    quick = check(dataset_folder, quick=True)
    assert quick.splits[0].num_samples == 13
    assert named(quick) == named(report) & {("colours", None, None)}  # only an index that cannot be opened


@pytest.mark.parametrize("at", [0, 4, 15])
@pytest.mark.parametrize("name", ["readme.txt", "photo_99.json", "photo_00.extra.jpg", "folder/x", ".cls", "a.b/c.jpg"])
def test_an_unexpected_member_is_named(dataset_folder, name, at):
    members = members_of(dataset_folder / "colours", 2 if at < 9 else 0)
    members.insert(at, (name, b"1"))
    number = 2 if at < 9 else 0
    write_members(dataset_folder / "colours", number, members)
    reseal(dataset_folder / "colours")
    report = check(dataset_folder)
    assert named(report) == {("colours", number, None)}
    assert f"member {name!r} is unexpected" in texts(report, None)
    assert report.splits[0].num_samples == 13


@pytest.mark.parametrize("source", [0, 2])
@pytest.mark.parametrize("with_index", [True, False])
def test_a_repeated_key_is_named(colours, source, with_index):
    key = keys_of(colours, source)[1]
    copied = [member for member in members_of(colours, source) if member[0].startswith(f"{key}.")]
    write_members(colours, 2, members_of(colours, 2) + copied)
    reseal(colours)
    if not with_index:
        (colours / "train.index.safetensors").unlink()
    report = check(colours)
    assert named(report) - {("colours", None, None)} == {("colours", 2, None), ("colours", 2, key)}
    assert f"its key is repeated: it is also in train-{source:05d}-of-00003.tar" in texts(report, key)
    assert "has 4 samples, the manifest says 3" in texts(report, None)


def test_a_sample_that_is_not_in_the_index_is_named(colours):
    write_members(
        colours, 2, [*members_of(colours, 2), ("new.jpg", jpeg()), ("new.cls", b"0"), ("new.safetensors", map_bytes())]
    )
    reseal(colours)
    assert named(check(colours)) == {("colours", 2, None), ("colours", 2, "new")}


def test_a_wrong_number_of_classes_in_the_manifest_is_named_for_all_samples(dataset_folder):
    path = dataset_folder / "colours" / "_info.json"
    content = json.loads(path.read_bytes())
    content["classes"].append("fox")
    content.pop("checksum")
    path.write_text(json.dumps({**content, "checksum": _checksum(content)}))
    report = check(dataset_folder)
    keys = {(number, key) for number in range(3) for key in keys_of(path.parent, number)}
    assert named(report) == {("colours", number, key) for number, key in keys}
    assert "has 3 classes, the manifest has 4" in report.problems[0].problem
    assert len(str(report).splitlines()) == 2 + 13 + 1


def test_the_index_of_another_build_is_reported_for_every_shard(colours):
    rewrite(colours, lambda samples: [sample.__setitem__(0, "other_" + sample[0]) for sample in samples])
    other = (colours / "train.index.safetensors").read_bytes()
    rewrite(colours, lambda samples: [sample.__setitem__(0, sample[0][6:]) for sample in samples])
    (colours / "train.index.safetensors").write_bytes(other)
    reseal(colours)
    assert named(check(colours)) == {("colours", number, None) for number in range(3)}


def test_an_index_with_invalid_offsets_is_named(colours):
    other_column("sorted_row", lambda row: 10**6)(colours)
    reseal(colours)
    report = check(colours)
    assert named(report) == {("colours", None, None)}
    assert "sorted_row must be in 0 .. 12, got 1000000" in texts(report, None)


def test_a_wrong_number_of_samples_in_the_manifest_is_named(colours):
    reseal(colours, shard_lengths=[5, 4, 4], shard_statistics=[[0, 0, 0, 0.0, 0]] * 3)
    assert {("colours", 1, None), ("colours", 2, None)} <= named(check(colours))
    assert "has 3 samples, the manifest says 4" in texts(check(colours), None)


@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"\xff" * 11 + b"\0"])
@pytest.mark.parametrize("kind", [b"0", b"L", b"S", b"x", b"5"])
def test_an_absurd_size_in_a_header_does_not_end_the_check(colours, kind, size):
    path, key = shard_of(colours, 0), keys_of(colours, 0)[2]
    start = positions_of(colours, 0)[f"{key}.cls"].offset
    data = bytearray(path.read_bytes())
    data[start + 124 : start + 136], data[start + 156 : start + 157] = size, kind
    data[start + 148 : start + 156] = b"        "
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)
    reseal(colours)
    report = check(colours)
    assert {("colours", 0, None), ("colours", 0, key)} <= named(report)
    assert {number for _, number, _ in named(report)} == {0}


def test_bytes_after_the_end_are_named(colours):
    path = shard_of(colours, 0)
    path.write_bytes(path.read_bytes() + bytes(512))
    reseal(colours)
    assert named(check(colours)) == {("colours", 0, None)}
    assert "two empty blocks" in texts(check(colours), None)


def test_members_after_the_end_are_named(colours):
    """Other readers stop at two empty blocks."""
    members, path = members_of(colours, 0), shard_of(colours, 0)
    keys = keys_of(colours, 0)
    start = positions_of(colours, 0)[f"{keys[3]}.jpg"].offset
    data = path.read_bytes()
    path.write_bytes(data[:start] + bytes(1024) + data[start:])
    reseal(colours)
    report = check(colours)
    assert named(report) == {("colours", 0, None)}
    assert f"bytes {start} to {start + 1024} are not members" in texts(report, None)
    assert len(members) == 15
