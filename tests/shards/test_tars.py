import hashlib
import tarfile

import pytest

from relabel_datasets.errors import DatasetError
from relabel_datasets.shards.manifest import Split
from relabel_datasets.shards.tars import ShardReader, ShardWriter, shard_names
from relabel_datasets.storage.folders import LocalFolder

SAMPLES = [("a/one", 0, b"\xff\xd8 image", b"map one"), ("two", 12, b"x" * 512, b"m" * 1500), ("d" * 150, 3, b"", b"q")]


def write(path, extension="jpg", samples=SAMPLES):
    with ShardWriter(path, extension) as writer:
        for sample in samples:
            writer.add(*sample)
        return writer.close()


def split_of(info, name="train-0.tar"):
    return Split(
        "train",
        len(info.rows),
        [name],
        [len(info.rows)],
        [info.num_bytes],
        [info.sha256],
        [],
        "",
        0,
        "",
        "jpg",
        None,
        "",
    )


def test_shards_are_read_by_tarfile(tmp_path):
    path = tmp_path / "train-0.tar"
    info = write(path)
    with tarfile.open(path) as tar:
        members = {member.name: (member, tar.extractfile(member).read()) for member in tar}
    assert list(members)[:3] == ["a/one.jpg", "a/one.cls", "a/one.safetensors"]
    for key, label, image, label_map in SAMPLES:
        assert members[f"{key}.jpg"][1] == image
        assert members[f"{key}.cls"][1] == str(label).encode()
        assert members[f"{key}.safetensors"][1] == label_map
    assert all((m.mtime, m.uid, m.gid, m.uname, m.gname) == (0, 0, 0, "", "") for m, _ in members.values())
    assert info.num_bytes == path.stat().st_size
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_two_runs_write_equal_bytes(tmp_path):
    assert write(tmp_path / "1.tar").sha256 == write(tmp_path / "2.tar").sha256


def test_members_are_read_by_offset(tmp_path):
    info = write(tmp_path / "train-0.tar")
    reader = ShardReader(LocalFolder(tmp_path), split_of(info))
    for number, (row, (key, _, image, label_map)) in enumerate(zip(info.rows, SAMPLES, strict=True)):
        assert reader.read(number, (row.map_offset, row.map_size), f"{key}.safetensors") == label_map
        assert reader.read(number, (row.image_offset, row.image_size), f"{key}.jpg") == image


def test_label_only_shards_have_no_image_members(tmp_path):
    write(tmp_path / "train-0.tar", extension=None)
    with tarfile.open(tmp_path / "train-0.tar") as tar:
        assert {name.rpartition(".")[2] for name in tar.getnames()} == {"cls", "safetensors"}


def test_an_exception_leaves_no_file(tmp_path):
    def fail():
        with ShardWriter(tmp_path / "train-0.tar", "jpg") as writer:
            writer.add(*SAMPLES[0])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["img.v1", "", "/absolute"])
def test_keys_that_readers_would_split_are_refused(tmp_path, key):
    with ShardWriter(tmp_path / "train-0.tar", None) as writer, pytest.raises(ValueError, match="key"):
        writer.add(key, 0, None, b"")


def test_a_shard_of_wrong_size_is_refused(tmp_path):
    path = tmp_path / "train-0.tar"
    info = write(path)
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(DatasetError, match=r"train-0\.tar has \d+ bytes"):
        ShardReader(LocalFolder(tmp_path), split_of(info)).read(0, (512, 1), "a/one.jpg")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-0\.tar"):
        ShardReader(LocalFolder(tmp_path), split_of(info)).read(0, (512, 1), "a/one.jpg")


def test_a_shard_that_contradicts_its_index_is_refused(tmp_path):
    info = write(tmp_path / "train-0.tar")
    other = info.rows[1]
    with pytest.raises(DatasetError, match="index and shard"):
        ShardReader(LocalFolder(tmp_path), split_of(info)).read(
            0, (other.map_offset, other.map_size), "a/one.safetensors"
        )


def test_names_contain_the_number_of_shards():
    assert shard_names("train", 2) == ["train-00000-of-00002.tar", "train-00001-of-00002.tar"]
