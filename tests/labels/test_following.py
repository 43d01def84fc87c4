"""Label maps follow their images after the last image of a batch, with the results of the v2 pipeline."""

import pytest
import torch
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.labels.batch import MapRow
from relabel_datasets.labels.compose import run_batch
from relabel_datasets.labels.reading import read_rows
from relabel_datasets.train.seeds import SeededTransforms, seed_all
from tests.conftest import picture

from .test_encoded import Recorded

SIZE = (40, 56)
FORMS = {"decoded": lambda image: image, "encoded": Recorded, "tensor": v2.functional.to_image}
FOLLOWED = {  # transforms that need no label map
    "training": [v2.RandomResizedCrop(16), v2.RandomHorizontalFlip()],
    "flips": [v2.RandomHorizontalFlip(0.7), v2.RandomVerticalFlip(0.3)],
    "crops": [v2.RandomCrop((30, 56)), v2.RandomCrop((40, 56), pad_if_needed=True), v2.CenterCrop((20, 31))],
    "whole crop": [v2.RandomResizedCrop(20), v2.RandomCrop(20), v2.RandomVerticalFlip()],
    "padded": [v2.RandomCrop(40, padding=(3, 4)), v2.CenterCrop(50), v2.Pad([1, 2, 3, 4])],
    "sizes": [v2.Resize(30), v2.Resize((20, 24)), v2.RandomResizedCrop((12, 18), (0.2, 0.5)), v2.Resize(31, max_size=40)],
    "affine": [v2.RandomRotation(30, expand=True), v2.RandomAffine(10, (0.1, 0.2), (0.8, 1.2), 5), v2.RandomCrop(24)],
    "pixels": [v2.RandomResizedCrop(16), v2.ColorJitter(0.4), v2.RandomGrayscale(0.5), v2.GaussianBlur(3), v2.RandomInvert()],
}  # fmt: skip
LOOKING = {  # transforms with parts that need one
    "own": [v2.RandomResizedCrop(16), v2.Lambda(lambda x: x), v2.RandomHorizontalFlip()],
    "chance": [v2.RandomCrop(30), v2.RandomApply([v2.RandomVerticalFlip(), v2.RandomCrop(20)], 0.5)],
    "automatic": [v2.RandomResizedCrop(16), v2.TrivialAugmentWide(), v2.RandomHorizontalFlip()],
    "zoom": [v2.RandomHorizontalFlip(), v2.RandomZoomOut(), v2.CenterCrop(30)],
}
ENDS = {
    "map": [v2.ToImage()],
    "label": [rd.LabelPooling(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)],
    "late label": [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), rd.LabelPooling((2, 3))],
}


