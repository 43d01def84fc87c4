"""File names as they occur on disks and in tars become valid keys that are equal in every reader."""

import os
import re
from urllib.parse import unquote_to_bytes

import datasets
import pytest
import webdataset
from datasets.packaged_modules.webdataset import webdataset as datasets_webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

import relabel_datasets as rd
from relabel_datasets.data.clutter import is_clutter
from relabel_datasets.data.keys import key_from_member, key_from_path, key_of, sample_keys
from relabel_datasets.naming import is_key
from tests.conftest import jpeg, write_tar
from tests.readers import IGNORED_WARNINGS, assert_read_everywhere
from tests.versions import needs

pytestmark = [pytest.mark.filterwarnings(each) for each in IGNORED_WARNINGS]

# Member of a tar -> key in our shards
MEMBERS = {
    "a.jpg": "a",
    "./b.jpg": "b",
    "/c.jpg": "c",
    "v1.0/d.jpg": "v1%2E0/d",
    "x//e.jpg": "x/e",
    "x/./f.jpg": "x/f",
    "../g.jpg": "%2E%2E/g",
    "../../h.jpg": "%2E%2E/%2E%2E/h",
    "__i.jpg": "%5F_i",
    "x/__j.jpg": "x/%5F_j",
    "__x/k.jpg": "%5F_x/k",
    "_x/_l.jpg": "_x/_l",
    "m.JPG": "m",
    "n.seg.jpg": "n",
    " o .jpg": "%20o%20",
    "größe/p.jpg": "größe/p",
    "q%41.jpg": "q%2541",
    "r\\s.jpg": "r%5Cs",
    "t\nu.jpg": "t%0Au",
    "t\x7f.jpg": "t%7F",
    "v..jpg": "v",
    "w:*?[x]{y}.jpg": "w:*?[x]{y}",
    f"{'folder/' * 30}z.jpg": f"{'folder/' * 30}z",
    os.fsdecode(b"\xf6\xdf.jpg"): "%F6%DF",
}
# Members that webdataset does not read as samples, and one in a hidden folder, see `clutter`
IGNORED = [".a.jpg", "__meta__/a.jpg", "README", "x/LICENSE", ".hidden/none.jpg"]


@pytest.fixture
def tar_of_names(tmp_path):
    members = [(name, jpeg(99)) for name in IGNORED]
    for i, name in enumerate(MEMBERS):
        stem, _, extension = name.rpartition(".")
        stem = stem.removesuffix(".seg").removesuffix(".")
        members += [(name, jpeg(i)), (f"{stem}.{'CLS' if extension == 'JPG' else 'cls'}", str(i % 3).encode())]
    write_tar(tmp_path / "s.tar", members)
    return tmp_path / "s.tar"


def test_a_tar_is_read_with_the_same_grouping_as_by_webdataset(tar_of_names):
    source = rd.data.WebDatasetSource([tar_of_names])
    ours = {key: (source.labels[i], source.read(i)) for i, key in enumerate(source.keys)}
    theirs = {}
    for sample in webdataset.WebDataset(str(tar_of_names), shardshuffle=False):
        if is_clutter(sample["__key__"]):
            continue
        (image,) = [value for field, value in sample.items() if field.endswith("jpg")]
        theirs[key_from_member(sample["__key__"])] = (int(sample["cls"]), image)
    assert ours == theirs == {key: (i % 3, jpeg(i)) for i, key in enumerate(MEMBERS.values())}


def test_names_of_tar_members_become_keys_that_every_reader_reads(tar_of_names, tmp_path, annotator, hf_home):
    rd.build(rd.data.open_source(tar_of_names), tmp_path / "data", annotator, progress=False)
    assert_read_everywhere(tmp_path / "data", {key: (i % 3, jpeg(i)) for i, key in enumerate(MEMBERS.values())})


