import io
import os
import pickle
import struct
import tarfile
import zipfile

import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.annotate import published
from relabel_datasets.annotate.published import parse_map
from tests.annotate.releases import CLASSES, pack, publish, random_map, run, save, write_release


@pytest.fixture
def release(tmp_path, image_folder):
    """Folder of label maps of `image_folder`, 5 locations high and 7 wide, with 2 of 3 classes per location."""
    write_release(tmp_path / "release", image_folder, lambda i, _: publish(random_map(i)))
    return tmp_path / "release"


class Evil:
    """Object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def changed(change):
    tensor = publish(random_map(0))
    change(tensor)
    return save(tensor)


def assign(index, value):
    return changed(lambda tensor: tensor.__setitem__(index, value))


def deflated(tensor):
    """Return a torch file with compressed content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(save(tensor))) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return buffer.getvalue()


GOOD = save(publish(random_map(0)))


BAD_FILES = {
    "nan": (assign((0, 0, 0, 0), float("nan")), "scores must be finite"),
    "inf": (assign((0, 1, 4, 6), float("-inf")), "scores must be finite"),
    "too large for float16": (assign((0, 0, 0, 0), 1e6), "within float16"),
    "class beyond the last": (assign((1, 0, 0, 0), 3.0), r"must be in 0 \.\. 2, got 0 \.\. 3"),
    "negative class": (assign((1, 0, 0, 0), -1.0), r"must be in 0 \.\. 2, got -1"),
    "nan class": (assign((1, 0, 0, 0), float("nan")), "whole numbers"),
    "half a class": (assign((1, 0, 0, 0), 0.5), "whole numbers"),
    "class twice": (changed(lambda tensor: tensor[1, 0].copy_(tensor[1, 1])), "repeated at one location"),
    "other dtype": (save(publish(random_map(0)).half()), r"expected torch.float32 .* got torch.float16"),
    "one half": (save(publish(random_map(0))[:1]), r"got torch.float32 \[1, 2, 5, 7\]"),
    "three axes": (save(torch.zeros(2, 5, 7)), r"got torch.float32 \[2, 5, 7\]"),
    "empty axis": (save(torch.zeros(2, 0, 5, 7)), r"got torch.float32 \[2, 0, 5, 7\]"),
    "another size": (save(publish(random_map(0, (5, 6)))), r"expected \[2, 5, 7\] as in the other files, got \[2, 5, 6\]"),
    "one number shown often": (save(torch.zeros(1).expand(2, 2, 10**4, 10**6)), "stores less"),
    "list": (save([torch.zeros(2, 2, 5, 7)]), "expected a dense tensor, got list"),
    "parameter": (save(torch.nn.Parameter(torch.zeros(2, 2, 5, 7))), "got Parameter"),
    "sparse": (save(publish(random_map(0)).to_sparse()), "got torch.sparse_coo"),
    "empty file": (b"", "damaged"),
    "text": (b"not a tensor", "damaged"),
    "truncated": (GOOD[:-200], "damaged"),
    "truncated in the middle": (GOOD[:500], "damaged"),
    "legacy truncated": (save(publish(random_map(0)), _use_new_zipfile_serialization=False)[:-100], "damaged"),
    "large": (GOOD + bytes(1 << 20), "at most 1048576 bytes"),
    "zip bomb": (deflated(torch.zeros(2, 2, 500, 7000)), "is a compressed zip file"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")  # of torch with weights_only
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_stops_the_import_with_its_name_and_leaves_no_files(tmp_path, release, name):
    content, message = BAD_FILES[name]
    bad = release / "dog" / "photo_04.pt"
    bad.write_bytes(content)
    with pytest.raises(rd.errors.LabelMapError, match=message) as caught:
        run(release, tmp_path / "data", shard_size=3)
    assert str(caught.value).count(str(bad)) == 1
    assert "skip_bad=True" in str(caught.value)
    assert not (tmp_path / "data" / "relabel").exists()


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_pickled_code_is_not_executed(tmp_path, release, monkeypatch, form):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # ignored if weights_only is given
    trace = tmp_path / "trace"
    evil = [publish(random_map(0)), Evil(trace)]
    content = (
        pickle.dumps(evil[1], protocol=2)
        if form == "pickle"
        else save(evil, _use_new_zipfile_serialization=form == "zip")
    )
    (release / "cat" / "photo_00.pt").write_bytes(content)
    with pytest.raises(
        rd.errors.LabelMapError,
        match=r"photo_00.pt: is damaged, or contains objects other than a tensor; no code was executed",
    ):
        run(release, tmp_path / "data")
    assert not trace.exists()
    torch.load(io.BytesIO(save(evil)), weights_only=False)
    assert trace.exists()  # without weights_only the code is executed


def test_a_legacy_file_that_claims_terabytes_is_refused(tmp_path):
    content = bytearray(save(torch.zeros(2, 2, 5, 7), _use_new_zipfile_serialization=False))
    numel = struct.pack("<BB", ord("K"), 140)  # length of the storage in the pickle
    assert content.count(numel) >= 1
    content = content.replace(numel, struct.pack("<BBQ", 0x8A, 8, 1 << 42), 1)
    with pytest.raises(rd.errors.LabelMapError, match="damaged"):
        parse_map(bytes(content), torch.float32, 3)


def test_files_in_the_legacy_format_of_torch_are_read(tmp_path):
    tensor = publish(random_map(0))
    logits, classes = parse_map(save(tensor, _use_new_zipfile_serialization=False), torch.float32, 3)
    assert torch.equal(logits, tensor[0])
    assert torch.equal(classes, tensor[1].long())


def test_non_contiguous_tensors_are_read(tmp_path):
    tensor = publish(random_map(0))
    logits, classes = parse_map(save(tensor.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)), torch.float32, 3)
    assert torch.equal(logits, tensor[0])  # as saved by the generator of TokenLabeling
    assert torch.equal(classes, tensor[1].long())


def tar_of(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, content, changes in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for field, value in changes.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(content))
    return path


SYMLINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("cat/a.pt", b"", SYMLINK)], "cat/a.pt is a link"),
        ([("cat/a.pt", b"", {**SYMLINK, "type": tarfile.LNKTYPE})], "cat/a.pt is a link"),
        ([("cat/a.pt", b"", {"type": tarfile.FIFOTYPE})], "cat/a.pt is a link or a special file"),
        ([("../cat/a.pt", GOOD, {})], "within the tar"),
        ([("x/../../cat/a.pt", GOOD, {})], "within the tar"),
        ([("/cat/a.pt", GOOD, {})], "within the tar"),
        ([("a.pt", GOOD, {})], "must be a path <class>/<name>.pt"),
        ([("cat/a.pt", GOOD, {}), ("x/dog/b.pt", GOOD, {})], "x/dog/b.pt is not below the same folder"),
        ([("cat/a.pt", GOOD, {}), ("cat/a.pt", GOOD, {}), ("dog/b.pt", GOOD, {})], "2 label maps have the key 'a'"),
        ([("cat/a.pt", GOOD, {}), ("dog/a.pt", GOOD, {})], "2 label maps have the key 'a'"),
        ([("cat/a.pt", GOOD, {})], "at least two classes"),
        ([("readme.txt", b"text", {})], "has no label maps"),
    ],
)  # fmt: skip
def test_tars_with_other_content_are_refused(tmp_path, members, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        rd.annotate.PublishedMaps(tar_of(tmp_path / "release.tar", *members), "relabel")


def test_truncated_damaged_and_compressed_tars_are_refused(tmp_path, release):
    path = pack(release, tmp_path / "release.tar")
    whole = path.read_bytes()
    compressed = pack(release, tmp_path / "release.tar.gz", mode="w:gz")
    damaged = bytearray(whole)
    damaged[whole.index(b"relabel_imagenet/dog/photo_04.pt")] ^= 1  # the checksum of the header is that of another name
    maps = rd.annotate.PublishedMaps(path, "relabel")
    starts = [maps._files._extents[2 * i] - 512 for i in range(13)]
    for name, content in (
        ("at a member", whole[: max(starts)]),
        ("in a member", whole[: max(starts) + 700]),
        ("in a header", whole[: max(starts) + 100]),
        ("damaged", bytes(damaged)),
        ("compressed", compressed.read_bytes()),
        ("empty", b""),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(rd.DatasetError, match=r"truncated|damaged"):
            rd.annotate.PublishedMaps(tmp_path / name, "relabel")


def test_errors_name_the_bad_file_in_a_tar(tmp_path, release):
    (release / "cat" / "photo_00.pt").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(
        rd.errors.LabelMapError, match=r"release.tar: relabel_imagenet/cat/photo_00.pt has 1048577 bytes"
    ):
        run(pack(release, tmp_path / "release.tar"), tmp_path / "data")


def test_pipes_are_refused_without_blocking_and_other_files_are_ignored(tmp_path, release):
    (release / "cat" / "._photo_00.pt").write_bytes(b"of macOS")
    (release / "cat" / "notes.txt").write_bytes(b"text")
    (release / "readme.pt").write_bytes(b"in no class")
    assert len(rd.annotate.PublishedMaps(release, "relabel")) == 13
    os.mkfifo(release / "cat" / "pipe.pt")
    with pytest.raises(rd.errors.LabelMapError, match=r"pipe.pt is not a regular file"):
        run(release, tmp_path / "data")


def test_errors_name_missing_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no label maps at .*nowhere"):
        rd.annotate.PublishedMaps(tmp_path / "nowhere", "relabel")
    with pytest.raises(FileNotFoundError, match="has no label maps"):
        rd.annotate.PublishedMaps(tmp_path, "relabel")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("cat", "dog"), r"1 folder not among the 2 classes, such as 'emu'"),
        (("cat", "dog", "emu", "cat"), "at least two classes with distinct names"),
        (tuple(map(str, range(3000))), "folders not among"),
    ],
)
def test_classes_must_include_all_folders(release, classes, message):
    with pytest.raises(ValueError, match=message):
        rd.annotate.PublishedMaps(release, "relabel", classes)


def test_more_classes_than_half_precision_can_represent_are_refused(release):
    many = (*CLASSES, *map(str, range(2046)))
    rd.annotate.PublishedMaps(release, "relabel", many)
    rd.annotate.PublishedMaps(release, "tokenlabeling", many[:2048])
    with pytest.raises(ValueError, match="can represent 2048 classes, not 2049"):
        rd.annotate.PublishedMaps(release, "tokenlabeling", many)


def test_errors_and_options_list_every_format(release):
    with pytest.raises(ValueError, match=repr(sorted(published.FORMATS))[1:-1]):
        rd.annotate.PublishedMaps(release, "other")
