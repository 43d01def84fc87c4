import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import relabel_datasets as rd
from relabel_datasets.analysis import find_suspects, measure_images
from relabel_datasets.cli import main
from relabel_datasets.report import pictures as module
from relabel_datasets.report.overlay import (
    draw_best_crops,
    draw_class_regions,
    draw_figure,
    draw_figures,
    draw_heatmap,
    spread,
    strongest_classes,
)
from relabel_datasets.report.pictures import draw_pictures, draw_sheet
from relabel_datasets.report.tiles import CLASS_COLORS, GAP, OTHER_COLOR, TILE, Line, fit_to_tile, panel, title_row
from tests.conftest import ColourNet, picture


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An ImageFolder of 3 classes and 9 images."""
    root = tmp_path_factory.mktemp("images")
    for i in range(9):
        path = root / ("cat", "dog", "emu")[i % 3] / f"photo_{i}.png"
        path.parent.mkdir(exist_ok=True)
        picture(i, (40, 56) if i % 2 else (48, 32)).save(path)
    return root


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    """A dataset of these images, with one config that includes them and a label-only config."""
    root = tmp_path_factory.mktemp("dataset")
    annotator = rd.ModuleAnnotator(ColourNet(), (48, 64), classes=("cat", "dog", "emu"), name="colours")
    for config, has_images in (("colours", True), ("labels-only", False)):
        source, build_config = rd.data.ImageFolderSource(images), rd.annotate.BuildConfig(images=has_images)
        rd.build(source, root, annotator, config=config, build_config=build_config, progress=False)
    return root


@pytest.fixture
def dataset(folder):
    return rd.load_dataset(folder, "colours", "train")


@pytest.fixture
def quarters():
    """A map of 2 x 2 locations whose best classes are 0, 1, 2 and 3, the last one with low confidence."""
    dense = torch.zeros(5, 2, 2)
    for index, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        dense[index, row, column] = 12 - index if index < 3 else 0.1
    return rd.LabelMap.from_logits(dense, canvas_size=(40, 60), label=0)


def test_regions_have_the_color_of_their_best_class_with_opacity_by_probability(quarters):
    gray = Image.new("RGB", (60, 40), (100, 100, 100))
    colors = {0: CLASS_COLORS[0], 1: CLASS_COLORS[1], 3: CLASS_COLORS[4]}
    pixels = np.asarray(draw_class_regions(gray, quarters, colors, strength=0.5)).astype(float)
    for (y, x), color in (((0, 0), CLASS_COLORS[0]), ((0, 59), CLASS_COLORS[1]), ((39, 0), OTHER_COLOR)):
        assert pixels[y, x] == pytest.approx((np.array(color) + 100) / 2, abs=1)
    share = float(quarters.dense()[:, 1, 1].softmax(0)[3]) * 0.5
    expected = share * np.array(CLASS_COLORS[4]) + (1 - share) * 100
    assert pixels[39, 59] == pytest.approx(expected, abs=1)
    assert np.abs(pixels[39, 59] - 100).max() < 30


def test_regions_do_not_contain_the_colors_of_the_image(quarters):
    red = Image.new("RGB", (60, 40), (255, 0, 0))
    pixels = np.asarray(draw_class_regions(red, quarters, {}, strength=0))
    assert (pixels == pixels[..., :1]).all()
    assert draw_class_regions(red, quarters, dict.fromkeys(range(5), CLASS_COLORS[0])).size == red.size


def test_strongest_classes_are_sorted_by_their_highest_probability_at_any_location(quarters):
    assert [index for index, _ in strongest_classes(quarters, 3)] == [0, 1, 2]
    assert len(strongest_classes(quarters, 100)) == 5
    assert strongest_classes(quarters, 1)[0][1] == pytest.approx(1, abs=1e-4)


def test_heatmaps_of_selects_the_heatmaps_of_a_figure(quarters):
    image = picture(0, (40, 60))
    names = ("cat", "dog", "emu", "fox", "gnu")
    widths = [draw_figure(image, quarters, names, heatmaps_of=chosen).width for chosen in ([4], [4, 0], [4, 0, 1, 2])]
    assert np.diff(widths).tolist() == [TILE + GAP, 2 * (TILE + GAP)]
    default = draw_figure(image, quarters, names)
    assert default.tobytes() == draw_figure(image, quarters, names, heatmaps_of=[0, 1, 2]).tobytes()
    assert default.tobytes() != draw_figure(image, quarters, names, heatmaps_of=[0, 1, 4]).tobytes()


@pytest.mark.parametrize("size", [(1, 1), (3, 400), (400, 3), (2, 2)])
def test_figures_accept_images_of_any_shape(size):
    label_map = rd.LabelMap.from_logits(torch.randn(3, 2, 2), canvas_size=size, label=1)
    assert draw_figure(picture(0, size), label_map, ("a", "b", "c")).width > 5 * TILE


def test_long_captions_are_truncated_and_long_texts_are_wrapped():
    long = "a class name that is much too long for the width of a panel"
    drawn = np.asarray(panel(picture(0, (40, 20)), long, [Line(long, CLASS_COLORS[0])]))
    assert drawn.shape[1] == TILE
    assert (drawn[:, -1] == 255).all()  # blank at the edge
    short_row, long_row = title_row("title", "few words", 400), title_row(long, "many words " * 30, 400)
    assert short_row.width == long_row.width == 400
    assert long_row.height > 3 * short_row.height
    assert (np.asarray(long_row)[:, -4:] == 255).all()


def test_captions_support_non_latin_alphabets():
    letters = ("é", "ж", "λ", "ł")
    assert len({panel(picture(0), "", [Line(letter)]).tobytes() for letter in letters}) == 4  # no replacement boxes
    assert len({panel(picture(0), letter).tobytes() for letter in letters}) == 4


def test_without_keys_sheets_and_figures_are_drawn(dataset, tmp_path, capsys):
    paths = draw_pictures(dataset, tmp_path / "pictures", count=4, progress=False)
    assert [path.name for path in paths[:2]] == ["several_classes.png", "suspects.png"]
    assert [path.stem for path in paths[2:]] == [dataset.keys[index] for index in spread(dataset, 4)]
    assert sorted((tmp_path / "pictures").iterdir()) == sorted(paths)
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width > 2 * TILE
    assert capsys.readouterr().err == ""


def test_sheets_show_the_images_with_most_classes_and_the_strongest_suspects(dataset, tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(
        module, "draw_sheet", lambda dataset, indices, title, text: chosen.append(indices) or picture(0)
    )
    draw_pictures(dataset, tmp_path, count=5, progress=False)
    images = measure_images(dataset.label_maps, range(len(dataset)), progress=False)
    assert images["key"].tolist() == list(dataset.keys)
    counts = images["num_shown"].tolist()
    assert len(chosen[0]) == 5
    assert sorted((counts[index] for index in chosen[0]), reverse=True) == sorted(counts, reverse=True)[:5]
    assert chosen[1] == find_suspects(images).tolist()[:5] != []


def test_sheets_wrap_to_several_rows(dataset):
    one, three, four = (draw_sheet(dataset, range(count), "title", "text") for count in (1, 3, 4))
    assert one.width < three.width == four.width
    assert one.height >= three.height
    assert four.height > 1.8 * three.height


def test_with_keys_only_their_figures_are_drawn(dataset, tmp_path):
    keys = [dataset.keys[3], dataset.keys[0]]
    paths = draw_pictures(dataset, tmp_path, keys=keys, classes=["dog"], progress=False)
    assert [path.stem for path in paths] == keys
    expected = dict(draw_figures(dataset, [3, 0], [1]))
    for path in paths:
        with Image.open(path) as image:
            assert image.tobytes() == expected[path.stem].tobytes()


def test_classes_are_found_by_name_and_by_legible_name():
    classes = ("n01440764", "cat")
    assert [module._find_class(name, classes) for name in ("tench", "n01440764", "cat")] == [0, 0, 1]
    with pytest.raises(ValueError, match=r"no class 'trench': did you mean \['tench'\]"):
        module._find_class("trench", classes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"keys": ["photo_0", "nobody"]},
            "no sample 'nobody' in split 'train': expected one of its 9 keys, such as 'photo_",
        ),
        ({"classes": ["cow"]}, "no class 'cow': expected one of the 3 classes"),
        ({"count": 0}, "count= must be at least 1, got 0"),
        ({"num_samples": 0}, "num_samples= must be at least 1, got 0"),
    ],
)
def test_invalid_arguments_raise_an_error_before_anything_is_written(dataset, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_pictures(dataset, tmp_path / "pictures", **arguments, progress=False)
    assert not (tmp_path / "pictures").exists()


def test_datasets_with_transforms_raise_an_error(folder, tmp_path):
    dataset = rd.load_dataset(folder, "colours", "train", transforms=rd.LabelPooling())
    with pytest.raises(ValueError, match="without transforms"):
        draw_pictures(dataset, tmp_path / "pictures", progress=False)
    assert not (tmp_path / "pictures").exists()


def test_sheets_show_only_images_that_are_present(folder, images, tmp_path):
    for i, path in enumerate(sorted(images.rglob("*.png"))):
        if i % 2:
            (tmp_path / "subset" / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "subset" / path.parent.name)
    dataset = rd.load_dataset(folder, "labels-only", "train", images=tmp_path / "subset", unmatched="skip")
    indices = module._present(dataset, list(dataset.label_maps), 100)
    assert [dataset.keys[index] for index in indices] == list(dataset.keys)
    assert len(indices) == 4
    assert draw_pictures(dataset, tmp_path / "pictures", count=2, progress=False)


def test_the_command_prints_the_paths_of_its_files(folder, images, tmp_path, capsys):
    command = ["pictures", str(folder), "--config", "labels-only", "--images", str(images)]
    assert main([*command, "--out", str(tmp_path / "out"), "--key", "photo_0", "photo_1", "--class", "emu"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [str(tmp_path / "out" / f"photo_{i}.png") for i in range(2)]
    assert sorted(map(str, (tmp_path / "out").iterdir())) == printed
    assert main([*command, "--out", str(tmp_path / "out"), "--count", "2", "--num-samples", "5"]) == 0
    assert "several_classes.png" in capsys.readouterr().out
    assert main([*command, "--out", str(tmp_path / "none"), "--key", "nobody"]) == 1
    assert "no sample 'nobody'" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_figures_of_stored_crops_show_the_first_crops_as_the_annotator_saw_them(images, tmp_path):
    annotator = rd.ModuleAnnotator(ColourNet(), (48, 64), classes=("cat", "dog", "emu"), name="colours")
    crops = rd.annotate.BuildConfig(encoding="crops", num_crops=4)
    rd.build(rd.data.ImageFolderSource(images), tmp_path / "data", annotator, build_config=crops, progress=False)
    dataset = rd.load_dataset(tmp_path / "data", split="train")
    paths = draw_pictures(dataset, tmp_path / "pictures", count=3)
    figures = [f"{dataset.keys[i]}.png" for i in spread(dataset, 3)]
    assert len(find_suspects(measure_images(dataset.label_maps, range(len(dataset)), progress=False)))
    assert sorted(path.name for path in paths) == sorted(["several_classes.png", "suspects.png", *figures])
    image, labels = dataset[0]
    highest = labels.soft_labels().amax(0)
    assert dict(strongest_classes(labels, 3)) == pytest.approx(dict(enumerate(highest.tolist())))
    certain = np.asarray(draw_best_crops(image, labels, {2: CLASS_COLORS[0]}))
    left, top, right, bottom = labels.pixel_box(int(labels.soft_labels()[:, 2].argmax()))
    scale = TILE / max(image.size)
    framed = np.argwhere((certain == CLASS_COLORS[0]).all(-1))
    expected = np.array([[scale * top, scale * left], [scale * bottom, scale * right]])
    assert np.abs(np.stack([framed.min(0), framed.max(0)]) - expected).max() < 4
    with pytest.raises(TypeError, match="a heatmap needs a LabelMap, got CropLabels"):
        draw_heatmap(image, labels, 0)
    with pytest.raises(TypeError, match="a heatmap needs a LabelMap, got CropLabels"):
        draw_figure(image, labels, dataset.classes, heatmaps_of=[0])
    figure = np.asarray(draw_figure(image, labels, ("cat", "dog", "emu")))
    for crop in range(3):
        part = image.crop(labels.pixel_box(crop))
        shown = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if labels.flips[crop] else part
        expected, left = np.asarray(panel(shown, "")), GAP + (crop + 1) * (TILE + GAP)
        inside = (
            slice(40, fit_to_tile(shown).height),
            slice(10, fit_to_tile(shown).width - 10),
        )  # without heading and frame
        assert np.array_equal(figure[GAP:, left : left + TILE][inside], expected[inside])
