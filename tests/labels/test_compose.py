import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.labels.batch import LabelMapBatch
from relabel_datasets.labels.compose import run_batch, run_pipeline
from relabel_datasets.labels.v2_hooks import Transform
from relabel_datasets.train.timm_augmentation import TimmTransforms
from tests.conftest import picture


class Twice(torch.nn.Module):
    """Somebody's own transform that gives more than a pair."""

    def forward(self, image, target):
        return image, target, target


PIPELINES = {
    "training": v2.Compose([
        v2.RandomResizedCrop(16), v2.RandomHorizontalFlip(), v2.TrivialAugmentWide(), rd.LabelPooling(), v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,) * 3, (0.5,) * 3), v2.RandomErasing(0.5),
    ]),
    "no pooling": v2.Compose([v2.RandomCrop(20, pad_if_needed=True), v2.RandomVerticalFlip(), v2.ColorJitter(0.5)]),
    "nested": v2.Compose([
        v2.Compose([v2.Resize(24), v2.CenterCrop(20)]), v2.RandomApply([v2.RandomRotation(30)]),
        v2.RandomChoice([v2.RandomAffine(10), v2.Pad(3)]), v2.RandomOrder([v2.RandomHorizontalFlip(), v2.Grayscale(3)]),
        rd.LabelPooling(output_size=(2, 3)), v2.PILToTensor(),
    ]),
    "tensor first": v2.Compose([v2.ToImage(), v2.RandomZoomOut(), v2.RandomResize(10, 20), rd.LabelPooling(), v2.ToPureTensor()]),
    "label looked at": v2.Compose([
        v2.RandomHorizontalFlip(), rd.LabelPooling(), v2.RandomApply([v2.Grayscale(3)], 0.9), v2.Lambda(torch.exp, torch.Tensor),
    ]),
    "all of the image": v2.Compose([v2.RandomCrop(20), rd.LabelPooling(localized=False), v2.ToImage()]),
    "one label": v2.Compose([v2.RandomCrop(20), rd.LabelPooling((2, 3), 2.0, multi_label=False), v2.ToImage()]),
    "five crops": v2.Compose([v2.FiveCrop(16), v2.Lambda(lambda pair: pair)]),
    "own": v2.Compose([Twice(), v2.RandomHorizontalFlip()]),
    "not a Compose": v2.RandomResizedCrop(16),
    "empty sequence": v2.Compose([v2.Identity()]),
}  # fmt: skip


def flat(value):
    if isinstance(value, (tuple, list)):
        return [leaf for each in value for leaf in flat(each)]
    return [value]


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("kind", ["PIL", "tv_tensors.Image", "tensor"])
def test_results_and_random_numbers_are_those_of_the_pipeline(name, kind):
    pipeline = PIPELINES[name]
    image = {"PIL": lambda x: x, "tv_tensors.Image": tv_tensors.Image, "tensor": v2.functional.pil_to_tensor}[kind](
        picture(0, (40, 56))
    )
    if kind != "PIL" and name == "nested":
        pytest.skip("PILToTensor is of PIL images")
    label_map = rd.LabelMap.from_logits(3 * torch.randn(5, 4, 6), canvas_size=(40, 56), key="k", label=2)
    for seed in range(12):
        torch.manual_seed(seed)
        expected = flat(pipeline(image, label_map))
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        found = flat(run_pipeline(pipeline, image, label_map))
        assert torch.equal(torch.get_rng_state(), state)
        assert list(map(type, found)) == list(map(type, expected))
        for one, other in zip(found, expected, strict=True):
            if isinstance(one, torch.Tensor):
                torch.testing.assert_close(one, other, rtol=0, atol=0)
            else:
                assert one.tobytes() == other.tobytes()
            if isinstance(one, rd.LabelMap):
                assert (one.view, one.canvas_size, one.key) == (other.view, other.canvas_size, other.key)


def run_batch_of_one(pipeline, image, label_map):
    return run_batch(pipeline, [(image, label_map)])[0]


