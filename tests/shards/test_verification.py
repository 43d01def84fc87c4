"""`verify` on real datasets that are damaged in every way: it must report all problems and nothing else."""

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.numpy import load, save

import relabel_datasets as rd
from relabel_datasets.shards.index import Index, make_index
from relabel_datasets.shards.manifest import Manifest, _checksum
from relabel_datasets.shards.tars import ShardWriter
from relabel_datasets.storage import remote
from relabel_datasets.storage.folders import LocalFolder
from relabel_datasets.storage.local import sha256_of
from tests.conftest import picture
from tests.servers import FaultyServer


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return tmp_path_factory.mktemp("built") / "dataset"


@pytest.fixture
def dataset_folder(built, tmp_path, request):
    """Copy of a dataset that is built once for all tests, by the fixture with the same name."""
    if not built.exists():
        shutil.copytree(request.getfixturevalue("dataset_folder"), built)
    return Path(shutil.copytree(built, tmp_path / "dataset", dirs_exist_ok=True))


@pytest.fixture
def colours(dataset_folder):
    """Folder of the config with images."""
    return dataset_folder / "colours"


def check(root, config=None, num_workers=0, **kwargs):
    return rd.verify(root, config, num_workers=num_workers, progress=False, **kwargs)


def named(report):
    """Return the set of (config, number of the shard, key) of the problems."""
    assert report.ok is (not report.problems)
    return {(p.config, p.shard and int(p.shard.split("-")[1]), p.key) for p in report.problems}


def texts(report, key):
    return " | ".join(problem.problem for problem in report.problems if problem.key == key)


# Functions that damage a dataset


def shard_of(folder, number):
    return folder / f"train-{number:05d}-of-00003.tar"


def keys_of(folder, number):
    with tarfile.open(shard_of(folder, number)) as tar:
        return list(dict.fromkeys(name.partition(".")[0] for name in tar.getnames()))


def members_of(folder, number):
    with tarfile.open(shard_of(folder, number)) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def positions_of(folder, number):
    with tarfile.open(shard_of(folder, number)) as tar:
        return {member.name: member for member in tar}


def write_members(folder, number, members):
    """Write a shard with arbitrary members, in the format of ShardWriter."""
    with shard_of(folder, number).open("wb") as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.write(member.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512))
        file.write(bytes(1024))


def flip(path, position, bits=0x80):
    data = bytearray(path.read_bytes())
    data[position] ^= bits
    path.write_bytes(data)


def reseal(folder, *, manifest=None, **split):
    """Write the sizes and hashes of the files on disk to the manifest, so that only the samples reveal the damage."""
    old = Manifest.load(folder)
    train = old.splits["train"]
    paths, index = [folder / name for name in train.filenames], folder / train.index
    actual = {
        "shard_bytes": [path.stat().st_size for path in paths],
        "shard_sha256": [sha256_of(path) for path in paths],
        "index_bytes": index.stat().st_size,
        "index_sha256": sha256_of(index),
    }
    replace(old, splits={"train": replace(train, **actual, **split)}, **(manifest or {})).save(folder)


def rewrite(folder, edit):
    """Write shards and index of a config again. `edit(samples)` may change the samples `[key, label, image, map]`."""
    train, images = Manifest.load(folder).splits["train"], folder.name == "colours"
    infos = []
    for number in range(3):
        members = dict(members_of(folder, number))
        samples = [
            [key, int(members[f"{key}.cls"]), members.get(f"{key}.jpg"), members[f"{key}.safetensors"]]
            for key in keys_of(folder, number)
        ]
        edit(samples)
        with ShardWriter(shard_of(folder, number), "jpg" if images else None) as writer:
            for sample in samples:
                writer.add(*sample)
            infos.append(writer.close())
    (folder / train.index).write_bytes(make_index([row for info in infos for row in info.rows], images=images))
    lengths = [len(info.rows) for info in infos]
    reseal(folder, shard_lengths=lengths, num_samples=sum(lengths))


