"""Datasets whose images have one label map for each input size, from the build to the report."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.annotate import BuildConfig, ModuleAnnotator
from relabel_datasets.annotate.annotator import annotate_scales, classify
from relabel_datasets.annotate.calibrate import CROPS_PER_IMAGE, fit_calibration, measure_crops, pooled_logits
from relabel_datasets.labels.crops import seeded_crops, to_pixels
from relabel_datasets.labels.encodings.crops import seed_of
from relabel_datasets.labels.view import rows_of_boxes
from relabel_datasets.report.pictures import draw_pictures
from relabel_datasets.report.terminal import describe
from relabel_datasets.shards.manifest import Manifest, _checksum
from relabel_datasets.train import TokenLabelPooling
from tests.conftest import ColourNet, picture

NAMES = ("cat", "dog", "emu")
CONFIG = BuildConfig(encoding="multiscale", batch_size=5, num_threads=1)


class Contrast(ColourNet):
    """Network whose logits depend on the rest of the image, so that crops are answered differently."""

    def forward(self, images):
        logits = super().forward(images)
        return 3 * (logits - logits.mean((2, 3), keepdim=True)) / logits.std((2, 3), keepdim=True) + logits


def two_sizes():
    sizes = ((24, 32), (48, 64))
    return rd.Ensemble([ModuleAnnotator(Contrast(), size, classes=NAMES, name="contrast") for size in sizes])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """ImageFolder of 60 images, of which 3 are cropped."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(60):
        path = folder / NAMES[i % 3] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        picture(i, (40, 56) if i % 2 else (48, 32)).save(path)
    return rd.data.ImageFolderSource(folder)