@pytest.mark.parametrize("run", [run_pipeline, run_batch_of_one])
def test_errors_are_those_of_the_pipeline(run):
    pipeline = v2.Compose([v2.RandomHorizontalFlip(), rd.LabelPooling(), rd.LabelPooling()])
    label_map = rd.LabelMap.from_logits(torch.randn(5, 4, 6), canvas_size=(40, 56))
    with pytest.raises(TypeError, match="no LabelMap"):
        run(pipeline, picture(0, (40, 56)), label_map)
    with pytest.raises(ValueError, match="followed it"):
        run(pipeline, picture(0, (30, 56)), label_map)


@pytest.mark.parametrize("encoding", ["heatmaps", "topk"])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_batch_gives_what_its_samples_give(name, encoding):
    pairs = [
        (picture(i, (40, 56)), rd.LabelMap.from_logits(3 * torch.randn(9, 4, 6), encoding, k=5, canvas_size=(40, 56)))
        for i in range(7)
    ]
    torch.manual_seed(0)
    expected = [run_pipeline(PIPELINES[name], *pair) for pair in pairs]
    state = torch.get_rng_state()
    torch.manual_seed(0)
    found = run_batch(PIPELINES[name], pairs)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(found) == len(expected)
    for one, other in zip(flat(found), flat(expected), strict=True):
        assert type(one) is type(other)
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        else:
            assert one.tobytes() == other.tobytes()


class LabelPoolingOfOne(rd.LabelPooling):
    """Somebody's own pooling, which says nothing of batches."""

    def transform(self, inpt, params):
        return super().transform(inpt, params) ** 2


class Watching(Transform):
    """Somebody's own transform that looks at the labels of its samples."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def check_inputs(self, flat_inputs):
        self.seen.append(flat_inputs[1])

    def transform(self, inpt, params):
        return inpt


def test_maps_are_pooled_together_where_nobody_minds(monkeypatch):
    sizes = []
    pool = LabelMapBatch.pool

    def record(batch, *args, **options):
        sizes.append(len(batch))
        return pool(batch, *args, **options)

    monkeypatch.setattr(LabelMapBatch, "pool", record)

    def maps(kinds):
        return [rd.LabelMap.from_logits(torch.randn(9, 4, 6), kind, canvas_size=(40, 56)) for kind in kinds]

    def labels(*transforms, kinds=("topk",) * 3):
        pairs = [(picture(i, (40, 56)), each) for i, each in enumerate(maps(kinds))]
        return [sample[1] for sample in run_batch(v2.Compose([v2.RandomCrop(20), *transforms]), pairs)]

    pooling, watching = rd.LabelPooling(), Watching()
    labels(pooling, v2.ToImage(), v2.ToDtype(torch.float32), v2.Normalize([0.0], [1.0]), v2.RandomErasing())
    assert sizes == [3]
    labels(LabelPoolingOfOne())
    found = labels(pooling, watching)
    assert sizes == [3]
    labels(pooling, kinds=["topk", "heatmaps", "topk", "heatmaps", "topk"])
    labels(pooling, kinds=["topk", "heatmaps"])
    assert sizes == [3, 3, 2]
    assert all(torch.equal(one, other) for one, other in zip(watching.seen, found, strict=True))


class Scaled(TimmTransforms):
    """Somebody's own subclass."""

    def __call__(self, image, label_map):
        image, label = super().__call__(image, label_map)
        return image * 2, label


class Wrapper:
    """Somebody's own wrapper, which has the attributes of the pipeline in it."""

    def __init__(self, pipeline):
        self.pipeline = pipeline

    def __getattr__(self, name):
        return getattr(self.pipeline, name)

    def __call__(self, image, label_map):
        image, label = self.pipeline(image, label_map)
        return image * 2, label


@pytest.mark.parametrize("run", [run_pipeline, run_batch_of_one])
@pytest.mark.parametrize("name", ["subclass", "wrapper"])
def test_a_pipeline_that_is_called_in_another_way_is_called(name, run):
    timm = rd.timm_transforms(16, is_training=False)
    changed = Wrapper(timm) if name == "wrapper" else Scaled(timm._pipeline, timm.pooling)
    pair = picture(0, (40, 56)), rd.LabelMap.from_logits(torch.randn(5, 4, 6), canvas_size=(40, 56))
    assert torch.equal(run(changed, *pair)[0], 2 * timm(*pair)[0])