def build(image_folder, annotator):
    root = image_folder.parent / "built"
    rd.build(rd.data.ImageFolderSource(image_folder), root, annotator, config="colours", shard_size=5, progress=False)
    return root


def jpeg(size=(40, 56)):
    buffer = io.BytesIO()
    picture(0, size).save(buffer, "JPEG")
    return buffer.getvalue()


def map_bytes(num_classes=3, map_size=(6, 8), canvas_size=(40, 56)):
    return rd.LabelMap.from_logits(torch.randn(num_classes, *map_size), canvas_size=canvas_size).to_safetensors()


# Good datasets


@pytest.mark.parametrize("num_workers", [0, 2, None])
def test_a_good_dataset_is_ok_and_counted(dataset_folder, num_workers):
    report = check(dataset_folder, num_workers=num_workers)
    assert (report.ok, report.problems, report.notes) == (True, [], [])
    assert [(each.config, each.split) for each in report.splits] == [("colours", "train"), ("labels-only", "train")]
    for each in report.splits:
        sizes = [path.stat().st_size for path in (dataset_folder / each.config).glob("*.tar")]
        assert (each.num_samples, each.num_shards, each.num_bytes) == (13, 3, sum(sizes))
    assert report.seconds > 0
    assert (
        str(report).splitlines()[0]
        == f"colours/train: 13 samples in 3 shards, {report.splits[0].num_bytes / 1e6:.1f} MB"
    )
    assert str(report).splitlines()[-1].startswith(f"{dataset_folder}: ok, ")


def test_one_config_is_checked_by_name_or_by_folder(dataset_folder):
    flip(shard_of(dataset_folder / "labels-only", 0), 600)
    for report in (check(dataset_folder, "colours"), check(dataset_folder / "colours")):
        assert report.ok
        assert [each.config for each in report.splits] == ["colours"]
    assert named(check(dataset_folder, "labels-only")) >= {("labels-only", 0, None)}


def test_rotated_images_and_long_keys_are_ok(image_folder, annotator):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    picture(3, (40, 56)).save(image_folder / "cat" / "photo_03.jpg", exif=exif)
    (image_folder / "dog" / "photo_04.jpg").rename(image_folder / "dog" / ("ö" * 70 + ".jpg"))
    assert check(build(image_folder, annotator)).problems == []


# Damage that changes sizes or hashes: the samples are named, too


@pytest.mark.parametrize(
    ("extension", "offset", "message"),
    [
        ("jpg", 0, "cannot be read as an image"),
        ("cls", 0, r".cls must be a class index in 0 .. 2, got b'\x"),
        ("safetensors", 9, "label map: not the header of a label map"),
        ("jpg", -512, "has no .jpg"),  # the tar header
        ("cls", -512, "has no .cls"),
        ("safetensors", -512 + 150, "has no .safetensors"),  # its checksum
    ],
)
@pytest.mark.parametrize("position", [0, 2, -1])
def test_a_flipped_byte_is_reported_with_shard_and_sample(dataset_folder, extension, offset, message, position):
    key = keys_of(dataset_folder / "colours", 1)[position]
    path = shard_of(dataset_folder / "colours", 1)
    flip(path, positions_of(dataset_folder / "colours", 1)[f"{key}.{extension}"].offset_data + offset)
    for quick in (False, True):
        report = check(dataset_folder, quick=quick)
        assert named(report) == {("colours", 1, None), ("colours", 1, key)}
        assert message in texts(report, key)
        assert "its SHA-256 is" in texts(report, None)
        assert report.splits[0].num_samples == report.splits[1].num_samples == 13


