"""WebDataset tars with samples without image or class, classes in other members, empty and compressed tars."""

import gzip
import subprocess
import tarfile

import pytest

import relabel_datasets as rd
from relabel_datasets.cli import main
from tests.conftest import jpeg, write_tar
from tests.readers import IGNORED_WARNINGS, assert_read_everywhere
from tests.versions import needs

pytestmark = [pytest.mark.filterwarnings(each) for each in IGNORED_WARNINGS]


# Text of a .cls, and its class index; -1: no class; None: an error
CLASS_TEXTS = {
    b"2": 2, b"2\n": 2, b" 2 \r\n": 2, b"+2": 2, b"002": 2, b"-1": -1, b"-7": -1,
    b"": None, b"dog": None, b"n01440764": None, b"1.0": None, b"1_0": None, b"[1]": None, b"0x2": None, b"\xff": None,
    b"99999999999999999999999": None, b"2 3": None,
}  # fmt: skip


@pytest.mark.parametrize("text", CLASS_TEXTS)
def test_a_class_index_is_a_decimal_number_with_white_space_around_it(text, tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.jpg", jpeg(0)), ("a.cls", text), ("b.jpg", jpeg(1)), ("b.cls", b"0")])
    source = rd.data.WebDatasetSource([path])
    if CLASS_TEXTS[text] is None:
        with pytest.raises(rd.DatasetError, match=r"s\.tar: a\.cls must be a class index, got"):
            _ = source.labels
    else:
        assert list(source.labels) == [CLASS_TEXTS[text], 0]


def test_samples_without_image_or_class_are_skipped_and_listed(tmp_path, annotator, hf_home):
    members = [
        ("a.jpg", jpeg(0)), ("a.cls", b"1"), ("b.txt", b"caption"), ("b.cls", b"0"), ("c.jpg", jpeg(2)), ("d.jpg", jpeg(3)),
        ("d.cls", b"-1"), ("e.jpg", jpeg(4)[:200]), ("e.cls", b"0"), ("f.jpg", jpeg(5)), ("f.seg.png", b"mask"),
        ("f.cls", b"2"), ("README.txt", b"notes"), (f"{'g' * 5000}.jpg", jpeg(6)), ("LICENSE", b"text"),
    ]  # fmt: skip
    source = rd.data.WebDatasetSource([write_tar(tmp_path / "s.tar", members)])
    manifest = rd.build(source, tmp_path / "data", annotator, progress=False)
    skipped = {entry["key"]: entry["error"] for entry in manifest.splits["train"].skipped}
    assert {key[:9] for key in skipped} == {"b", "c", "d", "e", "README", "ggggggggg"}
    tar = tmp_path / "s.tar"
    assert skipped["b"] == f"{tar}: b has no image, only .cls, .txt"
    assert skipped["c"] == f"{tar}: c has no class: its label is missing or negative"
    assert skipped["d"] == f"{tar}: d has no class: its label is missing or negative"
    assert skipped["e"].startswith(f"{tar}: e: cannot be read as an image")
    assert skipped["README"] == f"{tar}: README has no image, only .txt"
    assert "its name makes no valid key" in skipped["g" * 5000]
    assert_read_everywhere(tmp_path / "data", {"a": (1, jpeg(0)), "f": (2, jpeg(5))})


def test_members_of_a_sample_need_not_be_adjacent(tmp_path):
    members = [("a.jpg", jpeg(0)), ("b.jpg", jpeg(1)), ("b.cls", b"1"), ("a.cls", b"0")]
    source = rd.data.WebDatasetSource([write_tar(tmp_path / "s.tar", members)])
    assert (list(source.keys), list(source.labels)) == (["a", "b"], [0, 1])


def test_image_and_class_may_be_in_members_of_any_extension(tmp_path):
    members = []
    for i in range(3):
        members += [
            (f"k{i}.left.jpg", jpeg(i)), (f"k{i}.right.jpg", jpeg(9)), (f"k{i}.index", b"%d" % i),
            (f"k{i}.json", b'{"label": %d, "name": "x", "none": null}' % (2 - i)),
        ]  # fmt: skip
    path = write_tar(tmp_path / "s.tar", members)
    with pytest.raises(
        rd.DatasetError, match=r"k0 has several images, \.left\.jpg, \.right\.jpg: .*image_column=.*'left\.jpg'"
    ):
        rd.data.WebDatasetSource([path])
    source = rd.data.open_source(path, image_column="left.jpg")
    assert [source.read(i) for i in range(3)] == [jpeg(i) for i in range(3)]
    with pytest.raises(
        rd.DatasetError, match=r"no sample has a class index in \.cls, such as sample 'k0'.*label_column="
    ):
        _ = source.labels
    assert list(rd.data.open_source(path, image_column="LEFT.jpg", label_column="index").labels) == [0, 1, 2]
    assert list(rd.data.open_source(path, image_column="left.jpg", label_column="label").labels) == [2, 1, 0]
    with pytest.raises(rd.DatasetError, match=r"k0\.json: name must be a class index, got 'x'"):
        _ = rd.data.open_source(path, image_column="left.jpg", label_column="name").labels
    for absent in ("none", "nothing"):
        with pytest.raises(rd.DatasetError, match=f"no sample has a class index in .{absent}"):
            _ = rd.data.open_source(path, image_column="left.jpg", label_column=absent).labels
    with pytest.raises(rd.DatasetError, match=r"no sample with an image: first .*k0 has no \.png"):
        rd.data.open_source(path, image_column="png")


@pytest.mark.parametrize(
    "text", [b"[1]", b'{"label": true}', b'{"label": 1.5}', b'{"label": [1]}', b'{"label": "1"', b"1"]
)
def test_json_without_a_class_index_is_rejected_by_name(text, tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.jpg", jpeg(0)), ("a.json", text)])
    if text == b"1":
        assert list(rd.data.open_source(path, label_column="label").labels) == [1]
        return
    with pytest.raises(rd.DatasetError, match=r"s\.tar: a\.(json|label)"):
        _ = rd.data.open_source(path, label_column="label").labels


def test_sparse_and_compressed_tars_are_skipped_or_rejected(tmp_path):
    data = jpeg(0)
    (tmp_path / "a.jpg").write_bytes(data + bytes(1 << 20))
    (tmp_path / "b.jpg").write_bytes(jpeg(1))
    subprocess.run(["cp", "--sparse=always", "a.jpg", "c.jpg"], cwd=tmp_path, check=True)
    names = ["c.jpg", "b.jpg"]
    subprocess.run(["tar", "--sparse", "--format=gnu", "-cf", "s.tar", *names], cwd=tmp_path, check=True)
    with tarfile.open(tmp_path / "s.tar") as tar:
        if not tar.getmember("c.jpg").issparse():
            pytest.skip("the file system has no sparse files")
    source = rd.data.WebDatasetSource([tmp_path / "s.tar"])
    assert (list(source.keys), source.read(0)) == (["b"], jpeg(1))
    assert "c.jpg is stored as a sparse file" in source.skipped[0].error
    (tmp_path / "s.tar.gz").write_bytes(gzip.compress((tmp_path / "s.tar").read_bytes()))
    with pytest.raises(rd.DatasetError, match=r"s\.tar\.gz is compressed by gzip: .*decompress it first"):
        rd.data.open_source(tmp_path / "s.tar.gz")


def empty(kind, folder):
    """Return the argument IMAGES and the expected error of `relabel build`."""
    match kind:
        case "a tar without members":
            return write_tar(folder / "s.tar", []), "no sample with an image: no files"
        case "a tar of folders":
            with tarfile.open(folder / "s.tar", "w") as tar:
                member = tarfile.TarInfo("a")
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
            return folder / "s.tar", "no sample with an image: no files"
        case "a tar of no bytes":
            (folder / "s.tar").write_bytes(b"")
            return folder / "s.tar", "s.tar is not an uncompressed tar, or it is corrupt: empty file"
        case "images without extension":
            path = write_tar(folder / "s.tar", [("cat/a", jpeg(0)), ("cat/b", jpeg(1))])
            return path, "no sample with an image: 2 files without an extension ignored"
        case "hidden images":
            return write_tar(
                folder / "s.tar", [("cat/.a.jpg", jpeg(0)), ("._b.jpg", b"")]
            ), "no sample with an image: 2 hidden files ignored"
        case "only text":
            return write_tar(folder / "s.tar", [("a.txt", b"x"), ("a.cls", b"0")]), "a has no image, only .cls, .txt"
        case "no classes":
            return write_tar(
                folder / "s.tar", [("a.jpg", jpeg(0))]
            ), "no sample has a class index in .cls, such as sample 'a'"
        case "a folder without tars and class folders":
            return folder, "has no class folders"
        case "images outside of class folders":
            (folder / "a.jpg").write_bytes(jpeg(0))
            return folder, "but 1 image outside of them: expected images/<class>/<image>"
        case "a class folder without images":
            for name in ("cat/a.jpg", "dog/b.txt"):
                (folder / name).parent.mkdir()
                (folder / name).write_bytes(jpeg(0))
            return folder, "no images in 1 class folder, such as ['dog']; ignored: 1 .txt"
        case "a split without rows":
            import datasets

            features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat"])})
            datasets.Dataset.from_dict({"image": [], "label": []}, features=features).save_to_disk(folder / "saved")
            return folder / "saved", "saved has no rows"
        case "a split that is not there":
            import datasets

            features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat"])})
            rows = datasets.Dataset.from_dict({"image": [None], "label": [0]}, features=features)
            datasets.DatasetDict({"test": rows}).save_to_disk(folder / "saved")
            return folder / "saved", "has no split 'train', only ['test']"
        case "rows without images":
            import datasets

            features = datasets.Features(
                {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "emu"])}
            )
            rows = datasets.Dataset.from_dict({"image": [None] * 3, "label": [0] * 3}, features=features)
            rows.save_to_disk(folder / "saved")
            return folder / "saved", "no image of train-00000-of-00001.tar can be used (3 images), first row "
        case "damaged images":
            for name in ("cat/a.jpg", "dog/b.jpg", "emu/c.jpg"):
                (folder / name).parent.mkdir()
                (folder / name).write_bytes(b"text")
            return folder, "no image of train-00000-of-00001.tar can be used (3 images), first "
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        "a tar without members", "a tar of folders", "a tar of no bytes", "images without extension", "hidden images", "only text",
        "no classes", "a folder without tars and class folders", "images outside of class folders",
        "a class folder without images", pytest.param("a split without rows", marks=needs("datasets", 4)),
        pytest.param("a split that is not there", marks=needs("datasets", 4)), "rows without images", "damaged images",
    ],
)  # fmt: skip
def test_missing_images_are_a_clear_error_and_write_no_output(kind, tmp_path, capsys, hf_home):
    (tmp_path / "images").mkdir()
    images, message = empty(kind, tmp_path / "images")
    annotator = tmp_path / "colours.py"
    annotator.write_text(
        "from relabel_datasets import ModuleAnnotator\nfrom tests.conftest import ColourNet\n\n\n"
        "def make():\n    return ModuleAnnotator(ColourNet(), (48, 64), classes=('cat', 'dog', 'emu'), name='colours')\n"
    )
    assert main(["build", str(images), str(tmp_path / "out"), "--annotator", f"{annotator}:make"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list((tmp_path / "out").rglob("*.tar"))
    assert not list((tmp_path / "out").rglob("_info.json"))
    if "rows" not in kind and "damaged" not in kind:
        assert not (tmp_path / "out").exists()