def stored(encoding="heatmaps", count=6, dtype=None):
    """Return label maps, read one at a time, and the same as rows of a batch."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(5, 4), (3, 3)] if encoding == "multiscale" else [(5, 4)]
    blobs = []
    for _ in range(count):
        dense = [3 * torch.randn(9, *size, generator=generator) for size in sizes]
        label_map = rd.LabelMap.from_logits(dense if len(dense) > 1 else dense[0], encoding, k=3, canvas_size=SIZE)
        blobs.append(label_map.to_safetensors(dtype))
    keys, labels = [f"key{i}" for i in range(count)], list(range(count))
    maps = [
        rd.LabelMap.from_safetensors(blob, key=key, label=label)
        for blob, key, label in zip(blobs, keys, labels, strict=True)
    ]
    return maps, read_rows(blobs, keys, labels)


def assert_equal_maps(found, expected):
    assert type(found) is rd.LabelMap
    for name in ("view", "canvas_size", "key", "label", "encoding", "num_classes"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], expected.tensors[name]) for name in expected.tensors)


def assert_equals_pipeline(transforms, form, maps, rows):
    pipeline, images = v2.Compose(transforms), [picture(i, SIZE) for i in range(len(maps))]
    plain = [FORMS["tensor" if form == "tensor" else "decoded"](image) for image in images]
    seed_all(3)
    expected = [pipeline(*pair) for pair in zip(plain, maps, strict=True)]
    state = torch.get_rng_state()
    for labels in (maps, rows):
        seed_all(3)
        found = run_batch(pipeline, zip(map(FORMS[form], images), labels, strict=True))
        assert torch.equal(torch.get_rng_state(), state)
        for (image, label), (true_image, true_label) in zip(found, expected, strict=True):
            assert torch.equal(image, true_image)
            if isinstance(true_label, rd.LabelMap):
                assert_equal_maps(label, true_label)
            else:
                torch.testing.assert_close(label, true_label, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", [*FOLLOWED, *LOOKING])
def test_images_labels_and_random_numbers_are_those_of_the_pipeline(name, end, form):
    assert_equals_pipeline([*{**FOLLOWED, **LOOKING}[name], *ENDS[end]], form, *stored())


@pytest.mark.parametrize("end", ["map", "label"])
@pytest.mark.parametrize(
    ("encoding", "dtype"), [("heatmaps", "float16"), ("heatmaps", "uint8"), ("topk", None), ("multiscale", None)]
)
def test_this_holds_for_each_encoding(encoding, dtype, end):
    assert_equals_pipeline([*FOLLOWED["training"], *ENDS[end]], "encoded", *stored(encoding, dtype=dtype))


@pytest.mark.parametrize("name", ["training", "flips", "pixels"])
@pytest.mark.parametrize("wrap", [v2.Compose, lambda transforms: SeededTransforms(v2.Compose(transforms), 1)])
def test_usual_pipelines_make_no_label_map_of_a_batch(name, wrap, monkeypatch):
    _, rows = stored()
    monkeypatch.setattr(MapRow, "label_map", lambda row: pytest.fail("a label map was made"))
    images = [Recorded(picture(i, SIZE)) for i in range(len(rows))]
    found = run_batch(wrap([*FOLLOWED[name], *ENDS["label"]]), zip(images, rows, strict=True))
    assert all(label.shape == (9,) for _, label in found)


def test_a_transform_in_the_middle_gets_the_label_map_of_its_image_before_the_next_image_is_read():
    seen, read, (maps, rows) = [], [], stored(count=3)
    look = v2.Lambda(lambda label_map: seen.append((len(read), label_map)) or label_map, rd.LabelMap)

    def pairs():
        for i, row in enumerate(rows):
            read.append(i)
            yield picture(i, SIZE), row

    run_batch(v2.Compose([v2.CenterCrop((20, 28)), look, v2.RandomHorizontalFlip(), rd.LabelPooling()]), pairs())
    assert [num_read for num_read, _ in seen] == [1, 2, 3]
    for (_, label_map), whole in zip(seen, maps, strict=True):
        assert_equal_maps(label_map, v2.CenterCrop((20, 28))(whole))


class Refusing(v2.RandomHorizontalFlip):
    """Somebody's own transform, which looks at label maps."""

    def transform(self, inpt, params):
        if isinstance(inpt, rd.LabelMap) and inpt.key == "key1":
            raise RuntimeError(f"{inpt.key} is refused")
        return inpt

    _transform = transform  # torchvision 0.19 and 0.20


@pytest.mark.parametrize(
    ("transform", "error", "num_read"),
    [
        (Refusing(1.0), "key1 is refused", 2),
        (v2.RandomPerspective(p=1.0), "perspective cannot be followed by a LabelMap", 1),
        (v2.ToDtype({rd.LabelPooling: torch.float32}), "No dtype was specified", 1),
    ],
)
def test_errors_are_raised_at_the_sample_that_causes_them(transform, error, num_read):
    read, (_, rows) = [], stored()
    pairs = (read.append(i) or (picture(i, SIZE), row) for i, row in enumerate(rows))
    with pytest.raises((TypeError, ValueError, RuntimeError), match=error):
        run_batch(v2.Compose([v2.RandomCrop(20), v2.ToImage(), transform, rd.LabelPooling()]), pairs)
    assert len(read) == num_read


def test_an_image_of_another_size_than_its_label_map_is_an_error():
    _, rows = stored()
    for wrong in (rows[0], rows[0].label_map()):
        with pytest.raises(ValueError, match="followed it to"):
            run_batch(v2.Compose([v2.RandomHorizontalFlip(), rd.LabelPooling()]), [(picture(0, (30, 56)), wrong)])


def test_some_rows_of_a_batch_can_be_pooled_in_any_order():
    maps, rows = stored()
    chosen, pipeline = [4, 1, 3], v2.Compose([rd.LabelPooling(label_weight=0.25), v2.ToImage()])
    found = run_batch(pipeline, [(picture(0, SIZE), rows[i]) for i in chosen])
    for (_, label), i in zip(found, chosen, strict=True):
        torch.testing.assert_close(label, rd.collate([maps[i]]).pool(label_weight=0.25)[0])
