"""`verify` on real datasets that are damaged in every way: it must report all problems and nothing else."""

import json
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest

import relabel_datasets as rd
from tests.conftest import picture
from tests.shards.damage import (
    build,
    check,
    flip,
    keys_of,
    named,
    positions_of,
    rewrite,
    shard_of,
    texts,
)

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
