import io
import shutil
import tarfile

import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.cli import main
from relabel_datasets.labels.windows import CROPS_DEFINITION, DEFINITION
from relabel_datasets.report.terminal import _heatmap, _heatmap_row, describe
from tests.bad_names import change_manifest
from tests.conftest import ColourNet, picture
from tests.labels.samples import set_calibration
from tests.servers import FaultyServer

SHARD = "train-00001-of-00003.tar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A read-only dataset of 13 images in 3 shards, with one config that includes the images and a label-only config."""
    root = tmp_path_factory.mktemp("terminal")
    for i in range(13):
        path = root / "images" / ("cat", "dog", "n01440764")[i % 3] / f"photo_{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, (40, 56) if i % 2 else (48, 32)).save(path, quality=95)
    annotator = rd.ModuleAnnotator(ColourNet(), (48, 64), classes=("cat", "dog", "n01440764"), name="colours")
    for config, images in (("colours", True), ("labels-only", False)):
        source, build_config = rd.data.ImageFolderSource(root / "images"), rd.annotate.BuildConfig(images=images)
        rd.build(
            source, root / "data", annotator, config=config, build_config=build_config, shard_size=5, progress=False
        )
    return root / "data"


def _keys(text):
    return [line.split(":")[0] for line in text.splitlines() if line.startswith("photo_")]


def test_a_heatmap_has_shades_by_probability_in_a_frame():
    assert list(_heatmap(torch.tensor([[0.0, 0.05, 0.1], [0.5, 0.99, 1.0]]))) == [
        "+------+",
        "|    ..|",
        "|++@@@@|",
        "+------+",
    ]


def test_the_number_of_heatmaps_in_a_row_depends_on_the_width():
    label_map = rd.LabelMap.from_logits(torch.randn(5, 3, 4))
    for width, count in ((1, 1), (13, 1), (23, 1), (24, 2), (34, 2), (35, 3), (500, 3)):
        lines = list(_heatmap_row(label_map, ["a name that is too long"] * 5, width))
        assert len(lines) == 1 + 3 + 2
        assert lines[1] == "  " + " ".join(["+--------+"] * count)
        assert all(len(line) <= max(width, 12) for line in lines)
        assert lines[0] == "  " + " ".join(["a name tha"] * count)


def test_a_dataset_is_described_by_its_configs_and_first_samples(folder):
    text = describe(folder, num_samples=2)
    assert text.count("config colours, made with relabel_datasets") == text.count("config labels-only") == 1
    assert "  classes    3: cat, dog, tench\n  annotator  colours, module, input 48x64\n" in text
    assert text.count("maps       6x8 locations, heatmaps 10, stored as uint4") == 2
    size = sum(path.stat().st_size for path in (folder / "colours").glob("*.tar")) / 1e6
    assert f"  train      13 samples in 3 shards, jpg images, {size:.1f} MB\n" in text
    assert "13 samples in 3 shards, no images, 0.0 MB" in text
    label_maps = rd.LabelMaps(folder, "colours")
    assert _keys(text) == list(label_maps)[:2]
    for row, key in enumerate(_keys(text)):
        label_map = label_maps[key]
        name = ("cat", "dog", "tench")[label_map.label]
        height, width = label_map.canvas_size
        image, stored = len(label_maps.image_bytes(row)), label_maps.index.extent(row, "map")[1]
        assert f"{key}: label {name}, {height}x{width} pixels, image {image:,} bytes, map {stored:,} bytes\n" in text
        share, best = rd.LabelPooling()(label_map).max(0)
        assert f"\n  pooled: {share:.1%} {('cat', 'dog', 'tench')[best]}, " in text
    assert text.count("+----------------+ +----------------+") == 4


@pytest.mark.parametrize(
    ("arguments", "topic", "definition"),
    [
        (
            {"storage_dtype": "float16"},
            "label maps",
            DEFINITION,
        ),  # a build measures maps before they are rounded to 4 bits
        ({"encoding": "crops", "num_crops": 9}, "stored crops", CROPS_DEFINITION),
    ],
    ids=["label maps", "stored crops"],
)
def test_agreement_and_several_classes_equal_those_of_analyze(folder, tmp_path, arguments, topic, definition):
    source = rd.data.ImageFolderSource(folder.parent / "images")
    annotator = rd.ModuleAnnotator(ColourNet(), (48, 64), classes=("cat", "dog", "n01440764"), name="colours")
    build_config = rd.annotate.BuildConfig(**arguments)
    rd.build(source, tmp_path / "data", annotator, config="colours", build_config=build_config, progress=False)
    folder = tmp_path / "data"
    numbers = rd.analysis.analyze(folder, "colours", num_crops=1, progress=False).summary[topic]
    agree = numbers["images that agree with their label, share"]
    several = numbers["images that show several classes, share"]
    text = describe(folder, "colours")
    assert several > 0
    assert f"{agree:.1%} agree with their label, {several:.1%} show several classes" in text
    assert [one for one in (DEFINITION, CROPS_DEFINITION) if one in " ".join(text.split())] == [definition]
    change_manifest(folder / "colours" / "_info.json", _as_early_versions_wrote_it)
    assert "agree with their label\n" in describe(folder)
    assert "several classes" not in describe(folder)


