"""LabelPooling as a transform, and what its soft labels are used with: collation, CutMix, MixUp, timm."""

import copy
import pickle

import numpy as np
import PIL.Image
import pytest
import timm.data
import timm.loss
import torch
from torch.autograd import forward_ad
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

import relabel_datasets as rd
from relabel_datasets.labels.pooling import pool_label_map

from .samples import CANVAS_SIZE, ENCODINGS, NUM_CLASSES, pool_boxes, random_map


def image_of(size=CANVAS_SIZE) -> tv_tensors.Image:
    return tv_tensors.Image(torch.randint(256, (3, *size), dtype=torch.uint8))


def cropped(encoding: str = "heatmaps") -> tuple[tv_tensors.Image, rd.LabelMap]:
    return tuple(F.resized_crop(inpt, 2, 1, 9, 8, [12, 10]) for inpt in (image_of(), random_map(encoding)))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_soft_label_is_a_plain_distribution_over_the_classes(encoding):
    image, label_map = cropped(encoding)
    same_image, soft = rd.LabelPooling()(image, label_map)
    assert same_image is image
    assert (type(soft), soft.shape, soft.dtype) == (torch.Tensor, (NUM_CLASSES,), torch.float32)
    assert soft.sum() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(soft, pool_label_map(label_map, label_map.view))
    box = torch.tensor([label_map.view.box_xyxy])
    torch.testing.assert_close(soft, pool_boxes(rd.labels.LabelMapBatch.of([label_map]).encoded, box)[0])


@pytest.mark.parametrize("sample", [dict, list, tuple])
def test_nested_samples_keep_their_structure_and_other_items_are_the_same_objects(sample):
    image, label_map = cropped()
    other = object()
    inputs = {"image": image, "more": [(label_map, "a"), {"other": other}], "number": 3}
    inputs = inputs if sample is dict else sample(inputs.values())
    out = rd.LabelPooling()(inputs)
    assert type(out) is sample
    out = out if sample is dict else dict(zip(("image", "more", "number"), out, strict=True))
    assert out["image"] is image
    assert out["more"][0][0].shape == (NUM_CLASSES,)
    assert out["more"][0][1] == "a"
    assert out["more"][1]["other"] is other
    assert out["number"] == 3


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda transform: pickle.loads(pickle.dumps(transform))])
def test_a_copied_transform_pools_the_same(copying):
    arguments = {"label_weight": 0.25, "calibrated": False, "localized": False, "multi_label": False}
    transform = rd.LabelPooling((2, 3), 1.5, **arguments)
    label_map = cropped()[1]
    assert torch.equal(copying(transform)(label_map), transform(label_map))
    assert repr(copying(transform)) == repr(transform)
    shown = ", ".join(f"{name}={value}" for name, value in arguments.items())
    assert f"output_size=(2, 3), temperature=1.5, {shown}" in repr(transform)


