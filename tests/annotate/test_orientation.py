import pytest

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import ModuleAnnotator
from tests.annotate.releases import CLASSES, annotated_release, publish, random_map, write_release
from tests.conftest import ColourNet


@pytest.mark.parametrize("order", ["hw", "wh"])
@pytest.mark.parametrize("size", [(40, 40), (40, 56)])
def test_the_order_is_detected_by_another_annotator(tmp_path, image_folder, annotator, order, size):
    maps = annotated_release(tmp_path / "release", image_folder, size, order)
    check = rd.annotate.detect_order(maps, image_folder, annotator)
    assert check.order == order
    assert getattr(check, order) > 0.5
    assert getattr(check, order) > max(check.hw + check.wh - getattr(check, order), 0) + 0.2
    assert abs(check.t) > 5
    assert check.num_images == 13


def test_the_order_is_detected_by_an_annotator_with_another_order_of_classes(tmp_path, image_folder):
    maps = annotated_release(tmp_path / "release", image_folder, (40, 40), "wh")

    class Reversed(ColourNet):
        def forward(self, images):
            return super().forward(images).flip(1)

    annotator = ModuleAnnotator(Reversed(), (48, 64), classes=CLASSES[::-1])
    assert rd.annotate.detect_order(maps, image_folder, annotator).order == "wh"


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_maps_of_other_images_is_undecidable(tmp_path, image_folder, annotator, seed):
    write_release(tmp_path / "release", image_folder, lambda i, _: publish(random_map(100 * seed + i, (5, 5))))
    with pytest.raises(ValueError, match=r"cannot be detected: correlation .* as hw and .* as wh, t = "):
        rd.annotate.detect_order(rd.annotate.PublishedMaps(tmp_path / "release", "relabel"), image_folder, annotator)


def test_the_order_of_symmetric_maps_and_of_few_maps_is_undecidable(tmp_path, image_folder, annotator):
    def symmetric(i, _):
        dense = random_map(i, (5, 5))
        return publish(dense + dense.mT)

    write_release(tmp_path / "symmetric", image_folder, symmetric)
    with pytest.raises(ValueError, match="the two orders of the map differ for 0 images"):
        rd.annotate.detect_order(rd.annotate.PublishedMaps(tmp_path / "symmetric", "relabel"), image_folder, annotator)
    maps = annotated_release(tmp_path / "release", image_folder, (40, 40), "hw")
    with pytest.raises(ValueError, match="at least 8 are needed"):
        rd.annotate.detect_order(maps, image_folder, annotator, num_images=7)
