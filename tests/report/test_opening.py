"""The choice of the sample and the crop that a report opens on."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import relabel_datasets as rd
from relabel_datasets.analysis import measure_images
from relabel_datasets.report.opening import disagreement, opening_view
from tests.conftest import colours

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
CLASSES = {RED: "cat", GREEN: "dog", BLUE: "emu"}


@pytest.fixture
def measured(tmp_path):
    """Return a function that builds a dataset of pictures, each of 4 equal vertical stripes, and measures them."""

    def measured(stripes, labels, **arguments):
        for name in CLASSES.values():
            (tmp_path / "images" / name).mkdir(parents=True)
            Image.new("RGB", (64, 48), {v: k for k, v in CLASSES.items()}[name]).save(
                tmp_path / "images" / name / f"plain_{name}.png"
            )
        for i, (colors, label) in enumerate(zip(stripes, labels, strict=True)):
            pixels = np.repeat(np.array([colors], np.uint8), 16, 1).repeat(48, 0)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"stripes_{i}.png")
        source, build_config = rd.data.ImageFolderSource(tmp_path / "images"), rd.annotate.BuildConfig(**arguments)
        rd.build(source, tmp_path / "data", colours(), build_config=build_config, progress=False)
        label_maps = rd.LabelMaps(tmp_path / "data")
        return label_maps, measure_images(label_maps, range(len(label_maps)), progress=False)

    return measured


CROPS = {"encoding": "crops", "num_crops": 60}


@pytest.mark.parametrize("arguments", [{}, CROPS])
def test_the_report_opens_on_the_image_whose_crops_differ_most(measured, arguments):
    label_maps, images = measured(
        [(RED, RED, RED, GREEN), (RED, RED, GREEN, BLUE), (BLUE, BLUE, BLUE, BLUE)], ["cat", "cat", "emu"], **arguments
    )
    opening = opening_view(label_maps, images)
    assert images["key"][opening.sample] == "stripes_1"
    if arguments:
        assert opening.box is None
        labels = label_maps["stripes_1"]
        assert opening.crop == int(labels.soft_labels()[:, 1:].amax(1).argmax())
        x1 = float(labels.boxes_xyxy[opening.crop, 0])
    else:
        x1, y1, x2, y2 = opening.box
        assert (x2 - x1, y2 - y1) == pytest.approx((0.4, 0.4))
    assert x1 >= 0.45  # right of the stripes of the label, cat
    subset = {name: column[images["key"] != "stripes_1"] for name, column in images.items()}
    assert subset["key"][opening_view(label_maps, subset).sample] == "stripes_0"


@pytest.mark.parametrize("arguments", [{}, CROPS])
def test_an_image_that_the_annotator_gives_another_class_is_no_opening_unless_all_are(measured, arguments):
    label_maps, images = measured([(RED, RED, GREEN, BLUE), (BLUE, BLUE, BLUE, RED)], ["dog", "emu"], **arguments)
    assert images["key"][opening_view(label_maps, images).sample] == "stripes_1"
    subset = {name: column[images["key"] == "stripes_0"] for name, column in images.items()}
    assert opening_view(label_maps, subset).sample == 0


def test_disagreement_is_0_for_equal_labels_and_highest_for_certain_different_ones():
    cat, dog = torch.eye(2)
    unsure = torch.full((2,), 0.5)
    crops = torch.stack([torch.stack(pair) for pair in ((cat, cat), (unsure, unsure), (cat, unsure), (cat, dog))])
    measured = disagreement(crops).tolist()
    assert measured[:2] == pytest.approx([0, 0], abs=1e-6)
    assert measured[3] == pytest.approx(math.log(2))
    assert 0 < measured[2] < measured[3]