def test_a_flipped_bit_is_reported_for_its_shard_and_no_other_sample(colours):
    path, rng = shard_of(colours, 0), np.random.default_rng(0)
    good = path.read_bytes()
    positions = [(member.offset_data - 512, key.partition(".")[0]) for key, member in positions_of(colours, 0).items()]
    starts = np.array([start for start, _ in positions])
    headers = rng.choice(starts, 40) + rng.integers(0, 512, 40)
    for position in [*headers, *rng.integers(0, len(good), 60)]:
        flip(path, position, 1 << rng.integers(8))
        report = check(colours)
        assert ("colours", 0, None) in named(report)
        of_the_bit = positions[np.searchsorted(starts, position, "right") - 1][1]
        assert named(report) <= {("colours", 0, None), ("colours", 0, of_the_bit)}
        path.write_bytes(good)


def test_a_damaged_header_of_a_long_name_is_reported_for_its_sample(image_folder, annotator):
    long = "x" * 150
    (image_folder / "dog" / "photo_04.jpg").rename(image_folder / "dog" / f"{long}.jpg")
    folder = build(image_folder, annotator) / "colours"
    number = next(number for number in range(3) if long in keys_of(folder, number))
    start = positions_of(folder, number)[f"{long}.cls"].offset
    good = shard_of(folder, number).read_bytes()
    for offset in (0, 3 * 512 - 512 + 1):  # the header of the name; the member's own header
        flip(shard_of(folder, number), start + offset)
        assert named(check(folder)) >= {("colours", number, None), ("colours", number, long)}
        assert {key for *_, key in named(check(folder)) if key and not key.startswith("x")} == set()
        shard_of(folder, number).write_bytes(good)


@pytest.mark.parametrize("cut", ["member", "inside", "end", "all"])
def test_lost_samples_of_a_truncated_shard_are_named(dataset_folder, cut):
    folder = dataset_folder / "colours"
    keys, positions, path = keys_of(folder, 0), positions_of(folder, 0), shard_of(folder, 0)
    end = {
        "member": positions[f"{keys[3]}.jpg"].offset,  # two samples are lost, nothing else
        "inside": positions[f"{keys[4]}.safetensors"].offset_data + 10,
        "end": path.stat().st_size - 512,
        "all": 0,
    }[cut]
    path.write_bytes(path.read_bytes()[:end])
    report = check(dataset_folder)
    lost = {"member": keys[3:], "inside": keys[4:], "end": [], "all": keys}[cut]
    assert named(report) == {("colours", 0, None), *(("colours", 0, key) for key in lost)}
    assert f"has {end} bytes" in texts(report, None)
    assert "truncated" in texts(report, None)


def test_a_missing_shard_is_named_and_the_others_are_checked(dataset_folder):
    shard_of(dataset_folder / "colours", 1).unlink()
    report = check(dataset_folder)
    assert [(p.config, p.split, p.shard, p.key) for p in report.problems] == [
        ("colours", "train", "train-00001-of-00003.tar", None)
    ]
    assert "in the manifest but not on disk" in report.problems[0].problem
    assert [(each.num_samples, each.num_shards) for each in report.splits] == [(8, 2), (13, 3)]


def test_swapped_shards_are_named_without_their_samples(dataset_folder):
    folder = dataset_folder / "labels-only"
    first, second = shard_of(folder, 0), shard_of(folder, 1)
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)
    report = check(dataset_folder)
    assert named(report) == {("labels-only", 0, None), ("labels-only", 1, None)}
    assert "none of the samples" in texts(report, None)


def test_a_shard_that_is_not_in_the_manifest_is_noted(dataset_folder):
    stray = dataset_folder / "colours" / "train-00007-of-00009.tar"
    stray.write_bytes(b"")
    report = check(dataset_folder)
    assert report.ok
    assert [(note.config, note.split, note.shard) for note in report.notes] == [("colours", "train", stray.name)]
    assert f"note: colours/{stray.name}: is not in the manifest" in str(report)