@pytest.fixture(scope="module")
def dataset(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    rd.build(images, folder, two_sizes(), build_config=CONFIG, shard_size=20, progress=False)
    return folder


def test_the_manifest_has_the_sizes_of_all_maps_and_gains_for_each(dataset):
    content = json.loads((dataset / "contrast" / "_info.json").read_text())
    assert content["encoding"] == {
        "name": "multiscale", "k": 10, "dtype": "uint4", "map_size": [6, 8], "map_sizes": [[3, 4], [6, 8]],
    }  # fmt: skip
    assert np.shape(content["splits"]["train"]["calibration"]["gains"]) == (2, 4)
    manifest = Manifest.load(dataset / "contrast")
    assert manifest.map_sizes == [[3, 4], [6, 8]]
    assert Manifest.parse(manifest.to_bytes(), "again") == manifest


def test_maps_are_those_of_the_members(dataset, images):
    ensemble, loaded = two_sizes(), rd.LabelMaps(dataset)
    for row in (0, 7):
        pixels = ensemble.preprocess(rd.decode_image(images.read(row), images.name(row)))[None]
        label_map = loaded[images.keys[row]]
        for scale, dense in enumerate(annotate_scales(ensemble, pixels)):
            one = rd.LabelMap.from_logits(dense[0], k=3)
            got = label_map.tensors["logits" if scale == 0 else f"logits_{scale}"]
            torch.testing.assert_close(got, one.logits, rtol=0, atol=float(one.logits.max() - one.logits.min()) / 10)


def test_calibrated_labels_have_the_divergence_in_the_manifest(dataset):
    calibration = Manifest.load(dataset / "contrast").splits["train"].calibration
    ensemble, loaded, divergences = two_sizes(), rd.load_dataset(dataset, split="train"), {False: [], True: []}
    for row in range(3):
        image, label_map = loaded[row]
        size = image.height, image.width
        boxes, flips = seeded_crops([seed_of(label_map.key)], [size], CROPS_PER_IMAGE)
        for box, corners, flip in zip(boxes[0], to_pixels(boxes[0], size).tolist(), flips[0], strict=True):
            crop = image.crop(corners)
            crop = v2.functional.horizontal_flip(crop) if flip else crop
            answer = classify(ensemble, ensemble.preprocess(crop)[None])[0].log_softmax(0)
            x1, y1, x2, y2 = box
            moved = rd.LabelMap.wrap(
                label_map.logits, like=label_map, view=rd.labels.View(x2 - x1, 0, x1, 0, y2 - y1, y1)
            )
            for calibrated, values in divergences.items():
                label = rd.LabelPooling(calibrated=calibrated)(moved)
                values.append(float((answer.exp() * (answer - label.log())).sum()))
    assert calibration.num_crops == len(divergences[True]) == 3 * CROPS_PER_IMAGE
    assert np.mean(divergences[False]) == pytest.approx(calibration.kl_before, abs=2e-3)
    assert np.mean(divergences[True]) == pytest.approx(calibration.kl_after, abs=2e-3)
    assert calibration.kl_after < 0.9 * calibration.kl_before


@pytest.mark.parametrize(("num_classes", "tolerance"), [(3, 1e-3), (64, 1e-3), (2000, 0.01)])
def test_records_of_crops_have_the_divergence_at_any_gains(num_classes, tolerance):
    generator = torch.Generator().manual_seed(0)
    shared = 4 * torch.randn(num_classes, generator=generator)[:, None, None]
    dense = [shared + torch.randn(num_classes, *size, generator=generator) for size in ((4, 3), (7, 9))]
    blob = rd.LabelMap.from_logits(dense, "multiscale", k=min(20, num_classes)).to_safetensors("float16")
    boxes, _ = seeded_crops([0], [(30, 40)], 30)
    pooled = pooled_logits(blob, rows_of_boxes(boxes[0]))
    noise = torch.randn(30, num_classes, generator=generator)
    true = torch.tensor([0.9, 0.2], dtype=torch.float64)
    answers = torch.einsum("s,nsc->nc", true, pooled) + 0.5 * noise
    fitted = fit_calibration(measure_crops(blob, boxes[0], answers))
    shares = (boxes[0][:, 2] - boxes[0][:, 0]) * (boxes[0][:, 3] - boxes[0][:, 1])

    def divergence(gains):
        label = torch.einsum("ns,nsc->nc", torch.from_numpy(gains), pooled).log_softmax(1)
        log_answers = answers.log_softmax(1)
        return float((log_answers.exp() * (log_answers - label)).sum(1).mean())

    assert divergence(np.full((30, 2), 0.5)) == pytest.approx(fitted.kl_before, abs=1e-3)
    assert divergence(fitted.gains_at(shares)) == pytest.approx(fitted.kl_after, abs=tolerance)
    assert fitted.kl_after <= divergence(np.tile(true.numpy(), (30, 1))) + tolerance


def test_a_repaired_build_has_the_same_bytes(dataset, images):
    files = {path: path.read_bytes() for path in (dataset / "contrast").iterdir()}
    (dataset / "contrast" / "train-00001-of-00003.tar").unlink()
    rd.build(images, dataset, two_sizes(), build_config=CONFIG, shard_size=20, progress=False)
    assert {path: path.read_bytes() for path in (dataset / "contrast").iterdir()} == files


@pytest.mark.parametrize("calibrated", [False, True])
def test_every_reader_pools_the_same_labels(dataset, calibrated):
    transforms = v2.Compose([v2.CenterCrop((20, 30)), rd.LabelPooling(calibrated=calibrated)])
    loaded = rd.load_dataset(dataset, split="train", transforms=transforms)
    want = {loaded.label_maps.index.key(i): loaded[i][1] for i in range(len(loaded))}
    plain = rd.load_dataset(dataset, split="train", transforms=v2.CenterCrop((20, 30)))
    batch = rd.collate([plain[i][1] for i in range(60)])
    torch.testing.assert_close(batch.pool(calibrated=calibrated), torch.stack(list(want.values())), rtol=0, atol=1e-5)
    stream = rd.load_dataset(
        dataset, split="train", streaming=True, transforms=v2.Compose([v2.CenterCrop((20, 30)), v2.PILToTensor()])
    )
    loader = rd.RelabelLoader(stream, 8, collate_fn=rd.collate)
    num_images = 0
    for _, label_maps in loader:
        for key, label in zip(label_maps.keys, label_maps.pool(calibrated=calibrated), strict=True):
            torch.testing.assert_close(label, want[key], rtol=0, atol=1e-5)
            num_images += 1
    assert num_images == 60


def test_timm_and_token_pipelines_pool_them(dataset):
    pytest.importorskip("timm")
    transforms = rd.timm_transforms(16, pooling=TokenLabelPooling(2, calibrated=True))
    image, (label, tokens) = rd.load_dataset(dataset, split="train", transforms=transforms)[0]
    assert (image.shape, label.shape, tokens.shape) == ((3, 16, 16), (3,), (3, 2, 2))
    torch.testing.assert_close(tokens.sum(0), torch.ones(2, 2))


def test_they_are_verified_described_and_analyzed(dataset):
    assert rd.verify(dataset).problems == []
    text = describe(dataset, num_samples=1)
    assert "3x4 and 6x8 locations, multiscale 10" in text
    assert "of the area, 3x4 map" in text
    assert "3 x 4 and 6 x 8 locations" in (dataset / "README.md").read_text()
    analysis = rd.analysis.analyze(dataset, num_crops=48, progress=False)
    assert analysis.tables["calibration"].columns == ("area_share", "gain_3x4", "gain_6x8")
    assert analysis.tables["fidelity"].rows[0][2] == "3x4x3+6x8x3"


@pytest.mark.slow
def test_they_are_plotted_reported_and_drawn(dataset, tmp_path):
    analysis = rd.analysis.analyze(dataset, num_crops=48, progress=False)
    assert set(rd.report.plot(analysis)) >= {"calibration"}
    report = rd.report.write_report(dataset, tmp_path / "report.html", num_crops=48, progress=False)
    assert "3 x 4 and 6 x 8 locations" in report.read_text()
    draw_pictures(rd.load_dataset(dataset, split="train"), tmp_path / "pictures", num_samples=1)
    assert list((tmp_path / "pictures").iterdir())


def test_maps_of_other_sizes_than_in_the_manifest_are_found(dataset, tmp_path):
    manifest = Manifest.load(dataset / "contrast")
    copied = tmp_path / "out" / "contrast"
    copied.mkdir(parents=True)
    for path in (dataset / "contrast").iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    encoding = {**manifest.encoding, "map_sizes": [[6, 8], [3, 4]]}
    dataclasses.replace(manifest, encoding=encoding).save(copied)
    problems = rd.verify(tmp_path / "out").problems
    assert any("has size [[3, 4], [6, 8]], the manifest says [[6, 8], [3, 4]]" in str(problem) for problem in problems)


def test_one_annotator_is_refused_with_the_remedy(images, tmp_path, annotator):
    for one in (annotator, rd.Ensemble([annotator])):
        with pytest.raises(
            ValueError, match=r"2 to 8 annotators.*got 1 annotator: use an Ensemble \(on the command line, --sc"
        ):
            rd.build(images, tmp_path, one, build_config=CONFIG, progress=False)
    assert list(tmp_path.iterdir()) == []


HOSTILE = {
    "no gains of a map": (("calibration", "gains"), [[1.0, 1, 1, 1]], "2 lists of 4 positive numbers"),
    "gains of one map": (("calibration", "gains"), [1.0, 1, 1, 1], "2 lists of 4 positive numbers"),
    "gains of another length": (("calibration", "gains"), [[1.0, 1, 1, 1], [1.0]], "2 lists of 4 positive numbers"),
    "a negative gain": (("calibration", "gains"), [[1.0, 1, 1, 1], [1.0, 1, -1, 1]], "2 lists of 4 positive numbers"),
    "lists and numbers": (("calibration", "gains"), [[1.0, 1, 1, 1], 1.0], r"gains\[1\] must be a list"),
    "a text": (("calibration", "gains"), [[1.0, 1, 1, 1], ["1", 1, 1, 1]], r"gains\[1\]\[0\] must be a finite number"),
    "too many maps": (("encoding", "map_sizes"), [[3, 4]] * 9, "map_sizes must be a list of 0 to 8"),
    "a size of one number": (("encoding", "map_sizes"), [[3], [6, 8]], r"map_sizes\[0\] must be"),
    "a size of 0": (("encoding", "map_sizes"), [[3, 0], [6, 8]], r"map_sizes\[0\]\[1\] must be"),
    "another largest map": (("encoding", "map_size"), [3, 4], "map_size must be the largest of map_sizes"),
    "no maps": (("encoding", "map_sizes"), [], "map_size must be the largest of map_sizes"),
}


@pytest.mark.parametrize(("field", "value", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_values_in_the_manifest_are_refused(dataset, field, value, message):
    content = json.loads((dataset / "contrast" / "_info.json").read_text())
    parent = content[field[0]] if field[0] == "encoding" else content["splits"]["train"][field[0]]
    parent[field[1]] = value
    del content["checksum"]
    content["checksum"] = _checksum(content)
    with pytest.raises(rd.DatasetError, match=message):
        Manifest.parse(json.dumps(content).encode(), "_info.json")
