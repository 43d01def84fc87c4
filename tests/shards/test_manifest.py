"""A manifest with a wrong field is refused, and the error names the file and the field."""

import copy
import json
import shutil
from dataclasses import asdict

import pytest

import relabel_datasets as rd
from relabel_datasets.report.terminal import describe
from relabel_datasets.shards.manifest import MANIFEST_NAME, Manifest, _checksum
from tests.labels.samples import GAINS

STORED_GAINS = {**asdict(GAINS), "gains": GAINS.gains[0]}  # of one map per image


@pytest.fixture(scope="module")
def content(served_folder):
    content = json.loads((served_folder / "colours" / MANIFEST_NAME).read_bytes())
    del content["checksum"]
    return content


def sealed(content) -> bytes:
    return json.dumps({**content, "checksum": _checksum(content)}).encode()


def changed(content, path, value):
    """Return a copy of the content with another value at a path such as `"splits.train.shard_lengths.1"`."""
    content = copy.deepcopy(content)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = content
    for parent in parents:
        place = place[parent]
    if value is MISSING:
        del place[last]
    else:
        place[last] = value
    return content


MISSING = object()
TRAIN = "splits.train"
FIELDS = ("config", "classes", "annotator", "encoding", "splits", "made_with")
SPLIT_FIELDS = (
    "name", "num_samples", "filenames", "shard_lengths", "shard_bytes", "shard_sha256", "shard_statistics", "index",
    "index_bytes", "index_sha256", "image_extension", "key_rule", "source_sha256", "skipped",
)  # fmt: skip
WRONG_TYPES = {"number": 7.5, "true": True, "dict": {"a": 1}, "nested": [[["a"]]]}
CASES = {
    **{f"{field}: {kind}": (field, value) for field in FIELDS for kind, value in WRONG_TYPES.items()},
    **{
        f"{field}: {kind}": (f"{TRAIN}.{field}", value) for field in SPLIT_FIELDS for kind, value in WRONG_TYPES.items()
    },
    **{f"{field}: missing": (field, MISSING) for field in FIELDS},
    **{f"{field}: missing": (f"{TRAIN}.{field}", MISSING) for field in SPLIT_FIELDS},
    "a float length": (f"{TRAIN}.shard_lengths.1", 5.0),
    "a negative length": (f"{TRAIN}.shard_lengths.1", -5),
    "a length of true": (f"{TRAIN}.shard_lengths.1", True),
    "a length of text": (f"{TRAIN}.shard_lengths.1", "5"),
    "a length beyond 32 bits": (f"{TRAIN}.shard_lengths.1", 2**32),
    "a length that does not add up": (f"{TRAIN}.shard_lengths.1", 6),
    "a length too few": (f"{TRAIN}.shard_lengths", [5, 8]),
    "a number of samples that does not add up": (f"{TRAIN}.num_samples", 12),
    "no bytes": (f"{TRAIN}.shard_bytes.0", 0),
    "bytes beyond 64 bits": (f"{TRAIN}.shard_bytes.0", 2**63),
    "a hash that is a path": (f"{TRAIN}.shard_sha256.0", "../" * 20 + "etc"),
    "a hash in capitals": (f"{TRAIN}.shard_sha256.0", "A" * 64),
    "a hash with a newline": (f"{TRAIN}.shard_sha256.0", "a" * 64 + "\n"),
    "a short hash": (f"{TRAIN}.index_sha256", "a" * 63),
    "statistics of four": (f"{TRAIN}.shard_statistics.0", [1, 1, 1, 0.5]),
    "statistics of seven": (f"{TRAIN}.shard_statistics.0", [1, 1, 1, 0.5, 1, 1, 1]),
    "statistics of a negative number of classes": (f"{TRAIN}.shard_statistics.0", [1, 1, 1, 0.5, 1, -1]),
    "statistics of more samples than there are": (f"{TRAIN}.shard_statistics.0", [6, 0, 0, 0.0, 0]),
    "statistics of text": (f"{TRAIN}.shard_statistics.0", ["1", 0, 0, 0.0, 0]),
    "statistics of half samples": (f"{TRAIN}.shard_statistics.0", [1.5, 0, 0, 0.0, 0]),
    "more equal crops than crops": (f"{TRAIN}.shard_statistics.0", [0, 0, 1, 0.0, 2]),
    "no shards": (f"{TRAIN}.filenames", []),
    "a shard twice": (f"{TRAIN}.filenames.1", "train-00000-of-00003.tar"),
    "an index that is a shard": (f"{TRAIN}.index", "train-00000-of-00003.tar"),
    "another split's name": (f"{TRAIN}.name", "validation"),
    "an extension that is a path": (f"{TRAIN}.image_extension", "../jpg"),
    "an extension of labels": (f"{TRAIN}.image_extension", "cls"),
    "skipped without its error": (f"{TRAIN}.skipped", [{"key": "a", "name": "b"}]),
    "skipped with a number": (f"{TRAIN}.skipped", [{"key": "a", "name": "b", "error": 1}]),
    "an unknown field of a split": (f"{TRAIN}.extra", 1),
    "an unknown field": ("extra", 1),
    **{
        f"gains with {name} of {value!r}": (f"{TRAIN}.calibration", {**STORED_GAINS, name: value})
        for name, values in (
            (
                "shares",
                [
                    (),
                    (0.1, 0.4),
                    (0.4, 0.1, 1.0),
                    (0.1, 0.1, 1.0),
                    (0.0, 0.4, 1.0),
                    (0.1, 0.4, 1.1),
                    ("a", 0.4, 1),
                    0.1,
                ],
            ),
            ("gains", [(), (1.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, -1.0), (True, 1.0, 1.0), (1.0, 1.0, 10**300), None]),
            ("num_crops", [0, 1.5, None]),
            ("kl_before", ["1", None]),
            ("kl_after", [[1.0]]),
            ("more", [1]),
        )
        for value in values
    },
    "gains of null": (f"{TRAIN}.calibration", None),
    "no splits": ("splits", {}),
    "one class": ("classes", ["a"]),
    "no classes": ("classes", []),
    "a class that is a number": ("classes.1", 3),
    "a class that is null": ("classes.1", None),
    "a class that is not Unicode": ("classes.1", "\ud800"),
    "an annotator without a name": ("annotator", {"kind": "x"}),
    "an annotator whose name is a list": ("annotator.name", ["a"]),
    "an annotator beyond all depth": ("annotator.deep", json.loads("[" * 50 + "]" * 50)),
    "an annotator of huge numbers": ("annotator.huge", 10**300),
    "an encoding without a size": ("encoding.map_size", MISSING),
    "an encoding with another field": ("encoding.more", 1),
    "an encoding of no classes": ("encoding.k", 0),
    "an encoding of text": ("encoding.k", "10"),
    "maps of one side": ("encoding.map_size", [6]),
    "maps of no size": ("encoding.map_size", [0, 8]),
    "maps of floats": ("encoding.map_size", [6.0, 8]),
    "maps that are too large": ("encoding.map_size", [2**14, 2**14]),
    "no stored crops": ("encoding.num_crops", 0),
    "stored crops of text": ("encoding.num_crops", "5"),
    "more stored crops than are read": ("encoding.num_crops", 2**16 + 1),
}


