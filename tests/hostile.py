"""Damaged and hostile datasets made from good ones, for the property test, which `python -m tests.hostile FOLDER SECONDS` runs.

A mutation changes a field of the manifest, of the header of the index or of the labels of an image, a value of a column, a
symbol of compressed crop labels, or bytes of a file. Sizes and hashes are then brought up to date, so that only the content can
give the damage away.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import resource
import shutil
import sys
import time
import traceback
import zlib
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from safetensors.numpy import load, save

import relabel_datasets as rd
from relabel_datasets.labels import codec
from relabel_datasets.labels.encodings import get_encoding
from relabel_datasets.labels.reading import read_label
from relabel_datasets.report.terminal import describe
from relabel_datasets.shards.manifest import _checksum
from tests.conftest import colours, picture

DOCUMENTED = (rd.DatasetError, rd.errors.LabelMapError, rd.errors.ImageError, FileNotFoundError)
SHARD, INDEX, MANIFEST = "train-00001-of-00003.tar", "train.index.safetensors", "_info.json"
MAX_BYTES = 512 << 20  # beyond what importing the libraries and reading the good dataset take

NAMES = [
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "/dev/zero",
    "a\nb",
    "\x1b[2J",
    "\ud800",
    "train",
    SHARD,
    INDEX,
    "README.md",
]
NUMBERS = [0, 1, -1, 2, 3, 7, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**30, 0.5, 5.0, 1e308, -0.0]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(NAMES), st.text(max_size=8),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


def places(value, path=()):
    """Yield the path of every value in JSON."""
    yield path
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(entry, (*path, key))


@st.composite
def changed_json(draw, content):
    """Return JSON with one to three fields replaced, removed, repeated or added."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(content))))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(VALUES)
            continue
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "repeat", "wrap", "add"]))
        if action == "replace":
            parent[path[-1]] = draw(VALUES)
        elif action == "remove":
            del parent[path[-1]]
        elif action == "repeat" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        elif action == "wrap":
            parent[path[-1]] = [parent[path[-1]]]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=4))] = draw(VALUES)
    return content


