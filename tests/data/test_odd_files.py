"""Unusual files on real disks and in real tars are read, ignored, or skipped with a reason, and never block."""

import ctypes
import io
import logging
import os
import shutil
import socket
import subprocess
import tarfile
from contextlib import contextmanager
from pathlib import Path

import pytest

import relabel_datasets as rd
from relabel_datasets.data.clutter import is_clutter
from tests.conftest import ColourNet, picture

CLASSES = ("cat", "dog", "emu")


def jpeg(seed):
    buffer = io.BytesIO()
    picture(seed, (24, 32)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(40)


@pytest.fixture
def folder(tmp_path):
    """An ImageFolder with two images per class."""
    for i in range(6):
        path = tmp_path / "images" / CLASSES[i % 3] / f"photo_{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    return tmp_path / "images"


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def bind_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket has a limit of about 100 characters
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def loop_of_two(root):
    (root / "cat" / "x").symlink_to(root / "dog")
    (root / "dog" / "y").symlink_to(root / "cat")


def build(source, root):
    annotator = rd.ModuleAnnotator(ColourNet(), (24, 24), classes=CLASSES, name="colours")
    return rd.build(source, root, annotator, progress=False)


KEYS = {f"photo_{i}" for i in range(6)}
IN_FOLDERS = {  # what is put there, the keys then built, and what is skipped with which reason
    "AppleDouble": (lambda root: put(root / "cat" / "._photo_0.jpg", APPLE_DOUBLE), KEYS, {}),
    "__MACOSX": (lambda root: put(root / "__MACOSX" / "cat" / "._photo_0.jpg", APPLE_DOUBLE), KEYS, {}),
    "__MACOSX in a class": (lambda root: put(root / "cat" / "__MACOSX" / "photo_9.jpg", APPLE_DOUBLE), KEYS, {}),
    ".DS_Store": (lambda root: [put(root / name / ".DS_Store", b"Bud1") for name in ("", "cat")], KEYS, {}),
    "Thumbs.db": (lambda root: put(root / "cat" / "Thumbs.db", b"\xd0\xcf\x11\xe0"), KEYS, {}),
    "desktop.ini": (lambda root: put(root / "cat" / "desktop.ini", b"[.ShellClassInfo]"), KEYS, {}),
    "checkpoints": (lambda root: put(root / "cat" / ".ipynb_checkpoints" / "a-checkpoint.jpg", jpeg(1)), KEYS, {}),
    "checkpoints next to classes": (lambda root: put(root / ".ipynb_checkpoints" / "a.jpg", jpeg(1)), KEYS, {}),
    "thumbnails of Synology": (lambda root: put(root / "cat" / "@eaDir" / "photo_0.jpg" / "T.jpg", jpeg(1)), KEYS, {}),
    "lost+found": (lambda root: (root / "lost+found").mkdir(), KEYS, {}),
    "hidden image": (lambda root: put(root / "cat" / ".photo.jpg", b"no image"), KEYS, {}),
    "loop to its folder": (lambda root: (root / "cat" / "again").symlink_to(root / "cat"), KEYS, {}),
    "loop to the root": (lambda root: (root / "cat" / "again").symlink_to(root), KEYS, {}),
    "loop to above the root": (lambda root: (root / "cat" / "again").symlink_to(root.parent), KEYS, {}),
    "relative loop": (lambda root: (root / "cat" / "again").symlink_to("../cat"), KEYS, {}),
    "class that is a loop": (lambda root: (root / "self").symlink_to(root), KEYS, {}),
    "link to itself": (
        lambda root: (root / "cat" / "self.jpg").symlink_to("self.jpg"),
        KEYS,
        {"self": "symbolic links"},
    ),
    "dangling link": (lambda root: (root / "cat" / "gone.jpg").symlink_to("nowhere"), KEYS, {"gone": "No such file"}),
    "dangling class": (lambda root: (root / "cow").symlink_to("nowhere"), KEYS, {}),
    "FIFO": (lambda root: os.mkfifo(root / "cat" / "fifo.jpg"), KEYS, {"fifo": "is a FIFO, expected a regular file"}),
    "link to a FIFO": (
        lambda root: [os.mkfifo(root.parent / "fifo"), (root / "cat" / "a.jpg").symlink_to(root.parent / "fifo")],
        KEYS,
        {"a": "is a FIFO"},
    ),
    "device": (lambda root: (root / "cat" / "zero.jpg").symlink_to("/dev/zero"), KEYS, {"zero": "is a device"}),
    "socket": (lambda root: bind_socket(root / "cat" / "socket.jpg"), KEYS, {"socket": "is a socket"}),
    "folder called .jpg": (lambda root: put(root / "cat" / "album.jpg" / "in.jpg", jpeg(7)), KEYS | {"in"}, {}),
    "empty file": (lambda root: put(root / "cat" / "empty.jpg", b""), KEYS, {"empty": "cannot be read as an image"}),
    "link to an image": (
        lambda root: [put(root.parent / "blob", jpeg(8)), (root / "cat" / "link.jpg").symlink_to(root.parent / "blob")],
        KEYS | {"link"},
        {},
    ),
    "class that is a link": (
        lambda root: [shutil.move(root / "dog", root.parent / "dogs"), (root / "dog").symlink_to(root.parent / "dogs")],
        KEYS,
        {},
    ),
}


@pytest.mark.parametrize("name", IN_FOLDERS)
def test_odd_files_in_an_image_folder(name, folder, tmp_path):
    change, keys, skipped = IN_FOLDERS[name]
    change(folder)
    manifest = build(rd.data.ImageFolderSource(folder), tmp_path / "data")
    assert set(rd.LabelMaps(tmp_path / "data")) == keys
    reasons = {entry["key"]: entry["error"] for entry in manifest.splits["train"].skipped}
    assert reasons.keys() == skipped.keys()
    for key, reason in skipped.items():
        assert reason in reasons[key]
    assert rd.verify(tmp_path / "data", num_workers=0, progress=False).ok


def test_a_loop_of_two_links_has_each_image_once_per_class(folder, caplog):
    loop_of_two(folder)
    source = rd.data.ImageFolderSource(folder)
    assert sorted(source.keys) == sorted(
        [f"{path}/photo_{i}" for path, i in (("cat", 0), ("cat", 3), ("cat/x", 1), ("cat/x", 4))]
        + [f"{path}/photo_{i}" for path, i in (("dog", 1), ("dog", 4), ("dog/y", 0), ("dog/y", 3))]
        + ["emu/photo_2", "emu/photo_5"]
    )
    assert "2 files ignored: 2 links to a parent folder" in caplog.text


_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1 << 1, 1 << 2  # bits of linux/capability.h


@contextmanager
def without_privileges():
    """Make root obey the permissions of files. It keeps access to its own files, such as the modules that are still to be imported."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None)
    this_thread = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the interface; threads started later inherit
    before = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable capabilities, twice
    assert libc.capget(this_thread, before) == 0
    reduced = (ctypes.c_uint32 * 6)(before[0] & ~(_CAP_DAC_OVERRIDE | _CAP_DAC_READ_SEARCH), *before[1:])
    assert libc.capset(this_thread, reduced) == 0
    try:
        yield
    finally:
        assert libc.capset(this_thread, before) == 0


def test_files_without_read_permission_are_skipped_and_such_folders_are_an_error(folder, tmp_path):
    (folder / "cat" / "photo_3.jpg").chmod(0)
    with without_privileges():
        manifest = build(rd.data.ImageFolderSource(folder), tmp_path / "data")
    assert [(entry["key"], "Permission denied" in entry["error"]) for entry in manifest.splits["train"].skipped] == [
        ("photo_3", True)
    ]
    put(folder / "cat" / "deep" / "photo_9.jpg", jpeg(9))
    (folder / "cat" / "deep").chmod(0)
    with without_privileges(), pytest.raises(PermissionError, match="deep"):
        rd.data.ImageFolderSource(folder)


def test_files_deleted_after_the_scan_are_skipped(folder, tmp_path):
    source = rd.data.ImageFolderSource(folder)
    (folder / "cat" / "photo_0.jpg").unlink()
    manifest = build(source, tmp_path / "data")
    assert [entry["key"] for entry in manifest.splits["train"].skipped] == ["photo_0"]


# Tars


def member(name, data=b"", kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, len(data)
    return info, data


def sample(name, i, field="jpg"):
    return [member(f"{name}.{field}", jpeg(i)), member(f"{name}.cls", b"%d" % (i % 3))]


def write_tar(path, members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


LONG = "/".join(["a_folder_with_a_long_name"] * 12) + "/k2"
IN_TARS = {  # members next to samples k0 and k1, the expected keys, and the skipped members with their reasons
    "AppleDouble": ([member("d/._k0.jpg", APPLE_DOUBLE)], set(), {}),
    "AppleDouble below .": ([member("./._k0.jpg", APPLE_DOUBLE), member("./d/._k0.cls", APPLE_DOUBLE)], set(), {}),
    "__MACOSX": ([member("__MACOSX/d/._k0.jpg", APPLE_DOUBLE), member("__MACOSX/d/k0.jpg", APPLE_DOUBLE)], set(), {}),
    "system files": (
        [member(".DS_Store"), member("d/.DS_Store"), member("d/Thumbs.db"), member("desktop.ini")],
        set(),
        {},
    ),
    "checkpoints": (sample("d/.ipynb_checkpoints/k0-checkpoint", 4), set(), {}),
    "hidden folder": (sample(".hidden/k2", 4), set(), {}),
    "in the folder itself": (sample("./k2", 4), {"k2"}, {}),
    "thumbnails of Synology": ([member("d/@eaDir/k0.jpg/T.jpg", jpeg(3))], set(), {}),
    "hard link": ([member("k2.jpg", kind=tarfile.LNKTYPE, target="k0.jpg"), member("k2.cls", b"0")], {"k2"}, {}),
    "hard link to a hard link": (
        [
            member("k2.jpg", kind=tarfile.LNKTYPE, target="k0.jpg"),
            member("k3.jpg", kind=tarfile.LNKTYPE, target="k2.jpg"),
            member("k2.cls", b"0"),
            member("k3.cls", kind=tarfile.LNKTYPE, target="k0.cls"),
        ],
        {"k2", "k3"},
        {},
    ),
    "hard link to nothing": (
        [member("k2.jpg", kind=tarfile.LNKTYPE, target="gone.jpg"), member("k2.cls", b"0")],
        set(),
        {"k2": "a hard link to a file that is not in the tar"},
    ),
    "symbolic link": (
        [member("k2.jpg", kind=tarfile.SYMTYPE, target="k0.jpg"), member("k2.cls", b"0")],
        set(),
        {"k2": "a symbolic link: write the tar with --dereference"},
    ),
    "symbolic link to outside": (
        [member("k2.jpg", kind=tarfile.SYMTYPE, target="/etc/passwd"), member("k2.cls", b"0")],
        set(),
        {"k2": "a symbolic link"},
    ),
    "FIFO": (
        [member("k2.jpg", kind=tarfile.FIFOTYPE), member("k2.cls", b"0")],
        set(),
        {"k2": "has no image, only .cls"},
    ),
    "device": ([member("k2.jpg", kind=tarfile.CHRTYPE), member("k2.cls", b"0")], set(), {"k2": "has no image, only"}),
    "folder called .jpg": ([member("k2.jpg", kind=tarfile.DIRTYPE)], set(), {}),
    "long name": (sample(LONG, 4), {LONG}, {}),
    "odd alphabets": (sample("größe/사과", 4), {"größe/사과"}, {}),
}


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
@pytest.mark.parametrize("name", IN_TARS)
def test_odd_members_of_a_tar(name, tar_format, tmp_path):
    members, keys, skipped = IN_TARS[name]
    path = write_tar(tmp_path / "s.tar", [*sample("k0", 0), *members, *sample("k1", 1)], format=tar_format)
    source = rd.data.WebDatasetSource([path])
    assert set(source.keys) == {"k0", "k1"} | keys
    for index, key in enumerate(source.keys):
        expected = {"k0": 0, "k1": 1, "k2": 0, "k3": 0}[key] if "link" in name else None
        assert source.read(index) == jpeg({"k0": 0, "k1": 1}.get(key, 4) if expected is None else expected)
    reasons = {entry.key: entry.error for entry in source.skipped}
    assert reasons.keys() == skipped.keys()
    for key, reason in skipped.items():
        assert reason in reasons[key]


def test_the_error_for_tars_with_symbolic_links_only_says_what_to_do(tmp_path):
    members = [member(f"k{i}.jpg", kind=tarfile.SYMTYPE, target=f"../../blobs/{i}") for i in range(3)]
    with pytest.raises(rd.DatasetError, match=r"no sample with an image: first .*write the tar with --dereference"):
        rd.data.WebDatasetSource([write_tar(tmp_path / "s.tar", members)])


def test_hidden_files_of_a_tar_are_counted_for_debugging(tmp_path, caplog):
    members = [*sample("k0", 0), member("._k0.jpg", APPLE_DOUBLE), member("__MACOSX/._k0.jpg", APPLE_DOUBLE)]
    path = write_tar(tmp_path / "s.tar", members)
    with caplog.at_level(logging.DEBUG, logger="relabel_datasets"):
        rd.data.WebDatasetSource([path])
    (record,) = [record for record in caplog.records if record.name.startswith("relabel_datasets")]
    assert (record.levelno, "2 hidden files ignored" in record.getMessage()) == (logging.DEBUG, True)


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar")
@pytest.mark.parametrize("tar_format", ["v7", "oldgnu", "gnu", "ustar", "pax"])
def test_tars_of_gnu_tar_with_hard_links_in_every_format(folder, tmp_path, tar_format):
    os.link(folder / "cat" / "photo_0.jpg", folder / "emu" / "photo_9.jpg")
    subprocess.run(
        ["tar", f"--format={tar_format}", "-cf", str(tmp_path / "s.tar"), "-C", str(folder), "."], check=True
    )
    source = rd.data.WebDatasetSource([tmp_path / "s.tar"])
    found = {key: source.read(index) for index, key in enumerate(source.keys)}
    expected = {str(path.relative_to(folder).with_suffix("")): path.read_bytes() for path in folder.rglob("*.jpg")}
    assert found == expected
    assert "emu/photo_9" in found


def test_names_in_other_encodings_have_valid_keys(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, encoding="latin-1") as tar:
        for info, data in [*sample("k0", 0), *sample("gr\xf6\xdfe", 1)]:
            tar.addfile(info, io.BytesIO(data))
    assert set(rd.data.WebDatasetSource([path]).keys) == {"k0", "gr\xf6\xdfe"}  # PAX has UTF-8 whatever the encoding
    for tar_format in (tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        with tarfile.open(path, "w", format=tar_format, encoding="latin-1") as tar:
            for info, data in [*sample("k0", 0), *sample("gr\xf6\xdfe", 1)]:
                tar.addfile(info, io.BytesIO(data))
        source = rd.data.WebDatasetSource([path])
        assert list(source.keys) == ["k0", "gr%F6%DFe"]
        assert source.read(1) == jpeg(1)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_called_tar_is_refused_with_advice(tmp_path, mode):
    path = tmp_path / "s.tar"
    with tarfile.open(path, mode) as tar:
        for info, data in sample("k0", 0):
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(rd.DatasetError, match=r"s\.tar is compressed by (gzip|bzip2|xz): .*decompress it first"):
        rd.data.WebDatasetSource([path])


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        ("a/b.jpg", False), ("./a.jpg", False), ("../a.jpg", False), ("a/./b.jpg", False), ("a.b/c.jpg", False),
        ("_/a.jpg", False), ("__a/b.jpg", False), ("lost/found.jpg", False), ("thumbs.db.jpg", False),
        (".a.jpg", True), ("a/.b.jpg", True), (".a/b.jpg", True), ("./.a.jpg", True), ("...", True),
        ("__MACOSX/a.jpg", True), ("a/__MACOSX/b.jpg", True), ("THUMBS.DB", True), ("lost+found/a.jpg", True),
        ("$RECYCLE.BIN/a.jpg", True), ("System Volume Information/a.jpg", True), ("a/@eaDir/b.jpg", True),
    ],
)  # fmt: skip
def test_clutter_is_recognized_by_name(path, ignored):
    assert is_clutter(path) is ignored