@pytest.mark.parametrize(("path", "value"), CASES.values(), ids=CASES)
def test_a_wrong_field_is_refused_by_file_and_field(content, path, value):
    field = next(part for part in reversed(path.split(".")) if not part.isdigit())
    field = {"shard_lengths": "(shard_lengths|num_samples|shard_statistics)", "filenames": "(filenames|file)",
             "index": "(index|file)"}.get(field, field)  # fmt: skip
    with pytest.raises(rd.DatasetError, match=f"^some/_info.json is damaged: .*{field}"):
        Manifest.parse(sealed(changed(content, path, value)), "some/_info.json")


def test_stored_crops_whose_dense_labels_are_too_large_are_refused(content):
    many = {**content, "classes": [f"class {i}" for i in range(1000)]}
    assert (
        Manifest.parse(sealed(changed(many, "encoding.num_crops", 33554)), "some/_info.json").encoding["num_crops"]
        == 33554
    )
    with pytest.raises(rd.DatasetError, match=r"encoding.num_crops must be at most 33554 with 1000 classes, got 33555"):
        Manifest.parse(sealed(changed(many, "encoding.num_crops", 33555)), "some/_info.json")


@pytest.mark.parametrize("version", [True, 1.0, "1", None, 2, [1], 10**30])
def test_another_version_is_refused_with_advice(content, version):
    with pytest.raises(rd.DatasetError, match=r"some/_info\.json has version .*: update relabel_datasets"):
        Manifest.parse(sealed(changed(content, "version", version)), "some/_info.json")


