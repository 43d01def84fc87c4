"""Bytes of a build with real networks do not depend on shards, threads or interruptions. Libraries select kernels by batch shape."""

import json
import tarfile

import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import ModuleAnnotator
from relabel_datasets.annotate.calibrate import CROPS_PER_IMAGE
from relabel_datasets.annotate.combine import Ensemble, FlipAveraged
from relabel_datasets.annotate.engines import Description
from relabel_datasets.shards.manifest import Manifest
from tests.conftest import ColourNet, picture

BATCH_SIZE = 16  # larger and smaller batches use other kernels
NAMES = ("cat", "dog", "emu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """ImageFolder with 40 images."""
    root = tmp_path_factory.mktemp("images")
    for i in range(40):
        path = root / NAMES[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, (40, 40)).save(path)
    return root


def make_network():
    """Return a small annotator with the same random weights in every call and process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return rd.TimmAnnotator("mobilenetv2_035", input_size=64, num_classes=3, classes=NAMES, device="cpu")


class Recorder:
    """Annotator that records the logits of each image."""

    def __init__(self):
        self._inner = make_network()
        self.classes, self.num_classes, self.device = NAMES, 3, self._inner.device
        self.preprocess, self.describe = self._inner.preprocess, self._inner.describe
        self.logits: dict[bytes, bytes] = {}
        self.sizes: set[int] = set()

    def __call__(self, images):
        logits = self._inner(images)
        self.sizes.add(len(images))
        for pixels, image_logits in zip(images, logits, strict=True):
            before = self.logits.setdefault(pixels.numpy().tobytes(), image_logits.numpy().tobytes())
            assert before == image_logits.numpy().tobytes()
        return logits


class PartlyBrokenSource(rd.data.ImageFolderSource):
    """Source of the same images, with every seventh one unreadable."""

    def read(self, index):
        return b"broken" if index % 7 == 0 else super().read(index)


def build(source, root, annotator, *, shard_size=40, batch_size=BATCH_SIZE, **build_config):
    build_config = rd.annotate.BuildConfig(batch_size=batch_size, images=False, **build_config)
    return rd.build(
        source, root, annotator, config="net", shard_size=shard_size, build_config=build_config, progress=False
    )


def shards_of(root):
    return {path.name: path.read_bytes() for path in sorted((root / "net").glob("*.tar"))}


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_logits_do_not_depend_on_shards_other_images_or_threads(tmp_path, images):
    builds = {
        "one shard": (rd.data.ImageFolderSource(images), {}),
        "17 per shard": (rd.data.ImageFolderSource(images), {"shard_size": 17}),
        "5 per shard": (rd.data.ImageFolderSource(images), {"shard_size": 5, "num_threads": 1}),
        "broken neighbors": (PartlyBrokenSource(images), {"shard_size": 19, "num_threads": 7}),
    }
    recorders = {name: Recorder() for name in builds}
    for name, (source, arguments) in builds.items():
        build(source, tmp_path / name, recorders[name], **arguments)
    whole = recorders["one shard"]
    assert len(whole.logits) == 40 + 2 * CROPS_PER_IMAGE  # those of two images calibrate labels
    for recorder in recorders.values():
        assert recorder.sizes == {BATCH_SIZE}
        assert len(recorder.logits) >= 33
        assert all(whole.logits[pixels] == logits for pixels, logits in recorder.logits.items())


class Interrupted(Exception):
    pass


class StopsAfterBatches(Recorder):
    """Annotator that fails after some batches."""

    def __init__(self, num_batches):
        super().__init__()
        self._remaining = num_batches

    def __call__(self, images):
        self._remaining -= 1
        if self._remaining < 0:
            raise Interrupted
        return super().__call__(images)


def test_shards_do_not_depend_on_threads_or_interruptions(tmp_path, images):
    source = rd.data.ImageFolderSource(images)
    for name, num_threads in (("one thread", 1), ("five threads", 5)):
        build(source, tmp_path / name, make_network(), shard_size=17, num_threads=num_threads)
    for num_batches in (1, 3, 1):  # in the first shard, in the second, and in the second again
        with pytest.raises(Interrupted):
            build(source, tmp_path / "interrupted", StopsAfterBatches(num_batches), shard_size=17)
    build(source, tmp_path / "interrupted", make_network(), shard_size=17)
    whole = shards_of(tmp_path / "one thread")
    assert len(whole) == 3
    assert shards_of(tmp_path / "five threads") == whole
    assert shards_of(tmp_path / "interrupted") == whole


def test_a_dataset_smaller_than_a_batch_is_one_batch_of_its_size(tmp_path, images):
    recorder = Recorder()
    build(rd.data.ImageFolderSource(images), tmp_path, recorder, batch_size=256)
    assert recorder.sizes == {40}


CHANGES = {
    "batch_size": (
        {"batch_size": 8},
        r"another batch_size: batch_size 16 there, 8 now\. Use the existing values",
    ),
    "device": ({}, r"another device: device \"cpu\" there, \"mps\" now"),
    "torch": ({}, r"another torch: torch \"\d[\d.]+\" there, \"99\.1\" now"),
}


def change(what, monkeypatch):
    if what == "device":
        monkeypatch.setattr("relabel_datasets.annotate.engines._device_type", lambda _: "mps")
    if what == "torch":
        monkeypatch.setattr(torch, "__version__", "99.1+cu999")
    return CHANGES[what]


def colours():
    return ModuleAnnotator(ColourNet(), (48, 64), classes=NAMES, name="colours", device="cpu")


@pytest.mark.parametrize("what", CHANGES)
def test_a_build_is_not_resumed_if_the_last_bits_would_change(tmp_path, images, monkeypatch, what):
    class StopsAtTheSecondShard(ModuleAnnotator):
        num_batches = 0

        def __call__(self, pixels):
            self.num_batches += 1
            if self.num_batches == 3:  # the second is one of crops
                raise Interrupted
            return super().__call__(pixels)

    source = rd.data.ImageFolderSource(images)
    stopping = StopsAtTheSecondShard(ColourNet(), (48, 64), classes=NAMES, name="colours")
    with pytest.raises(Interrupted):
        build(source, tmp_path, stopping, shard_size=9)
    assert len(list(tmp_path.glob("net/*.tar"))) == 1
    with monkeypatch.context() as patch:
        arguments, message = change(what, patch)
        with pytest.raises(rd.DatasetError, match=message):
            build(source, tmp_path, colours(), shard_size=9, **arguments)
    build(source, tmp_path, colours(), shard_size=9)


@pytest.mark.parametrize("what", CHANGES)
def test_a_finished_split_is_not_repaired_if_the_last_bits_would_change(tmp_path, images, monkeypatch, what):
    source = rd.data.ImageFolderSource(images)
    manifest = build(source, tmp_path, colours(), shard_size=9)
    shards = shards_of(tmp_path)
    version = torch.__version__.partition("+")[0]
    assert manifest.splits["train"].computed_with == {"batch_size": 16, "device": "cpu", "torch": version}
    with monkeypatch.context() as patch:
        arguments, message = change(what, patch)
        build(source, tmp_path, colours(), shard_size=9, **arguments)  # nothing is missing
        (tmp_path / "net" / next(iter(shards))).unlink()
        with pytest.raises(rd.DatasetError, match=message):
            build(source, tmp_path, colours(), shard_size=9, **arguments)
    build(source, tmp_path, colours(), shard_size=9)
    assert shards_of(tmp_path) == shards


def test_a_split_without_recorded_conditions_can_be_repaired(tmp_path, images):
    source = rd.data.ImageFolderSource(images)
    build(source, tmp_path, colours(), shard_size=9)
    shards = shards_of(tmp_path)
    content = json.loads((tmp_path / "net" / "_info.json").read_bytes())
    del content["splits"]["train"]["computed_with"], content["checksum"]
    manifest = Manifest.load(tmp_path / "net")
    assert manifest.splits["train"].computed_with is not None
    from relabel_datasets.shards.manifest import _checksum

    (tmp_path / "net" / "_info.json").write_text(json.dumps({**content, "checksum": _checksum(content)}))
    assert Manifest.load(tmp_path / "net").splits["train"].computed_with is None
    (tmp_path / "net" / next(iter(shards))).unlink()
    build(source, tmp_path, colours(), shard_size=9, batch_size=3)
    assert shards_of(tmp_path) == shards


def test_the_recorded_device_is_that_of_the_wrapped_networks():
    class Custom(Recorder):
        def __init__(self):
            self.classes, self.num_classes, self.describe = NAMES, 3, dict

    assert Description.of(colours()).device == "cpu"
    assert Description.of(FlipAveraged(colours())).device == "cpu"
    assert Description.of(Ensemble([colours(), FlipAveraged(colours())])).device == "cpu"
    assert Description.of(Custom()).device is None


@pytest.mark.slow
def test_maps_of_mobilenet_do_not_depend_on_shards_threads_or_interruptions(tmp_path, real_data):
    with tarfile.open(real_data / "imagenette-val.tar") as tar:
        members = sorted((member for member in tar if member.name.endswith((".JPEG", ".jpg"))), key=lambda m: m.name)
        tar.extractall(tmp_path, members[:: len(members) // 119][:120], filter="data")
    source = rd.data.ImageFolderSource(next(path for path in tmp_path.iterdir() if path.is_dir()))

    def annotator():
        weights = real_data / "mobilenetv2_100.safetensors"
        return rd.TimmAnnotator("mobilenetv2_100", checkpoint=weights, input_size=128, device="cpu")

    maps = {}
    for shard_size, num_threads in ((120, 1), (50, 4)):
        root = tmp_path / str(shard_size)
        build(source, root, annotator(), shard_size=shard_size, batch_size=32, num_threads=num_threads)
        label_maps = rd.LabelMaps(root)
        maps[shard_size] = {key: label_maps.map_bytes(row) for row, key in enumerate(label_maps)}
    assert len(maps[120]) == 120
    assert maps[50] == maps[120]