def test_label_maps_of_a_tar_are_joined_with_it_by_random_access_and_streaming(tar_of_names, tmp_path, annotator):
    options = {"build_config": rd.annotate.BuildConfig(images=False), "progress": False}
    rd.build(rd.data.open_source(tar_of_names), tmp_path / "data", annotator, **options)
    joined = rd.load_dataset(tmp_path / "data", split="train", images=tar_of_names)
    assert len(joined) == len(MEMBERS)
    label_maps = rd.LabelMaps(tmp_path / "data", split="train")
    stream = webdataset.WebDataset(str(tar_of_names), shardshuffle=False)
    keys = [sample["label_map"].key for sample in rd.data.join(stream, label_maps, unmatched="skip", complete=True)]
    assert sorted(keys) == sorted(MEMBERS.values())


@pytest.mark.parametrize("prefix", ["", "./", "train/", "v1.0/"])
def test_label_maps_of_a_folder_are_joined_with_a_tar_of_the_same_files(prefix, tmp_path, annotator):
    names = ["a", "__b", " c", "100%", "d%20e", "größe", "f\\g"]
    for i, name in enumerate(names):
        path = tmp_path / "images" / ("cat", "dog", "emu")[i % 3] / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    write_tar(tmp_path / "s.tar", [(f"{prefix}{name}.jpg", jpeg(i)) for i, name in enumerate(names)])
    source = rd.data.ImageFolderSource(tmp_path / "images")
    assert source.key_rule == "stem"
    rd.build(source, tmp_path / "data", annotator, build_config=rd.annotate.BuildConfig(images=False), progress=False)
    joined = rd.load_dataset(tmp_path / "data", split="train", images=tmp_path / "s.tar")
    images = {source.keys[i]: source.read(i) for i in range(len(names))}
    assert {key: joined._image_bytes(row) for row, key in enumerate(joined.keys)} == images
    stream = webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False)
    samples = rd.data.join(stream, rd.LabelMaps(tmp_path / "data", split="train"), complete=True)
    assert {sample["label_map"].key: sample["jpg"] for sample in samples} == images


def test_a_tar_written_by_this_package_keeps_its_keys(tar_of_names, tmp_path, annotator):
    rd.build(rd.data.open_source(tar_of_names), tmp_path / "data", annotator, progress=False)
    again = rd.data.open_source(tmp_path / "data" / "colours")
    assert sorted(again.keys) == sorted(MEMBERS.values())


# File of a class folder -> key by the rule "path"
FILES = {
    "cat/a.jpg": "cat/a",
    "cat/b.1.jpg": "cat/b%2E1",
    "cat/c..jpg": "cat/c%2E",
    "cat/d.JPEG": "cat/d",
    "cat/__e.jpg": "cat/%5F_e",
    "cat/_f.jpg": "cat/_f",
    "cat/ g .jpg": "cat/%20g%20",
    "cat/100%.jpg": "cat/100%25",
    "cat/v1.0/h.jpg": "cat/v1%2E0/h",
    "v2.0/a.jpg": "v2%2E0/a",
    "v2.0/_x/i.jpg": "v2%2E0/_x/i",
    "__j/a.jpg": "%5F_j/a",
    "__j/größe.jpg": "%5F_j/größe",
}


def test_names_of_files_become_keys_that_every_reader_reads(tmp_path, hf_home):
    from relabel_datasets.annotate.annotator import ModuleAnnotator
    from tests.conftest import ColourNet

    for i, name in enumerate(FILES):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    classes = sorted({name.split("/")[0] for name in FILES})
    annotator = ModuleAnnotator(ColourNet(), (48, 64), classes=classes, name="colours")
    source = rd.data.ImageFolderSource(tmp_path / "images")
    assert source.key_rule == "path"
    rd.build(source, tmp_path / "data", annotator, progress=False)
    expected = {key: (classes.index(name.split("/")[0]), jpeg(i)) for i, (name, key) in enumerate(FILES.items())}
    assert_read_everywhere(tmp_path / "data", expected)