@pytest.mark.parametrize("top", [[], "x", 1, None, [[]]])
def test_a_manifest_that_is_not_a_dict_is_refused(top):
    with pytest.raises(rd.DatasetError, match=r"some/_info\.json has version None"):
        Manifest.parse(json.dumps(top).encode(), "some/_info.json")


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[" * 100_000, b'{"a":' * 100_000, b'{"version": 1, "version": 1}', b'{"version": NaN}', b"\xff\xfe{\0}\0"],
)  # fmt: skip
def test_a_manifest_that_is_not_strict_json_is_refused(data):
    with pytest.raises(rd.DatasetError, match=r"some/_info.json is damaged, it is not JSON: "):
        Manifest.parse(data, "some/_info.json")


def test_a_valid_manifest_is_read(content):
    names = {"key": "a", "name": "not UTF-8 \udcff", "error": "\x1b[2J"}
    for path, value in (
        ("classes.1", ""),
        ("annotator.more", {"a": [1, 2.5, None, True]}),
        ("encoding.map_size", None),
        (f"{TRAIN}.skipped", [names]),
        (f"{TRAIN}.key_rule", None),
        (f"{TRAIN}.calibration", json.loads(json.dumps(STORED_GAINS))),
    ):
        manifest = Manifest.parse(sealed(changed(content, path, value)), "some/_info.json")
        assert Manifest.parse(manifest.to_bytes(), "again") == manifest


def test_the_gains_of_a_split_are_optional(content):
    manifest = Manifest.parse(sealed(content), "some/_info.json")
    assert manifest.splits["train"].calibration is None
    assert (
        b"calibration" not in manifest.to_bytes()
    )  # the bytes of manifests without gains are those of earlier versions
    with_gains = changed(content, f"{TRAIN}.calibration", json.loads(json.dumps(STORED_GAINS)))
    assert Manifest.parse(sealed(with_gains), "some/_info.json").splits["train"].calibration == GAINS


@pytest.mark.parametrize(
    "case", ["a float length", "an encoding without a size", "a class that is a number", "no splits"]
)
def test_loading_inspect_and_verify_agree_and_verify_continues_with_the_next_config(
    served_folder, tmp_path, content, case
):
    path, value = CASES[case]
    root = shutil.copytree(served_folder, tmp_path / "dataset")
    (root / "colours" / MANIFEST_NAME).write_bytes(sealed(changed(content, path, value)))
    for read in (lambda: rd.load_dataset(root, "colours", "train"), lambda: describe(root, "colours")):
        with pytest.raises(rd.DatasetError, match=f"colours/{MANIFEST_NAME} is damaged: .*{path.split('.')[-2:][0]}"):
            read()
    report = rd.verify(root, num_workers=0, progress=False)
    assert [(each.config, each.split) for each in report.splits] == [("labels-only", "train")]
    assert [problem.config for problem in report.problems] == ["colours"]
    assert f"{MANIFEST_NAME} is damaged: " in report.problems[0].problem
