import copy
import pickle
import threading

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.labels.auto_augment import _METHODS, COLOR_OPERATIONS, _wrap_forward, support_auto_augment

from .ramps import FILL, KINDS, assert_follows, ramp_images, ramp_map
from .samples import CANVAS_SIZE

POLICIES = [v2.RandAugment, v2.TrivialAugmentWide, v2.AutoAugment]
MAGNITUDES = {"ShearX": 0.3, "ShearY": 0.2, "TranslateX": 3.7, "TranslateY": 5.0, "Rotate": 25.0}


def forced(policy: type[v2.Transform], operation: str) -> v2.Transform:
    """Return a policy that draws nothing but this operation, of its magnitude or the opposite."""
    transform = policy(interpolation=v2.InterpolationMode.BILINEAR, fill=FILL)
    transform.num_ops = 1  # of RandAugment
    transform._policies = [((operation, 1.0, 0), ("Identity", 0.0, None))]  # of AutoAugment
    transform._AUGMENTATION_SPACE = {
        operation: (lambda num_bins, height, width: torch.full((num_bins,), MAGNITUDES[operation]), True)
    }
    if policy is v2.AutoAugment:
        transform._AUGMENTATION_SPACE["Identity"] = (lambda num_bins, height, width: None, False)
    return transform


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", sorted(MAGNITUDES))
@pytest.mark.parametrize("policy", POLICIES)
def test_each_operation_that_moves_the_image_moves_the_map(policy, operation, kind):
    transform, views = forced(policy, operation), set()
    for seed in range(6):
        images = []
        for image in ramp_images(kind):  # the policies take one image at a time
            torch.manual_seed(seed)
            moved, label_map = transform(image, ramp_map())
            images.append(moved)
        assert_follows(label_map, images)
        views.add(label_map.view)
    assert rd.labels.View() not in views
    assert len(views) == 2  # of both signs


@pytest.mark.parametrize("operation", sorted(COLOR_OPERATIONS))
def test_operations_of_colour_leave_the_map_the_same_object(operation):
    transform = v2.TrivialAugmentWide()
    magnitudes = {**v2.AutoAugment._AUGMENTATION_SPACE, **transform._AUGMENTATION_SPACE}[operation]
    transform._AUGMENTATION_SPACE = {operation: magnitudes}
    image, label_map = torch.randint(256, (3, *CANVAS_SIZE), dtype=torch.uint8), ramp_map()
    assert transform(image, label_map)[1] is label_map


@pytest.mark.parametrize("policy", [*POLICIES, v2.AugMix])
def test_every_operation_of_torchvision_is_known_as_geometric_or_of_colour(policy):
    assert set(policy._AUGMENTATION_SPACE) <= set(MAGNITUDES) | COLOR_OPERATIONS


@pytest.mark.parametrize("policy", POLICIES)
def test_the_image_and_the_random_numbers_are_those_without_a_map(policy):
    image = torch.randint(256, (3, *CANVAS_SIZE), dtype=torch.uint8)
    for seed in range(10):
        torch.manual_seed(seed)
        alone, next_alone = policy()(image), torch.rand(())
        torch.manual_seed(seed)
        with_map, next_with_map = policy()(image, ramp_map())[0], torch.rand(())
        assert torch.equal(alone, with_map)
        assert next_alone == next_with_map


@pytest.mark.parametrize("policy", POLICIES)
def test_nested_samples_keep_their_structure_and_other_items_are_the_same_objects(policy):
    other, label_map = object(), ramp_map()
    sample = {
        "image": tv_tensors.Image(torch.zeros(3, *CANVAS_SIZE, dtype=torch.uint8)),
        "maps": [label_map, (other, "a")],
    }
    out = policy()(sample)
    assert out["maps"][1][0] is other
    assert type(out["maps"][0]) is rd.LabelMap
    assert sample["maps"][0] is label_map
    assert label_map.view == rd.labels.View()


def test_all_maps_of_a_sample_follow():
    transform = forced(v2.TrivialAugmentWide, "TranslateX")
    _, first, second = transform(torch.zeros(3, *CANVAS_SIZE), ramp_map(), ramp_map())
    assert first.view == second.view != rd.labels.View()