def test_names_of_rows_become_keys_that_every_reader_reads(tmp_path, annotator, hf_home):
    names = {name: name for name in ("a", "b", "_c")} | {
        "dir/d.jpg": "d", "e.v1.png": "e%2Ev1", "__f.jpg": "%5F_f", "http://host/g.jpg": "g", "h.jpg?v=1": "h%2Ejpg?v=1",
        ".i.jpg": "%2Ei", " j.jpg": "%20j",
    }  # fmt: skip
    rows = {
        "image": [{"bytes": jpeg(i), "path": name} for i, name in enumerate(names)],
        "label": [i % 3 for i in range(len(names))],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "emu"])})
    source = rd.data.HFSource(datasets.Dataset.from_dict(rows, features=features))
    rd.build(source, tmp_path / "data", annotator, progress=False)
    keys = {key if key != "h%2Ejpg?v=1" else "h": None for key in names.values()}
    assert len(keys) == len(names)
    assert_read_everywhere(tmp_path / "data", {key: (i % 3, jpeg(i)) for i, key in enumerate(source.keys)})
    assert list(source.keys)[:7] == ["a", "b", "_c", "d", "e%2Ev1", "%5F_f", "g"]
    assert list(source.keys)[8:] == ["%2Ei", "%20j"]


@pytest.mark.parametrize("path", [*(name.rpartition(".")[0] for name in MEMBERS if name != "../g.jpg"), "a%", "é/__é"])
def test_percent_decoding_a_key_returns_the_normalized_path(path):
    key = key_from_path(path)
    assert is_key(key)
    normalized = "/".join(part for part in path.split("/") if part not in ("", "."))
    assert unquote_to_bytes(key) == os.fsencode(normalized)


PATHS = (
    st.text("_.%/\\ aA0\t2E\x7f\x85\u2028", max_size=12)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
    | st.binary(max_size=40).map(os.fsdecode)
)


@needs("datasets", 4)  # earlier releases have no function for it
@settings(deadline=None, derandomize=True)
@given(PATHS.filter(lambda path: any(part not in ("", ".") for part in path.split("/"))))
def test_every_path_has_a_key_that_is_valid_decodes_to_it_and_is_read_back_by_every_reader(path):
    key = key_from_path(path)
    assert is_key(key)
    assert key_from_member(key) == key
    assert unquote_to_bytes(key) == os.fsencode("/".join(part for part in path.split("/") if part not in ("", ".")))
    member = f"{key}.jpg"
    for base_plus_ext in (webdataset.tariterators.base_plus_ext, datasets_webdataset.base_plus_ext):
        assert base_plus_ext(member) == (key, "jpg")
    assert not member.rpartition("/")[2].startswith((".", "__"))  # `datasets` skips these
    assert not re.match(r"__[^/]*__($|/)", member)  # webdataset skips these


def test_a_key_of_a_tar_that_is_percent_encoded_is_kept():
    for key in [*MEMBERS.values(), "a%2Eb"]:
        assert key_from_member(key) == key
    for key in ("100%", "a%20b", "%41", "%2e", "%"):
        assert key_from_member(key) == key_from_path(key) != key


def test_keys_are_stems_if_these_are_unique_and_paths_otherwise():
    assert sample_keys(["a/x.jpg", "b/y.png"]) == ("stem", ["x", "y"])
    assert sample_keys(["a/x.jpg", "b/x.png"]) == ("path", ["a/x", "b/x"])


def test_keys_have_no_dots_and_different_names_have_different_keys():
    paths = ["a/img.v1.jpg", "a/img.v2.jpg", "a/img%2Ev1.jpg", "a/img.jpg"]
    _, keys = sample_keys(paths)
    assert len(set(keys)) == 4
    assert not any("." in key for key in keys)
    assert key_of("v1.0/a.jpg", "path") == "v1%2E0/a"


def test_files_that_differ_only_by_extension_are_rejected_by_name():
    with pytest.raises(ValueError, match="'a/x'"):
        sample_keys(["a/x.jpg", "a/x.png"])


def test_two_members_with_the_same_path_are_rejected_by_name(tmp_path):
    write_tar(tmp_path / "s.tar", [("a.jpg", jpeg(0)), ("./a.jpg", jpeg(1))])
    with pytest.raises(rd.DatasetError, match=r"s\.tar: 'a' and '\./a' are the same path"):
        rd.data.WebDatasetSource([tmp_path / "s.tar"])
