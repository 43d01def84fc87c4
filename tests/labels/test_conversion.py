import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.labels.compose import run_batch
from tests.conftest import picture

NORMALIZE = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FLOAT = v2.ToDtype(torch.float32, scale=True)


class OwnNormalize(v2.Normalize):
    """Somebody's own transform, of which nothing is known."""

    def transform(self, inpt, params):
        return super().transform(inpt, params) * 2

    _transform = transform  # torchvision before 0.21


TOGETHER = {  # the last transforms of a pipeline, and the kinds of images that they convert together
    "usual": ([v2.ToImage(), FLOAT, NORMALIZE], "PIL Image"),
    "pooling last": ([v2.ToImage(), FLOAT, NORMALIZE, rd.LabelPooling()], "PIL Image"),
    "pooling between": ([v2.ToImage(), rd.LabelPooling(), v2.Identity(), FLOAT], "PIL Image"),
    "plain tensors": ([v2.PILToTensor(), FLOAT, v2.Normalize((0.5,) * 3, (0.25,) * 3, inplace=True)], "PIL Image"),
    "plain tensors at the end": ([v2.ToImage(), FLOAT, NORMALIZE, v2.ToPureTensor()], "PIL Image"),
    "back to images": ([v2.PILToTensor(), v2.ToImage()], "PIL Image"),
    "8 bits": ([v2.ToImage()], "PIL Image"),
    "half": ([v2.ToImage(), v2.ToDtype(torch.bfloat16, scale=True), NORMALIZE], "PIL Image"),
    "double": ([v2.ToImage(), v2.ToDtype(torch.float64, scale=True), NORMALIZE], "PIL Image"),
    "levels": ([v2.ToImage(), v2.ToDtype(torch.float32), NORMALIZE], "PIL Image"),
    "tensors only": ([FLOAT, NORMALIZE], "Image"),
    "random numbers at the end": ([v2.ToImage(), FLOAT, NORMALIZE, v2.RandomErasing(0.5)], ""),
    "twice": ([v2.ToImage(), FLOAT, v2.ToDtype(torch.float64), NORMALIZE], ""),
    "integers": ([v2.ToImage(), v2.ToDtype(torch.int16)], ""),
    "by type": ([v2.ToImage(), v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)], ""),
    "zero": ([v2.ToImage(), FLOAT, v2.Normalize((0.5,) * 3, (0.5, 0.0, 0.5))], ""),
    "zero in half precision": ([v2.ToImage(), v2.ToDtype(torch.float16), v2.Normalize((0.5,) * 3, (1e-9,) * 3)], ""),
    "own": ([v2.ToImage(), FLOAT, OwnNormalize((0.5,) * 3, (0.5,) * 3)], ""),
    "one mean": ([v2.ToImage(), FLOAT, v2.Normalize((0.5,), (0.5,))], ""),
    "pooled labels look like images": ([rd.LabelPooling(), v2.ToPureTensor(), v2.Lambda(torch.exp, torch.Tensor)], ""),
}  # fmt: skip
TOGETHER_USUAL = v2.Compose(TOGETHER["usual"][0])
IMAGES = {
    "PIL": lambda image: image,
    "Image": tv_tensors.Image,
    "gray": lambda image: image.convert("L"),
    "tensor": v2.functional.pil_to_tensor,
    "float": lambda image: v2.functional.to_dtype(tv_tensors.Image(image), torch.float32, scale=True),
}


def pairs(kind, count=4):
    return [
        (IMAGES[kind](picture(i, (40, 56))), rd.LabelMap.from_logits(torch.randn(9, 4, 6), canvas_size=(40, 56)))
        for i in range(count)
    ]


def is_one_tensor(images):
    return len({image.untyped_storage().data_ptr() for image in images}) == 1


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("kind", IMAGES)
def test_converted_images_have_the_bits_the_type_and_the_random_numbers_of_the_pipeline(name, kind):
    last, together = TOGETHER[name]
    pipeline = v2.Compose([v2.RandomResizedCrop(16), v2.RandomHorizontalFlip(), *last])
    samples = pairs(kind)

    def run(how):
        torch.manual_seed(3)
        try:
            return how(), torch.get_rng_state()
        except Exception as error:  # noqa: BLE001  compared below
            return [(type(error), str(error))], torch.get_rng_state()

    expected, state = run(lambda: [pipeline(*pair) for pair in samples])
    found, own_state = run(lambda: run_batch(pipeline, samples))
    if isinstance(expected[0][0], type):
        assert found == expected
        return
    assert torch.equal(own_state, state)
    for (image, label), (expected_image, expected_label) in zip(found, expected, strict=True):
        assert type(image) is type(expected_image)
        if isinstance(image, torch.Tensor):
            assert image.dtype == expected_image.dtype
            assert torch.equal(image, expected_image)
        assert type(label) is type(expected_label)
    if isinstance(found[0][0], torch.Tensor):
        assert is_one_tensor([image for image, _ in found]) == (kind in together.split())


def test_images_of_several_sizes_are_converted_by_size():
    class Sizes(v2.Transform):
        def forward(self, image, label_map):
            return v2.functional.resize(image, [8 + image.getpixel((0, 0))[0] % 3, 12]), label_map

    pipeline = v2.Compose([Sizes(), v2.ToImage(), FLOAT, NORMALIZE])
    samples = pairs("PIL", 8)
    found = [image for image, _ in run_batch(pipeline, samples)]
    assert len({image.shape for image in found}) > 1
    assert len({image.untyped_storage().data_ptr() for image in found}) == len({image.shape for image in found})
    assert all(torch.equal(image, pipeline(*pair)[0]) for image, pair in zip(found, samples, strict=True))


def test_a_normalization_that_is_changed_between_batches_is_used_as_it_is_now():
    normalization = v2.Normalize([0.5] * 3, [0.5] * 3)
    pipeline = v2.Compose([v2.ToImage(), FLOAT, normalization])
    samples = pairs("PIL", 2)
    before = run_batch(pipeline, samples)
    normalization.mean = [0.25] * 3
    assert not torch.equal(run_batch(pipeline, samples)[0][0], before[0][0])
    assert torch.equal(run_batch(pipeline, samples)[0][0], pipeline(*samples[0])[0])


class Moved(torch.nn.Module):
    """Somebody's own transform that moves images to a device."""

    def forward(self, image, label_map):
        return image.to("meta"), label_map


@pytest.mark.parametrize("kind", ["PIL", "Image"])
@pytest.mark.parametrize("moved", [False, True])
def test_images_are_on_the_device_of_the_pipeline(kind, moved):
    pipeline = v2.Compose([v2.ToImage(), *([Moved()] if moved else []), FLOAT, NORMALIZE])
    samples = pairs(kind)
    for device in ("meta", "cpu"):
        with torch.device(device):
            expected = pipeline(*samples[0])[0]
            assert [image.device for image, _ in run_batch(pipeline, samples)] == [expected.device] * len(samples)


def test_converted_images_can_be_multiplied_in_place_by_a_parameter():
    for images in (rows := [image for image, _ in run_batch(TOGETHER_USUAL, pairs("PIL"))], [rd.collate(rows)]):
        for number, image in enumerate(images):
            factor = torch.ones(3, 1, 1, requires_grad=True)
            image.as_subclass(torch.Tensor).mul_(factor).sum().backward()
            assert factor.grad is not None
            assert not any(other.requires_grad for other in images[number + 1 :])