def test_an_index_that_is_damaged_or_from_another_build_is_named(dataset_folder):
    path = dataset_folder / "colours" / "train.index.safetensors"
    good = path.read_bytes()
    for bad in (good[:-1], good[:-1] + b"!", None):
        path.unlink() if bad is None else path.write_bytes(bad)
        report = check(dataset_folder)
        assert [(p.config, p.split, p.shard, p.key) for p in report.problems] == [("colours", "train", None, None)]
        assert "train.index.safetensors" in report.problems[0].problem
        assert [each.num_samples for each in report.splits] == [13, 13]


# Damage that changes neither sizes nor hashes


def bad_sample(edit):
    """Return a function that changes one sample of a config and updates everything else."""

    def damage(folder):
        key = keys_of(folder, 1)[2]

        def edit_it(samples):
            for sample in samples:
                if sample[0] == key:
                    edit(sample)

        rewrite(folder, edit_it)
        return key

    return damage


def set_field(number, value):
    return bad_sample(lambda sample: sample.__setitem__(number, value))


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


# Cards and manifests


@pytest.mark.parametrize("bad", [b"{", b"{}", None])
def test_a_bad_manifest_is_named_and_other_configs_are_checked(dataset_folder, bad):
    path = dataset_folder / "colours" / "_info.json"
    path.unlink() if bad is None else path.write_bytes(bad)
    report = check(dataset_folder)
    assert named(report) == {("colours", None, None)}
    assert [each.config for each in report.splits] == ["labels-only"]
    if bad is not None:
        assert named(check(path.parent)) == {("colours", None, None)}


def test_a_renamed_config_is_named(dataset_folder):
    (dataset_folder / "colours").rename(dataset_folder / "renamed")
    report = check(dataset_folder)
    assert {(p.config, p.key) for p in report.problems} == {("renamed", None), ("colours", None)}
    assert "its manifest belongs to config 'colours'" in texts(report, None)


@pytest.mark.parametrize(
    ("edit", "config", "message"),
    [
        (lambda text: None, None, "README.md cannot be read"),
        (lambda text: "no card", None, "its YAML header is missing"),
        (
            lambda text: text.replace("config_name: labels-only", "config_name: other"),
            "labels-only",
            "does not list this config",
        ),
        (lambda text: text.replace("config_name: labels-only", "config_name: other"), "other", "has no _info.json"),
    ],
)
def test_a_card_that_contradicts_the_configs_is_named(dataset_folder, edit, config, message):
    card = dataset_folder / "README.md"
    text = edit(card.read_text())
    card.unlink() if text is None else card.write_text(text)
    report = check(dataset_folder)
    assert not report.ok
    assert any(problem.config == config and message in problem.problem for problem in report.problems)
    assert [each.num_samples for each in report.splits] == [13, 13]
    assert check(dataset_folder / "colours").ok


