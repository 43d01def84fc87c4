"""The number of classes of ImageNet-21k, large maps and grayscale images work from images to labels."""

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import ModuleAnnotator
from relabel_datasets.annotate.builder import build
from relabel_datasets.annotate.shard import BuildConfig

NUM_CLASSES = 21_841


class ManyClasses(torch.nn.Module):
    """Network of stride 2 whose class 7 is brightness, 21,840 darkness, and 300 the horizontal position."""

    def forward(self, images):
        gray = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 2)
        logits = torch.zeros(len(images), NUM_CLASSES, *gray.shape[2:])
        logits[:, 7], logits[:, -1] = 6 * gray[:, 0], -6 * gray[:, 0]
        logits[:, 300] = torch.linspace(-3, 9, gray.shape[3])
        return logits


@pytest.mark.slow
@pytest.mark.parametrize(("encoding", "tolerance"), [("heatmaps", 0.02), ("topk", 0.2)])
def test_21841_classes_in_maps_of_32_x_32_locations(tmp_path, encoding, tolerance):
    for i in range(3):
        gray = np.random.default_rng(i).integers(0, 256, (50, 70), np.uint8)
        path = tmp_path / "images" / "a" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(gray).save(path)
    source = rd.data.ImageFolderSource(tmp_path / "images")
    source.classes = None
    annotator = ModuleAnnotator(ManyClasses(), 64, name="many")
    manifest = build(source, tmp_path / "data", annotator, build_config=BuildConfig(encoding=encoding), progress=False)
    assert len(manifest.classes) == NUM_CLASSES
    assert manifest.encoding["map_size"] == [32, 32]
    dataset = rd.load_dataset(tmp_path / "data", split="train")
    assert rd.verify(tmp_path / "data", num_workers=0, progress=False).ok
    for i in range(3):
        image, label_map = dataset[i]
        assert image.mode == "RGB"
        dense = annotator(annotator.preprocess(image)[None])[0]
        right = v2.functional.crop(label_map, 0, 42, 50, 28)  # the right two fifths
        expected = dense[:, :, round(0.6 * 32) :].mean((1, 2)).softmax(0)  # to a fifth of a location
        pooled = rd.LabelPooling()(right)
        assert pooled.shape == (NUM_CLASSES,)
        assert pooled.argmax() == expected.argmax() == 300
        whole = rd.LabelPooling()(label_map)
        reference = dense.mean((1, 2)).softmax(0)
        assert (whole - reference).abs().sum() < tolerance