@st.composite
def changed_bytes(draw, data):
    """Return bytes with some flipped, cut, repeated, removed or appended."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        action = draw(st.sampled_from(["flip", "flip", "flip", "cut", "remove", "insert", "zeros", "append"]))
        if action == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif action == "cut":
            del data[at:]
        elif action == "remove":
            del data[at : at + draw(st.integers(1, 600))]
        elif action == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif action == "zeros":
            length = min(draw(st.integers(1, 600)), len(data) - at)
            data[at : at + length] = bytes(length)
        else:
            data += bytes(draw(st.integers(1, 1024)))
    return bytes(data)


def split_header(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_header(header, data):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@st.composite
def changed_safetensors(draw, data, metadata=False):
    """Return a safetensors file with another header."""
    header, data = split_header(data)
    if metadata and draw(st.booleans()):
        inner = draw(changed_json(json.loads(header["__metadata__"]["relabel"])))
        header["__metadata__"]["relabel"] = json.dumps(inner)
        return join_header(header, data)
    return join_header(draw(changed_json(header)), data)


@st.composite
def changed_columns(draw, data):
    """Return an index with other values in its columns."""
    columns = {name: column.copy() for name, column in load(data).items()}
    for _ in range(draw(st.integers(1, 3))):
        column = columns[draw(st.sampled_from(sorted(columns)))]
        limits = np.iinfo(column.dtype)
        value = draw(st.sampled_from([limits.min, limits.max, 0, 1]) | st.integers(limits.min, limits.max))
        column[draw(st.integers(0, len(column) - 1))] = value
    return save(columns)


def make_good(folder: Path) -> None:
    """Write a dataset of label maps, which has gains, and one of stored crops."""
    for i in range(21):
        path = folder / "images" / ("cat", "dog", "emu")[i % 3] / f"photo_{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    source = rd.data.ImageFolderSource(folder / "images")
    for encoding, num_crops in (("heatmaps", None), ("crops", 5)):
        build_config = rd.annotate.BuildConfig(encoding=encoding, num_crops=num_crops, batch_size=8)
        out = folder / "good" / encoding
        manifest = rd.build(source, out, colours(), build_config=build_config, shard_size=7, progress=False)
        assert (manifest.splits["train"].calibration is None) == (encoding == "crops")


def compact_crops():
    """Return the arrays of crop labels of 40 classes in the compact form."""
    return rd.CropLabels.from_logits(4 * torch.randn(6, 40), canvas_size=(40, 56)).tensors


@st.composite
def changed_stream(draw, arrays):
    """Return stored crop labels with other symbols in their compressed stream."""
    stream = arrays["crop_stream"].numpy()
    symbols = bytearray(zlib.decompress(stream.tobytes().rstrip(b"\0") + bytes(8), -15))
    for _ in range(draw(st.integers(0, 2))):
        count = draw(st.sampled_from([number for number in NUMBERS if isinstance(number, int) and 0 <= number < 2**32]))
        symbols[slice(*draw(st.sampled_from([(0, 4), (4, 8), (8, 12)])))] = count.to_bytes(4, "little")
    symbols = draw(changed_bytes(symbols)) + bytes(draw(st.sampled_from([0, 0, 1 << 10, 1 << 24])))
    packed = zlib.compressobj(9, wbits=-15)
    data = packed.compress(symbols) + packed.flush()
    num_views, num_classes = draw(st.sampled_from([6, 1, 1 << 16])), draw(st.sampled_from([40, 2, 513, 1 << 20]))
    stored = np.zeros((num_views, -(-len(data) // num_views)), np.uint8)
    stored.reshape(-1)[: len(data)] = np.frombuffer(data, np.uint8)
    seed_of_boxes = np.array([draw(st.sampled_from([0, 1, 2**63, 2**64 - 1]))], np.uint64)
    canvas = draw(st.sampled_from([(40, 56), (1, 1), (1, 2**31 - 1)]))
    return codec.serialize(
        get_encoding("crops"), {"crop_stream": stored, "crop_seed": seed_of_boxes}, num_classes, canvas
    )


class Hostile:
    """A folder that holds a good dataset of one config, and what is beside it."""

    def __init__(self, good: Path, scratch: Path) -> None:
        self.scratch, self.root = scratch, scratch / good.name
        scratch.mkdir(exist_ok=True)
        shutil.copytree(good, self.root)
        (scratch / "beside").write_text("untouched")
        self.folder = self.root / "colours"
        self.good = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        self.manifest = json.loads(self.good[MANIFEST])
        del self.manifest["checksum"]
        self.card = (self.root / "README.md").read_bytes()
        maps = rd.LabelMaps(self.root)
        first = maps.split.shard_lengths[0]
        dense = [torch.arange(3.0 * h * w).reshape(3, h, w) % 11 for h, w in ((2, 3), (5, 4))]
        self.several = rd.LabelMap.from_logits(dense, "multiscale").to_safetensors()
        self.extent, self.map = maps.index.extent(first, "map"), maps.map_bytes(first)

    def variants(self):
        """Return the strategy of (self, name of the file, its content or the manifest)."""
        start, size = self.extent
        shard = self.good[SHARD]

        def with_map(blob):
            return shard[:start] + blob[:size].ljust(size, b" ") + shard[start + size :]

        variants = st.one_of(
            st.tuples(st.just(MANIFEST), changed_json(self.manifest)),
            st.tuples(st.just(MANIFEST), changed_json(self.manifest)),
            st.tuples(st.just("raw manifest"), changed_bytes(self.good[MANIFEST])),
            st.tuples(st.just(INDEX), changed_safetensors(self.good[INDEX])),
            st.tuples(st.just(INDEX), changed_columns(self.good[INDEX])),
            st.tuples(st.just(INDEX), changed_bytes(self.good[INDEX])),
            st.tuples(st.just(SHARD), changed_safetensors(self.map, metadata=True).map(with_map)),
            st.tuples(st.just(SHARD), changed_bytes(self.map).map(with_map)),
            st.tuples(st.just(SHARD), changed_bytes(shard)),
            st.tuples(st.just("map"), changed_safetensors(self.map, metadata=True)),
            st.tuples(st.just("map"), changed_bytes(self.map)),
            st.tuples(st.just("map"), changed_stream(compact_crops())),
            st.tuples(st.just("map"), changed_safetensors(self.several, metadata=True)),
            st.tuples(st.just("map"), changed_bytes(self.several)),
            st.tuples(st.just("README.md"), changed_bytes(self.card)),
        )
        return variants.map(lambda variant: (self, *variant))

    def write(self, name: str, content) -> None:
        """Write the dataset with a variant, under sizes and hashes that fit it."""
        files, manifest = dict(self.good), copy.deepcopy(self.manifest)
        (self.root / "README.md").write_bytes(content if name == "README.md" else self.card)
        if name == MANIFEST:
            manifest = content
        elif name in (INDEX, SHARD):
            files[name] = content
            train = manifest["splits"]["train"]
            train["index_bytes"], train["index_sha256"] = len(files[INDEX]), hashlib.sha256(files[INDEX]).hexdigest()
            for number, shard in enumerate(train["filenames"]):
                train["shard_bytes"][number] = len(files[shard])
                train["shard_sha256"][number] = hashlib.sha256(files[shard]).hexdigest()
        sealed = {**manifest, "checksum": _checksum(manifest)} if isinstance(manifest, dict) else manifest
        files[MANIFEST] = content if name == "raw manifest" else json.dumps(sealed).encode()
        for file, data in files.items():
            (self.folder / file).write_bytes(data)

    def check(self, name: str, content) -> None:
        """Read a variant in every way: only documented errors, and what reading refuses, verify reports."""
        if name == "map":
            _decode(content)
            return
        self.write(name, content)
        before = snapshot(self.scratch)
        report = rd.verify(self.root, num_workers=0, progress=False)
        str(report), report.to_json()
        errors = [error for error in (_load(self.root), _describe(self.root)) if error is not None]
        if name != "README.md":
            assert not (report.ok and errors), f"verify finds nothing, reading raises {errors!r}"
        assert snapshot(self.scratch) == before


def snapshot(folder: Path):
    """Return what is in a folder."""
    found = [(str(path), path.lstat().st_mtime_ns, path.lstat().st_size) for path in sorted(folder.rglob("*"))]
    assert (folder / "beside").read_text() == "untouched"
    return found


def _load(root):
    """Iterate over all of a dataset; return a documented error."""
    try:
        for dataset in rd.load_dataset(root).values():
            is_calibrated = dataset.label_maps.split.calibration is not None
            for index in range(len(dataset)):
                dataset.label_maps.at(index)
            for image, labels in dataset.__getitems__(range(len(dataset))):
                _use(labels, image, is_calibrated=is_calibrated)
            dataset.targets.max(initial=0), list(dataset.keys), dataset.label_maps.index.rows(list(dataset.keys))
    except DOCUMENTED as error:
        return error
    return None


def _describe(root):
    try:
        describe(root, num_samples=20)
    except DOCUMENTED as error:
        return error
    return None


def _decode(blob):
    try:
        _use(read_label(blob))
        rd.decode_sample({"__key__": "a", "cls": b"0", "safetensors": blob})
    except DOCUMENTED:
        pass


def _use(labels, image=None, *, is_calibrated=False):
    """Pool a label map, or decompress crop labels, and cut out a crop if there is an image."""
    if isinstance(labels, rd.CropLabels):
        soft = labels.soft_labels()
        assert torch.isfinite(labels.boxes_xyxy).all()
        if image is not None:
            assert rd.RandomStoredCrop(8)(image, labels)[1].shape == (labels.num_classes,)
    else:
        for name, tensor in labels.tensors.items():
            assert not name.startswith("classes") or 0 <= tensor.min() <= tensor.max() < labels.num_classes
        soft = rd.LabelPooling(calibrated=is_calibrated)(labels)
    assert torch.isfinite(soft).all()


def peak_bytes() -> int:
    """Return the most memory that this process has had, on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(good: Path, scratch: Path, seconds: float) -> tuple[int, int, list[str]]:
    """Check 40 variants, the same each time, and then others until the time is over.

    Args:
        good: Folder of good datasets, each with a config `colours` in 3 shards.
        scratch: Empty folder for the variants.
        seconds: Duration.

    Returns:
        How many were checked, the bytes by which the memory grew at most, and the first failure of each kind.
    """
    all_hostile = [Hostile(path, scratch / f"of-{path.name}") for path in sorted(good.iterdir())]
    for hostile in all_hostile:
        hostile.check(MANIFEST, hostile.manifest)
    start = peak_bytes()
    end, count, failures = time.monotonic() + seconds, 0, dict[str, str]()

    def check(variant):
        nonlocal count
        count += 1
        hostile, *variant = variant
        try:
            hostile.check(*variant)
        except Exception as error:  # noqa: BLE001  all kinds of failures are reported, each once
            where = traceback.extract_tb(error.__traceback__)[-1]
            failures.setdefault(
                f"{type(error).__name__} {where.filename}:{where.lineno}",
                f"{variant[0]}: {str(variant[1])[:3000]}\n{traceback.format_exc()}",
            )

    options = settings(
        max_examples=40, derandomize=False, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )  # fmt: skip
    first = 0 if not seconds else int(time.time())
    for number in itertools.count(first):
        seed(number)(options(given(st.one_of([hostile.variants() for hostile in all_hostile]))(check)))()
        if time.monotonic() >= end:
            return count, peak_bytes() - start, list(failures.values())
    raise AssertionError


if __name__ == "__main__":
    _folder, _seconds = Path(sys.argv[1]).resolve(), float(sys.argv[2])
    make_good(_folder)
    (_scratch := _folder / "scratch").mkdir()
    set_hypothesis_home_dir(_scratch / ".hypothesis")
    _written: list[str] = []

    def _audit(event, arguments):
        """Refuse to write outside of the scratch folder."""
        if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not Path(arguments[0]).resolve().is_relative_to(_scratch) and arguments[0] != os.devnull:
                _written.append(arguments[0])

    sys.addaudithook(_audit)
    _count, _grown, _failures = run(_folder / "good", _scratch, _seconds)
    print(json.dumps({"variants": _count, "grown_bytes": _grown, "written_outside": sorted(set(_written))}))
    sys.exit("\n\n".join(_failures) or 0)