def test_a_path_without_dataset_raises_as_loading_does(dataset_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no dataset at"):
        check(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no dataset at"):
        check(tmp_path / "nowhere")
    with pytest.raises(rd.DatasetError, match=r"no config 'blue', only \['colours', 'labels-only'\]"):
        check(dataset_folder, "blue")
    with pytest.raises(rd.DatasetError, match="is config 'colours', not 'blue'"):
        check(dataset_folder / "colours", "blue")


# Remote


@pytest.fixture
def server(dataset_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(remote, "LONGEST_PAUSE_S", 0.002)
    monkeypatch.setenv("RELABEL_CACHE", str(tmp_path / "cache"))
    with FaultyServer(dataset_folder) as server:
        yield server


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_good_remote_dataset_is_ok_and_leaves_nothing_on_disk(server, dataset_folder, tmp_path, num_workers):
    report = check(server.url, num_workers=num_workers)
    assert report.problems == []
    assert report.splits == check(dataset_folder).splits
    assert report.path == server.url
    assert list((tmp_path / "cache").rglob("*")) == []
    assert check(f"{server.url}/colours").ok


@pytest.mark.parametrize("num_workers", [0, 1])
def test_problems_of_a_remote_dataset_are_those_of_the_local_one(server, dataset_folder, num_workers):
    folder = dataset_folder / "colours"
    key = set_field(1, 3)(folder)
    report = check(server.url, num_workers=num_workers)
    assert named(report) == {("colours", 1, key), ("colours", None, None)}
    texts_of = [[problem.problem.replace(root, "") for problem in each.problems]
                for each, root in ((report, server.url), (check(dataset_folder), str(dataset_folder)))]  # fmt: skip
    assert texts_of[0] == texts_of[1]


def test_a_remote_dataset_is_not_read_from_the_cache(server, dataset_folder):
    dataset = rd.load_dataset(server.url, "colours", "train", download=True)
    path = shard_of(dataset_folder / "colours", 1)
    flip(path, path.stat().st_size // 2)
    assert len([dataset[i] for i in range(13)]) == 13
    report = check(server.url)
    assert named(report) == {("colours", 1, None)}
    assert "its SHA-256 is" in texts(report, None)
    assert [each.num_samples for each in report.splits] == [8, 13]


def test_missing_and_unreachable_remote_shards_are_named(server, dataset_folder):
    shard_of(dataset_folder / "colours", 0).unlink()
    server.fail("503", "labels-only/train-00002-of-00003.tar", times=None)
    report = check(server.url)
    assert named(report) == {("colours", 0, None), ("labels-only", 2, None)}
    assert "there is no colours/train-00000-of-00003.tar" in report.problems[0].problem
    assert "times in a row" in report.problems[1].problem


def test_a_bad_remote_index_or_manifest_is_named(server, dataset_folder):
    (dataset_folder / "labels-only" / "_info.json").write_bytes(b"{")
    (dataset_folder / "colours" / "train.index.safetensors").unlink()
    report = check(server.url)
    assert named(report) == {("labels-only", None, None), ("colours", None, None)}
    assert [(each.config, each.num_samples) for each in report.splits] == [("colours", 13)]


def test_a_missing_remote_dataset_raises(server, dataset_folder):
    with pytest.raises(FileNotFoundError, match="no dataset at"):
        check(f"{server.url}/nowhere")
    with pytest.raises(rd.DatasetError, match="no config 'blue'"):
        check(server.url, "blue")


# The report


def test_the_report_as_json_and_its_summary(dataset_folder):
    rewrite(dataset_folder / "labels-only", lambda samples: [sample.__setitem__(3, b"x") for sample in samples])
    rewrite(dataset_folder / "colours", lambda samples: [sample.__setitem__(2, b"x") for sample in samples])
    report = check(dataset_folder)
    content = json.loads(report.to_json())
    assert content["ok"] is False
    assert content["splits"][0] == {
        "config": "colours", "split": "train", "num_samples": 13, "num_shards": 3,
        "num_bytes": report.splits[0].num_bytes,
    }  # fmt: skip
    assert len(content["problems"]) == 26
    assert set(content["problems"][0]) == {"config", "split", "shard", "key", "problem"}
    lines = str(report).splitlines()
    assert len(lines) == 2 + 20 + 2
    assert lines[2].startswith(f"colours/train-00000-of-00003.tar: '{keys_of(dataset_folder / 'colours', 0)[0]}': ")
    assert lines[-2] == "... and 6 more"
    assert lines[-1].startswith(f"{dataset_folder}: 26 problems, ")
    assert str(replace(report, problems=report.problems[:1])).splitlines()[-1].split(": ")[1].startswith("1 problem,")


def test_the_progress_bar_counts_samples_on_stderr(dataset_folder, capsys):
    flip(shard_of(dataset_folder / "colours", 0), 512)
    rd.verify(dataset_folder, num_workers=0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "26/26" in captured.err
    assert "bad=2" in captured.err
    check(dataset_folder)
    assert capsys.readouterr().err == ""