@pytest.mark.parametrize(
    ("output_size", "shape"),
    [(1, ()), ((1, 1), (1, 1)), ([1], (1, 1)), (3, (3, 3)), ([3], (3, 3)), ((2, 3), (2, 3)), ([14, 7], (14, 7))],
)
def test_output_size_gives_one_label_or_a_grid_of_them(output_size, shape):
    label_map = cropped()[1]
    soft = rd.LabelPooling(output_size)(label_map)
    assert soft.shape == (NUM_CLASSES, *shape)
    if shape in ((), (1, 1)):
        torch.testing.assert_close(soft.flatten(), rd.LabelPooling()(label_map), rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_mirrored_image_has_a_mirrored_grid_and_the_same_label(encoding):
    label_map = cropped(encoding)[1]
    mirrored = F.horizontal_flip(label_map)
    grid = rd.LabelPooling((3, 4))
    torch.testing.assert_close(grid(mirrored), grid(label_map).flip(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(rd.LabelPooling()(mirrored), rd.LabelPooling()(label_map), rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_temperature_softens(encoding):
    label_map = cropped(encoding)[1]
    want = (rd.LabelPooling()(label_map).log() / 3).softmax(0)
    torch.testing.assert_close(rd.LabelPooling(temperature=3)(label_map), want)


@pytest.mark.parametrize("output_size", [1, (2, 3)])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_ablation_takes_away_the_place_or_all_but_the_best_class(encoding, output_size):
    whole, (_, label_map) = random_map(encoding), cropped(encoding)
    label_map = rd.LabelMap.wrap(whole, like=whole, view=label_map.view)
    soft = rd.LabelPooling(output_size)(label_map)
    globally = rd.LabelPooling(output_size, localized=False)(label_map)
    torch.testing.assert_close(globally, rd.LabelPooling(output_size)(whole))
    assert not torch.allclose(globally, soft)
    for localized, full in ((True, soft), (False, globally)):
        single = rd.LabelPooling(output_size, localized=localized, multi_label=False)(label_map)
        assert torch.equal(single.argmax(0), full.argmax(0))
        assert torch.equal(single, (single == 1).float())
        assert (single.sum(0) == 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_size": 0}, "output_size must be at least 1, got 0"),
        ({"output_size": (2, 0)}, "output_size must be at least 1, got 0"),
        ({"output_size": (1, 2, 3)}, "output_size must be a positive int or two of them"),
        ({"output_size": ()}, "output_size must be a positive int or two of them"),
        ({"temperature": 0}, "temperature must be positive and finite, got 0"),
        ({"temperature": float("nan")}, "temperature must be positive"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        rd.LabelPooling(**arguments)


@pytest.mark.parametrize(
    "image",
    [image_of(), F.to_pil_image(image_of()), image_of().as_subclass(torch.Tensor), tv_tensors.Video(image_of()[None])],
    ids=lambda image: type(image).__name__,
)
def test_an_image_that_went_another_way_than_its_map_is_refused(image):
    label_map = random_map()
    assert rd.LabelPooling()((image, label_map))[0] is image
    with pytest.raises(
        ValueError, match=r"the image is \(17, 11\) high and wide, but its label map followed it to \(9, 8\)"
    ):
        rd.LabelPooling()({"label": F.crop(label_map, 0, 0, 9, 8), "image": image})


def test_a_sample_without_a_map_is_refused():
    with pytest.raises(
        TypeError, match=r"found no LabelMap in the sample: another LabelPooling or v2\.ToPureTensor comes before it"
    ):
        v2.Compose([v2.ToPureTensor(), rd.LabelPooling()])(image_of(), random_map())


def test_a_usual_training_pipeline_from_pillow_to_batch():
    transform = v2.Compose(
        [
            v2.RandomResizedCrop((12, 10), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.2] * 3),
            v2.RandomErasing(),
            rd.LabelPooling(),
            v2.ToPureTensor(),
        ]
    )
    pixels = np.random.default_rng(0).integers(256, size=(*CANVAS_SIZE, 3), dtype=np.uint8)
    images, labels = default_collate([transform(PIL.Image.fromarray(pixels), random_map()) for _ in range(4)])
    assert (images.shape, labels.shape) == ((4, 3, 12, 10), (4, NUM_CLASSES))
    torch.testing.assert_close(labels.sum(1), torch.ones(4))


# Mixing batches


class SoftlyLabelled(Dataset):
    """Images of one grey each, i / 8, so that a mixed image tells its shares."""

    transform = v2.Compose([v2.RandomHorizontalFlip(), rd.LabelPooling()])

    def __len__(self):
        return 8

    def __getitem__(self, i):
        torch.manual_seed(i)
        return self.transform(tv_tensors.Image(torch.full((3, 8, 10), i / 8)), random_map(canvas_size=(8, 10)))


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = next(iter(DataLoader(SoftlyLabelled(), batch_size=8)))
    return images.as_subclass(torch.Tensor), labels


@pytest.mark.parametrize("mix", [v2.CutMix(), v2.MixUp(alpha=0.4), v2.CutMix(num_classes=NUM_CLASSES)])
def test_torchvision_mixes_soft_labels_as_it_mixes_images(batch, mix):
    images, labels = (part.clone() for part in batch)
    mixed_images, mixed = mix(images, labels)
    means = mixed_images.mean((1, 2, 3))
    first = torch.arange(8) / 8
    second = first.roll(1)
    share = ((means - second) / (first - second))[:, None]
    torch.testing.assert_close(mixed, share * labels + (1 - share) * labels.roll(1, 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize(
    "alphas", [{"mixup_alpha": 0.8, "cutmix_alpha": 0.0}, {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}]
)
def test_timm_mixes_soft_labels_as_it_mixes_images(batch, mode, alphas):
    """With multi_label=True it takes them as they are, and label_smoothing=0 leaves them distributions."""
    images, labels = (part.clone() for part in batch)
    mix = timm.data.Mixup(**alphas, mode=mode, num_classes=NUM_CLASSES, multi_label=True, label_smoothing=0.0)
    mixed_images, mixed = mix(images.clone(), labels.clone())
    means = mixed_images.mean((1, 2, 3))
    first = torch.arange(8) / 8
    second = first.flip(0)
    share = ((means - second) / (first - second))[:, None]
    torch.testing.assert_close(mixed, share * labels + (1 - share) * labels.flip(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed.sum(1), torch.ones(8))


def test_timms_soft_target_loss_takes_pooled_and_mixed_labels(batch):
    images, labels = (part.clone() for part in batch)
    mix = timm.data.Mixup(num_classes=NUM_CLASSES, multi_label=True, label_smoothing=0.0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(240, NUM_CLASSES))
    for inputs, targets in (batch, mix(images, labels)):
        outputs = model(inputs)
        loss = timm.loss.SoftTargetCrossEntropy()(outputs, targets)
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(outputs, targets))
        loss.backward()


def test_timms_collating_mixup_takes_soft_labels():
    collate = timm.data.FastCollateMixup(
        mixup_alpha=0.8, num_classes=NUM_CLASSES, multi_label=True, label_smoothing=0.0
    )
    samples = [SoftlyLabelled()[i] for i in range(8)]
    samples = [((255 * image).to(torch.uint8).as_subclass(torch.Tensor), soft) for image, soft in samples]
    images, labels = next(iter(DataLoader(samples, batch_size=8, collate_fn=collate)))
    assert (images.dtype, labels.shape) == (torch.uint8, (8, NUM_CLASSES))
    torch.testing.assert_close(labels.sum(1), torch.ones(8))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # torch warns of its own rules for derivatives
@pytest.mark.parametrize("output_size", [1, (2, 3)])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_gradients_of_both_modes_reach_the_tensors_of_one_map(encoding, output_size):
    label_map = cropped(encoding)[1]
    names = [name for name, tensor in label_map.tensors.items() if tensor.is_floating_point()]

    def pool(*values):
        tensors = {**label_map.tensors, **dict(zip(names, values, strict=True))}
        changed = rd.LabelMap(
            **tensors,
            encoding=encoding,
            num_classes=NUM_CLASSES,
            canvas_size=label_map.canvas_size,
            view=label_map.view,
        )
        return rd.LabelPooling(output_size)(changed)

    values = tuple(label_map.tensors[name].clone() for name in names)
    jacobians = torch.autograd.functional.jacobian(pool, values)
    assert all(jacobian.abs().max() > 0 for jacobian in jacobians)
    for i, jacobian in enumerate(jacobians):
        direction = torch.randn_like(values[i])
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(value, direction) if i == j else value for j, value in enumerate(values)]
            change = forward_ad.unpack_dual(pool(*duals)).tangent
        torch.testing.assert_close(change, (jacobian * direction).flatten(change.ndim).sum(-1), rtol=1e-4, atol=1e-6)
