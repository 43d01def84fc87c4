import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import ModuleAnnotator
from relabel_datasets.annotate.calibrate import (
    CROPS_PER_IMAGE,
    fit_calibration,
    measure_crops,
    num_calibrated_images,
)
from relabel_datasets.labels import Calibration
from relabel_datasets.labels.crops import seeded_crops, to_pixels
from relabel_datasets.labels.encodings.crops import seed_of
from relabel_datasets.shards.manifest import Manifest
from tests.conftest import ColourNet, picture


@pytest.mark.parametrize(
    ("num_images", "expected"),
    [(1, 0), (19, 0), (20, 1), (399, 19), (9_469, 473), (10_000, 500), (1_281_167, 500)],
)
def test_few_images_are_cropped(num_images, expected):
    assert num_calibrated_images(num_images) == expected


class ContextNet(ColourNet):
    """Network whose logits at a location depend on the rest of the image, so that crops are answered differently."""

    def forward(self, images):
        logits = super().forward(images)
        return 3 * (logits - logits.mean((2, 3), keepdim=True)) / logits.std((2, 3), keepdim=True) + logits


@pytest.fixture
def in_context():
    return ModuleAnnotator(ContextNet(), (48, 64), classes=("cat", "dog", "emu"), name="context")


def pooled(label_map, image, box_xyxy, *, calibrated=False):
    """Return the label of a box that lies on whole pixels of the image."""
    x1, y1, x2, y2 = np.rint(box_xyxy * [*image.size, *image.size]).astype(int).tolist()
    label_map = rd.LabelMap.wrap(label_map.logits, like=label_map, canvas_size=(image.height, image.width))
    return rd.LabelPooling(calibrated=calibrated)(F.crop(label_map, y1, x1, y2 - y1, x2 - x1))


def records_of(gain_of, num_images):
    """Return the records of crops whose answers are the pooled logits times a gain that depends on the share of the area."""
    generator, records = torch.Generator().manual_seed(0), []
    for i in range(num_images):
        image, label_map = picture(i), rd.LabelMap.from_logits(8 * torch.randn(3, 5, 7, generator=generator), k=3)
        boxes = seeded_crops([i], [(image.height, image.width)], CROPS_PER_IMAGE)[0][0]
        gains = [gain_of((x2 - x1) * (y2 - y1)) for x1, y1, x2, y2 in boxes]
        answers = [pooled(label_map, image, box).log() * gain for box, gain in zip(boxes, gains, strict=True)]
        records += measure_crops(label_map.to_safetensors("float16"), boxes, torch.stack(answers))
    return records


def test_the_fit_recovers_gains_that_depend_on_the_area():
    true = Calibration((0.08, 1.0), ((0.7, 2.0),), num_crops=1, kl_before=0.0, kl_after=0.0)
    records = records_of(lambda share: true.gains_at(share).item(), 60)
    fitted = fit_calibration(records)
    assert fitted.num_crops == 240
    assert fitted.gains[0] == pytest.approx(true.gains_at(fitted.shares)[:, 0], rel=0.2)
    assert fitted.kl_after < 0.1 * fitted.kl_before


def test_a_fit_is_never_worse_than_no_gains():
    for num_crops in (1, 2, 5, 16):
        fitted = fit_calibration(records_of(lambda share: 1.0, 4)[:num_crops])
        assert fitted.num_crops == num_crops
        assert fitted.kl_after <= fitted.kl_before
        assert fitted.gains[0] == pytest.approx((1, 1, 1, 1), abs=0.1)


def test_gains_stay_in_their_range():
    for true in (1e-3, 1e3):
        gains = np.array(fit_calibration(records_of(lambda share, true=true: true, 8)).gains)
        assert (gains >= 0.01).all()
        assert (gains <= 8).all()
        assert (gains < 0.5).any() if true < 1 else (gains > 2).any()