def test_a_sample_that_failed_leaves_nothing_behind_for_the_next():
    transform = forced(v2.TrivialAugmentWide, "TranslateX")
    image = tv_tensors.Image(torch.zeros(3, *CANVAS_SIZE))
    with pytest.raises(TypeError, match="Found no image in the sample"):
        transform(ramp_map(), "a")
    mask = tv_tensors.Mask(torch.zeros(1, *CANVAS_SIZE))
    with pytest.raises(TypeError, match="Mask are not supported"):
        transform(image, ramp_map(), mask)
    assert transform(image, "a")[1] == "a"


def test_threads_that_share_a_transform_do_not_mix_up_their_maps():
    transform = v2.RandAugment(num_ops=3)
    failures = []

    def work(key: str) -> None:
        image = tv_tensors.Image(torch.zeros(3, *CANVAS_SIZE, dtype=torch.uint8))
        for _ in range(40):
            position = int(key) % 2
            sample = [image, image.shape]
            sample.insert(position, rd.LabelMap.wrap(ramp_map(), like=ramp_map(), key=key))
            out = transform(sample)[position]
            if not (isinstance(out, rd.LabelMap) and out.key == key):
                failures.append((key, out))

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_augmix_refuses_a_map_and_works_without():
    image = torch.randint(256, (3, *CANVAS_SIZE), dtype=torch.uint8)
    with pytest.raises(TypeError, match="a LabelMap cannot follow AugMix"):
        v2.AugMix()(image, ramp_map())
    assert v2.AugMix()(image, "a")[0].shape == image.shape


def test_supporting_twice_changes_nothing_and_transforms_are_copied_and_pickled_as_before():
    ramp_map()
    forwards = [policy.forward for policy in POLICIES]
    support_auto_augment(rd.LabelMap)
    assert [policy.forward for policy in POLICIES] == forwards
    for copied in (pickle.loads(pickle.dumps(v2.RandAugment())), copy.deepcopy(v2.RandAugment())):
        assert type(copied(torch.zeros(3, *CANVAS_SIZE, dtype=torch.uint8), ramp_map())[1]) is rd.LabelMap


def test_a_transform_is_the_same_object_of_the_same_type_after_a_sample():
    transform = v2.RandAugment()
    attributes = dict(vars(transform))
    transform(torch.zeros(3, *CANVAS_SIZE, dtype=torch.uint8), ramp_map())
    assert type(transform) is v2.RandAugment
    assert vars(transform) == attributes


def test_a_subclass_with_its_own_forward_is_followed():
    class Twice(v2.RandAugment):
        def forward(self, *inputs):
            return super().forward(*super().forward(*inputs))

    transform = Twice(num_ops=1)
    operation = {"TranslateX": (lambda num_bins, height, width: torch.full((num_bins,), 3.0), False)}
    transform._AUGMENTATION_SPACE = operation
    _, label_map = transform(torch.zeros(3, *CANVAS_SIZE, dtype=torch.uint8), ramp_map())
    once = v2.RandAugment(num_ops=1)
    once._AUGMENTATION_SPACE = operation
    _, expected = once(torch.zeros(3, *CANVAS_SIZE, dtype=torch.uint8), ramp_map())
    assert label_map.view.x0 == pytest.approx(2 * expected.view.x0)


@pytest.mark.parametrize("method", _METHODS)
def test_an_unknown_implementation_raises_for_a_label_map_alone(monkeypatch, method):
    ramp_map()
    image = torch.zeros(3, *CANVAS_SIZE, dtype=torch.uint8)

    class Other(v2.Transform):
        """An implementation in which one of the known methods has another name."""

        def forward(self, *inputs):
            return inputs

    for name in set(_METHODS) - {method}:
        setattr(Other, name, lambda self, *args: args)
    support = vars(v2.RandAugment)["forward"]
    monkeypatch.setattr(Other, "forward", lambda self, *inputs: support(self, *inputs))
    with pytest.raises(TypeError, match="a LabelMap cannot follow Other of this torchvision version"):
        Other()(image, ramp_map())


def test_an_implementation_that_bypasses_the_known_methods_raises(monkeypatch):
    bypassing = _wrap_forward(lambda self, *inputs: inputs, rd.LabelMap)
    monkeypatch.setattr(v2.RandAugment, "forward", bypassing)
    image = torch.zeros(3, *CANVAS_SIZE, dtype=torch.uint8)
    assert v2.RandAugment()(image, "a")[1] == "a"
    with pytest.raises(TypeError, match="a LabelMap cannot follow RandAugment of this torchvision version"):
        v2.RandAugment()(image, ramp_map())