def _as_early_versions_wrote_it(content):
    split = content["splits"]["train"]
    split["shard_statistics"] = [values[:5] for values in split["shard_statistics"]]


def test_gains_are_shown_if_the_split_has_them(folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "gains")
    assert "calibrated" not in describe(folder, "colours")
    set_calibration(folder / "colours")
    text = describe(folder, "colours")
    assert "calibrated KL 0.500 instead of 1.000, gain 0.50 at 10%, 1.50 at 40%, 3.00 at 100% of the area\n" in text


def test_several_classes_of_early_versions_are_not_shown(folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "old")
    for config in ("colours", "labels-only"):
        assert DEFINITION in " ".join(describe(folder).split())
        change_manifest(folder / config / "_info.json", _as_early_versions_wrote_it)
    text = describe(folder)
    assert text.count("agree with their label\n") == 2
    assert "several classes" not in text
    assert DEFINITION not in " ".join(text.split())
    assert rd.verify(folder, num_workers=0, progress=False).ok


def test_config_and_split_select_the_samples(folder):
    text = describe(folder, "labels-only", "train", num_samples=1)
    assert "config colours" not in text
    assert len(_keys(text)) == 1
    assert ", image " not in text
    assert describe(folder / "labels-only", num_samples=1) == text
    assert _keys(describe(folder, num_samples=0)) == []
    assert len(_keys(describe(folder, num_samples=100))) == 13


def test_a_shard_is_described_by_its_samples(folder):
    shard = folder / "colours" / SHARD
    text = describe(shard, num_samples=2)
    assert f"\n{SHARD}: samples 6 to 10 of train, {shard.stat().st_size:,} bytes\n" in text
    assert _keys(text) == list(rd.LabelMaps(folder, "colours"))[5:7]
    assert "label tench" in describe(shard, num_samples=99)
    assert len(_keys(describe(shard, num_samples=99))) == 5


def test_a_shard_may_be_given_by_a_relative_path_or_file_url(folder, monkeypatch):
    monkeypatch.chdir(folder / "colours")
    assert _keys(describe(SHARD)) == _keys(describe(folder / "colours" / SHARD))
    assert _keys(describe(f"file://{folder}/colours/{SHARD}")) == _keys(describe(SHARD))


def test_a_shard_without_manifest_shows_class_indices(folder, tmp_path):
    for config, has_image in (("colours", True), ("labels-only", False)):
        shutil.copy(folder / config / SHARD, tmp_path / SHARD)
        text = describe(tmp_path / SHARD, num_samples=2)
        assert text.startswith(f"{tmp_path / SHARD}: a shard without a manifest in its folder")
        assert (", image " in text) == has_image
        expected = describe(folder / config / SHARD, num_samples=2)
        for index, name in enumerate(("cat", "dog", "tench")):
            text = text.replace(f"class {index}", name)
        assert [line.split() for line in text.splitlines()[1:]] == [
            line.split() for line in expected[expected.index("\n\nphoto") + 1 :].splitlines()
        ]  # except for the widths of names