def test_crops_with_answers_that_are_not_finite_are_left_out():
    blob = rd.LabelMap.from_logits(torch.randn(3, 5, 7), k=3).to_safetensors()
    answers = torch.zeros(4, 3)
    answers[1, 2] = torch.nan
    answers[3, 0] = torch.inf
    assert len(measure_crops(blob, np.array([[0, 0, 1, 1]] * 4), answers)) == 2
    assert fit_calibration([]) is None


@pytest.fixture
def images(tmp_path):
    """ImageFolder of 60 images, of which 3 are cropped."""
    for i in range(60):
        path = tmp_path / "images" / ("cat", "dog", "emu")[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, (40, 56) if i % 2 else (48, 32)).save(path)
    return rd.data.ImageFolderSource(tmp_path / "images")


@pytest.mark.parametrize("encoding", ["heatmaps", "topk"])
def test_a_build_stores_gains_and_divergences_that_pooling_reproduces(tmp_path, images, in_context, encoding):
    build_config = rd.annotate.BuildConfig(encoding=encoding, batch_size=5)
    out = tmp_path / "out"
    manifest = rd.build(images, out, in_context, build_config=build_config, shard_size=2, progress=False)
    calibration = manifest.splits["train"].calibration
    assert Manifest.load(out / manifest.config) == manifest
    assert calibration.num_crops == 3 * CROPS_PER_IMAGE

    dataset = rd.load_dataset(out, split="train")
    divergences = {False: [], True: []}
    for row in range(3):
        image, label_map = dataset[row]
        size = image.height, image.width
        boxes, flips = seeded_crops([seed_of(label_map.key)], [size], CROPS_PER_IMAGE)
        for box, corners, flip in zip(boxes[0], to_pixels(boxes[0], size).tolist(), flips[0], strict=True):
            crop = F.horizontal_flip(image.crop(corners)) if flip else image.crop(corners)
            answer = in_context(in_context.preprocess(crop)[None]).mean((0, 2, 3)).log_softmax(0)
            for calibrated, values in divergences.items():
                label = pooled(label_map, image, box, calibrated=calibrated)
                values.append(float((answer.exp() * (answer - label.log())).sum()))
    assert np.mean(divergences[False]) == pytest.approx(calibration.kl_before, abs=2e-3)
    assert np.mean(divergences[True]) == pytest.approx(calibration.kl_after, abs=2e-3)
    assert calibration.kl_after < 0.95 * calibration.kl_before


class _Interrupted(Exception):
    pass


def test_interrupted_and_repaired_builds_write_the_same_calibration(tmp_path, images, in_context, monkeypatch):
    def run(name):
        build_config = rd.annotate.BuildConfig(batch_size=5, num_threads=1)
        rd.build(images, tmp_path / name, in_context, build_config=build_config, shard_size=2, progress=False)
        return {path.name: path.read_bytes() for path in (tmp_path / name / "context").iterdir()}

    whole = run("whole")
    for num_calls in (1, 4, 1):  # in the crops of the first shard, in those of the second shard, and again
        remaining = iter(range(num_calls))

        def call(annotator, pixels, remaining=remaining):
            if next(remaining, None) is None:
                raise _Interrupted
            return annotator._forward(pixels)

        with monkeypatch.context() as patch:
            patch.setattr(ModuleAnnotator, "__call__", call)
            with pytest.raises(_Interrupted):
                run("interrupted")
    assert run("interrupted") == whole
    (tmp_path / "whole" / "context" / "train-00001-of-00030.tar").unlink()
    assert run("whole") == whole


def test_small_datasets_have_no_calibration(tmp_path, image_folder, annotator):
    manifest = rd.build(rd.data.ImageFolderSource(image_folder), tmp_path, annotator, progress=False)
    assert manifest.splits["train"].calibration is None
    label_map = rd.load_dataset(tmp_path, split="train")[0][1]
    with pytest.raises(ValueError, match="has no calibration"):
        rd.LabelPooling(calibrated=True)(label_map)