def test_datasets_and_shards_are_read_from_urls(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RELABEL_CACHE", str(tmp_path / "cache"))
    with FaultyServer(folder) as server:
        text = describe(server.url, num_samples=2)
        shard = describe(f"{server.url}/colours/{SHARD}?signature=verysecret", num_samples=2)
        with pytest.raises(FileNotFoundError, match=r"_info\.json"):
            describe(f"{server.url}/{SHARD}")
        downloads = {request.path.partition("?")[0] for request in server.gets(".tar")}
    assert text.replace(server.url, str(folder)) == describe(folder, num_samples=2)
    assert shard.replace(server.url, str(folder)) == describe(folder / "colours" / SHARD, num_samples=2)
    assert "verysecret" not in shard
    assert downloads == {f"/colours/{name}" for name in ("train-00000-of-00003.tar", SHARD)}  # not the third


def test_a_shard_of_another_build_raises_an_error(folder, tmp_path):
    shutil.copytree(folder / "colours", tmp_path / "colours")
    (tmp_path / "colours" / SHARD).rename(tmp_path / "colours" / "train-00009-of-00010.tar")
    with pytest.raises(rd.DatasetError, match=r"train-00009-of-00010\.tar is not listed in the manifest of its folder"):
        describe(tmp_path / "colours" / "train-00009-of-00010.tar")


def _tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


MAP = rd.LabelMap.from_logits(torch.randn(3, 2, 2)).to_safetensors()


def _header(**fields):
    """Return the header of a member in a hostile tar."""
    info = tarfile.TarInfo("a.cls")
    for name, value in fields.items():
        setattr(info, name, value)
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_header(size=-1024) * 3, r"bad\.tar is not an uncompressed tar, or damaged"),
        (_header(size=2**40) + bytes(2048), "member 'a.cls' is not a complete regular file"),
        (_header(type=tarfile.DIRTYPE) + bytes(2048), "member 'a.cls' is not a complete regular file"),
        (
            _header(type=tarfile.SYMTYPE, linkname="/etc/passwd") + bytes(2048),
            "member 'a.cls' is not a complete regular file",
        ),
        (
            _header(type=tarfile.GNUTYPE_SPARSE, size=512) + bytes(2048),
            r"bad\.tar is not an uncompressed tar, or damaged",
        ),
        (b"not a tar", r"bad\.tar is not an uncompressed tar, or damaged"),
        ({"a.jpg": b"", "a.cls": b"0"}, r"bad\.tar is not a shard of label maps"),
        ({"a.safetensors": b"", "a.cls": b"zero"}, r"bad\.tar: sample 'a': \.cls must be a class index, got b'zero'"),
        ({"a.safetensors": b"", "a.cls": b"-1"}, r"bad\.tar: sample 'a': \.cls must be a class index, got b'-1'"),
        (
            {"a.safetensors": MAP, "a.cls": b"3"},
            r"bad\.tar: sample 'a': \.cls must be below 3, the number of classes, got 3",
        ),
        ({"a.safetensors": b"nothing", "a.cls": b"0"}, "label map 'a'"),
    ],
)
def test_a_file_that_is_not_a_shard_raises_an_error(tmp_path, content, message):
    path = tmp_path / "bad.tar"
    path.write_bytes(content) if isinstance(content, bytes) else _tar(path, content)
    with pytest.raises(ValueError, match=message):
        describe(path)


def test_the_command_uses_the_width_of_the_terminal(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    assert main(["inspect", str(folder), "--config", "colours", "--num-samples", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == describe(folder, "colours", num_samples=1, width=30) + "\n"
    assert captured.err.startswith("Next: relabel report ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "no dataset at /nowhere"),
        (["/nowhere/x.tar"], "no dataset at /nowhere"),
        (["{folder}/nowhere.tar"], "nowhere.tar"),
        (["{folder}", "--config", "blue"], "no config 'blue'"),
        (["{folder}", "--split", "test"], "no split 'test'"),
        (["{folder}", "--num-samples", "-1"], "--num-samples must be at least 0, got -1"),
        (
            ["{folder}/colours/train-00001-of-00003.tar", "--split", "train"],
            "is a shard, which has only one config and split",
        ),
    ],
)
def test_errors_are_one_message_and_exit_code_1(folder, arguments, message, capsys):
    assert main(["inspect", *(argument.format(folder=folder) for argument in arguments)]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_stored_crops_are_described_by_their_mean_label_and_the_first_crops(folder, tmp_path):
    annotator = rd.ModuleAnnotator(ColourNet(), (48, 64), classes=("cat", "dog", "n01440764"), name="colours")
    build_config = rd.annotate.BuildConfig(encoding="crops", num_crops=5)
    source = rd.data.ImageFolderSource(folder.parent / "images")
    rd.build(source, tmp_path / "data", annotator, build_config=build_config, progress=False)
    text = describe(tmp_path / "data", num_samples=2)
    assert "crops      5 per image, crops 16, stored as compact" in text
    dataset = rd.load_dataset(tmp_path / "data", split="train")
    for _, labels in (dataset[0], dataset[1]):
        lines = text.partition(f"\n{labels.key}: ")[2].splitlines()
        assert "crops " in lines[0]
        assert lines[1].startswith(f"  mean: {float(labels.mean_label().max()):.1%} ")
        for crop in range(3):
            x1, y1, x2, y2 = labels.pixel_box(crop)
            mirrored = ", mirrored" if labels.flips[crop] else ""
            best = float(labels.soft_labels([crop]).max())
            assert lines[2 + crop].startswith(f"  crop {crop}, x {x1} to {x2}, y {y1} to {y2}{mirrored}: {best:.1%} ")
        assert lines[5] == "  ... 2 more"
    shard = next((tmp_path / "data").glob("*/*.tar"))
    assert "  mean: " in describe(shard, num_samples=1)
    (shard.parent / "_info.json").unlink()
    assert "  mean: " in describe(shard, num_samples=1)
