"""COCO JSON as `--boxes`: reading, matching by name or id, and short errors for other files."""

import json
import logging

import numpy as np
import pytest

import relabel_datasets as rd
from relabel_datasets.analysis.boxes import read_boxes
from relabel_datasets.analysis.objects import Objects, find_objects
from relabel_datasets.cli import main
from tests.conftest import ColourNet, picture

IMAGES = [
    {"id": i, "file_name": f"photo_{i:02d}.jpg", "width": 56 if i % 2 else 32, "height": 40 if i % 2 else 48}
    for i in range(13)
]
CATEGORIES = [{"id": 7, "name": "Cat"}, {"id": 3, "name": "dog"}, {"id": 90, "name": "emu", "supercategory": "bird"}]
ANNOTATIONS = [
    {
        "id": 100 + i,
        "image_id": i,
        "category_id": (7, 3, 90)[i % 3],
        "bbox": [i, 5, 16.5, 25],
        "area": 400,
        "iscrowd": 0,
        "segmentation": [[i, 5, i + 16.5, 5, i + 16.5, 30, i, 30]],
    }
    for i in range(13)
]


def coco(**changes):
    content = {"info": {}, "licenses": [], "images": IMAGES, "annotations": ANNOTATIONS, "categories": CATEGORIES}
    return {name: value for name, value in (content | changes).items() if value is not None}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def one(**changes):
    """Return the content with only the first annotation, changed; a value of None removes the field."""
    entry = {name: value for name, value in (ANNOTATIONS[0] | changes).items() if value is not None}
    return coco(annotations=[entry])


def csv_of_the_same(path):
    rows = [
        f"photo_{i:02d}.jpg,{IMAGES[i]['width']},{IMAGES[i]['height']},{('cat', 'dog', 'emu')[i % 3]},{i},5,{i + 16.5},30"
        for i in range(13)
    ]
    return write(path, "image,width,height,class,xmin,ymin,xmax,ymax\n" + "\n".join(rows))


RENAMED = {  # the same boxes in variants of the format
    "file names": coco(),
    "file names with folders": coco(
        images=[{**image, "file_name": f"val\\deep/{image['file_name']}"} for image in IMAGES]
    ),
    "URLs, as in LVIS": coco(
        images=[
            {"coco_url": f"http://images.cocodataset.org/val/{image['file_name']}"}
            | {name: image[name] for name in ("id", "width", "height")}
            for image in IMAGES
        ]
    ),
    "ids as strings": coco(
        annotations=[{**annotation, "image_id": str(annotation["image_id"])} for annotation in ANNOTATIONS]
    ),
    "ids that are the names": coco(
        images=[{**image, "id": f"photo_{i:02d}", "file_name": f"{i}.png"} for i, image in enumerate(IMAGES)],
        annotations=[{**annotation, "image_id": f"photo_{i:02d}"} for i, annotation in enumerate(ANNOTATIONS)],
    ),
    "sizes as floats": coco(images=[{**image, "width": float(image["width"])} for image in IMAGES]),
    "segmentation only": coco(
        annotations=[{k: v for k, v in annotation.items() if k != "bbox"} for annotation in ANNOTATIONS]
    ),
    "no iscrowd and no segmentation": coco(
        annotations=[
            {k: v for k, v in annotation.items() if k not in ("iscrowd", "segmentation")} for annotation in ANNOTATIONS
        ]
    ),
    "additional crowds": coco(
        annotations=[*ANNOTATIONS, {**ANNOTATIONS[0], "bbox": [0, 0, 32, 48], "category_id": 3, "iscrowd": 1}]
    ),
    "additional boxes without width": coco(annotations=[*ANNOTATIONS, {**ANNOTATIONS[0], "bbox": [1, 1, 0, 5]}]),
    "additional images without objects": coco(images=[*IMAGES, {"id": 99, "file_name": "x", "width": 1, "height": 1}]),
}


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory):
    """A dataset of the images."""
    root = tmp_path_factory.mktemp("coco")
    for i, image in enumerate(IMAGES):
        path = root / "images" / ("cat", "dog", "emu")[i % 3] / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, (image["height"], image["width"])).save(path)
    annotator = rd.ModuleAnnotator(ColourNet(), (48, 64), classes=("cat", "dog", "emu"), name="colours")
    rd.build(rd.data.ImageFolderSource(root / "images"), root / "data", annotator, progress=False)
    return root / "data"


@pytest.fixture(scope="module")
def expected(dataset_folder, tmp_path_factory):
    """The analysis with boxes of a CSV table."""
    boxes = csv_of_the_same(tmp_path_factory.mktemp("csv") / "boxes.csv")
    return rd.analysis.analyze(dataset_folder, "colours", boxes=boxes, num_crops=26, progress=False)


@pytest.mark.parametrize("variant", RENAMED)
def test_coco_and_csv_boxes_give_the_same_analysis(variant, dataset_folder, expected, tmp_path):
    boxes = write(tmp_path / "boxes.json", RENAMED[variant])
    analysis = rd.analysis.analyze(dataset_folder, "colours", boxes=boxes, num_crops=26, progress=False)
    assert analysis.to_json() == expected.to_json()
    assert analysis.summary["label maps and objects"]["images"] == 13


def test_the_command_reads_coco_and_logs_unmatched_categories(dataset_folder, tmp_path, capsys, caplog):
    content = coco(categories=[*CATEGORIES[:2], {"id": 90, "name": "person"}])
    boxes = write(tmp_path / "instances.json", content)
    assert (
        main(["analyze", str(dataset_folder), "--config", "colours", "--boxes", str(boxes), "--num-crops", "13"]) == 0
    )
    assert "13/13" in capsys.readouterr().err
    text = "1 of 3 object classes match none of the 3 classes, such as 'cat': 'person'; their boxes count only for"
    assert text in caplog.text


def test_a_file_without_categories_has_boxes_of_unknown_classes(tmp_path):
    objects = read_boxes(write(tmp_path / "boxes.json", coco(categories=None)))
    assert objects["photo_04"].names == ()
    assert objects["photo_04"].boxes_xyxy == pytest.approx(np.array([[4 / 32, 5 / 48, 20.5 / 32, 30 / 48]]))


def test_consecutive_numbers_as_keys_are_not_matched_with_ids(dataset_folder, tmp_path):
    images = [{**image, "file_name": f"elsewhere_{i}.jpg"} for i, image in enumerate(IMAGES)]
    boxes = write(tmp_path / "boxes.json", coco(images=images))
    with pytest.raises(
        ValueError, match=r"none of the 13 images .*, matches any of the 13 images with boxes, .*with the id 0"
    ):
        rd.analysis.analyze(dataset_folder, "colours", boxes=boxes, progress=False)
    objects = read_boxes(boxes)
    assert list(find_objects(["12", "x/7"], objects)) == ["12", "x/7"]
    assert list(find_objects(["000000000012"], objects)) == ["000000000012"]  # as COCO names its files
    with pytest.raises(ValueError, match="none of the 2 images"):
        find_objects(["00000012", "00000007"], objects)  # keys of a dataset without file names


@pytest.mark.parametrize(
    ("key", "name", "spelling"),
    [
        ("n01440764_10026_n01440764", "n01440764_10026", "without class suffix"),
        ("n01440764_10026", "n01440764_10026_n01440764", "without class suffix"),
        ("caf\u00e9", "cafe\u0301", "without folders"),
        ("PHOTO", "photo", "lower case"),
    ],
)
def test_boxes_are_matched_by_other_spellings_of_a_name(key, name, spelling, caplog):
    box = Objects((4, 4), np.array([[0.0, 0, 1, 1]]))
    assert find_objects(["a/other", f"a/{key}"], {name: box, "third": box}) == {f"a/{key}": box}
    assert spelling in caplog.text
    with pytest.raises(ValueError, match="none of the 2 images"):
        find_objects([f"a/{key}", f"b/{key}"], {name: box})  # ambiguous


def test_boxes_measured_before_an_exif_rotation_are_left_out(dataset_folder, tmp_path, caplog):
    swapped = [{**image, "width": image["height"], "height": image["width"]} for image in IMAGES[:1]]
    boxes = write(tmp_path / "boxes.json", coco(images=[*swapped, *IMAGES[1:]]))
    analysis = rd.analysis.analyze(dataset_folder, "colours", boxes=boxes, num_crops=13, progress=False)
    assert analysis.summary["label maps and objects"]["images"] == 12
    assert "left out 1 of 13 images with boxes, such as 'photo_00': EXIF rotates the image" in caplog.text
    boxes = write(tmp_path / "rotated.json", coco(images=swapped, annotations=ANNOTATIONS[:1]))
    with pytest.raises(ValueError, match="EXIF rotates every image with boxes, such as 'photo_00'"):
        rd.analysis.analyze(dataset_folder, "colours", boxes=boxes, num_crops=13, progress=False)


FILLER = "secret content of the file " * 500
BAD = {  # name: (content, message)
    "results": (
        [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}] * 99,
        "is a list, as in COCO resu",
    ),
    "another object": (
        {FILLER: 1, **{str(i): FILLER for i in range(99)}},
        r"is not a COCO file, got the fields 'secret",
    ),
    "an empty object": ({}, "is not a COCO file"),
    "a string": (json.dumps(FILLER), "is not a COCO file"),
    "a number": ("17", "is not a COCO file"),
    "truncated": (json.dumps(coco())[:-200], "is not a JSON file, or is corrupt"),
    "lines of JSON": (
        "\n".join(json.dumps({"image": "a", "x": FILLER}) for _ in range(9)),
        "is not a JSON file, or is corrupt",
    ),
    "nested too deeply": ("[" * 200_000, "nested too deeply"),
    "an endless integer": ('{"images": ' + "9" * 5000 + "}", "is not a JSON file, or is corrupt"),
    "images that are a table": (coco(images={"0": {"id": 0, "note": FILLER}}), "'images' must be a list of objects"),
    "annotations that are strings": (coco(annotations=[FILLER]), "'annotations' must be a list of objects"),
    "images without ids": (
        coco(images=[{"file_name": FILLER}]),
        "image 0: 'id' must be an integer or a string, got None",
    ),
    "repeated ids": (coco(images=[IMAGES[0], IMAGES[0]]), "image 0: another image has the same id '0'"),
    "file names that are lists": (
        coco(images=[{**IMAGES[0], "file_name": [FILLER]}]),
        "'file_name' must be a string, got",
    ),
    "no width": (
        coco(images=[{"id": 0, "file_name": "a", "height": 5}]),
        "image 0: 'width' must be the width of the image",
    ),
    "no height": (
        coco(images=[{"id": 0, "file_name": "a", "width": 5}]),
        "image 0: 'height' must be the height of the image",
    ),
    "a width of 0": (
        coco(images=[{**IMAGES[0], "width": 0}]),
        "'width' must be the width of the image in pixels, got 0",
    ),
    "half a pixel": (coco(images=[{**IMAGES[0], "width": 31.5}]), "'width' must be .* got 31.5"),
    "a width that is infinite": (coco(images=[{**IMAGES[0], "width": float("inf")}]), "'width' must be .* got inf"),
    "no annotations": (coco(annotations=[]), "has no objects: 13 images, 0 crowds"),
    "only crowds": (one(iscrowd=1), "has no objects: 13 images, 1 crowd,"),
    "only boxes without height": (one(bbox=[1, 2, 3, 0]), "has no objects: 13 images, 0 crowds, 1 box without"),
    "captions": (
        one(bbox=None, segmentation=None, category_id=None, caption=FILLER),
        "'category_id' must be an integer",
    ),
    "panoptic": (one(bbox=None, segmentation=None, segments_info=[{}]), "panoptic annotations have no boxes"),
    "no box": (
        one(bbox=None, segmentation=None),
        r"annotation 100: 'bbox' must be \[x, y, width, height\] .*\(or 'segm",
    ),
    "an outline in run-length encoding": (
        one(bbox=None, segmentation={"counts": FILLER}),
        r"'bbox' must be \[x, y, width, h",
    ),
    "an outline with an odd number of coordinates": (
        one(bbox=None, segmentation=[[1, 2, 3]]),
        r"'bbox' must be \[x, y, width, height\]",
    ),
    "three numbers": (one(bbox=[1, 2, 3]), r"'bbox' must be \[x, y, width, height\] in pixels, got"),
    "numbers as strings": (one(bbox=["1", "2", "3", "4"]), r"'bbox' must be \[x, y, width, height\]"),
    "NaN": (one(bbox=[1, 2, float("nan"), 4]), r"'bbox' must be \[x, y, width, height\] in pixels, got"),
    "a huge number": (one(bbox=[1, 2, 10**400, 4]), r"'bbox' must be \[x, y, width, height\] in pixels, got"),
    "booleans": (one(bbox=[True, True, True, True]), r"'bbox' must be \[x, y, width, height\] in pixels, got"),
    "a negative width": (one(bbox=[9, 9, -3, 4]), "annotation 100: the box .* is empty or leaves the image"),
    "outside the image": (
        one(bbox=[30, 5, 16, 25]),
        "annotation 100: the box .* leaves the image of height 48 and width 32",
    ),
    "an unknown image": (one(image_id=FILLER), "image_id 'secret.* must be the id of one of the 13 images"),
    "an unknown category": (one(category_id=1), "category_id '1' must be the id of one of the 3 categories"),
    "a category without name": (coco(categories=[{"id": 1, "name": ["a"]}]), "category 1: 'name' must be a string"),
    "two images with one name": (
        coco(images=[{**image, "file_name": f"{i}/a.jpg"} for i, image in enumerate(IMAGES)]),
        "images '0' and '1' have the same name 'a' without folder and extension",
    ),
}


@pytest.mark.parametrize("suffix", [".json", ".txt"])
@pytest.mark.parametrize("name", BAD)
def test_other_json_raises_an_error_of_one_short_line(name, suffix, tmp_path, capsys):
    content, message = BAD[name]
    path = write(tmp_path / f"boxes{suffix}", content)
    if suffix == ".txt" and not path.read_text().startswith(("{", "[")):
        message = "has the columns"  # read as a table
    with pytest.raises(rd.DatasetError, match=message) as error:
        read_boxes(path)
    assert str(error.value).startswith(str(path))
    assert len(str(error.value)) - len(str(path)) < 400
    assert str(error.value).count("secret content") <= 4
    if suffix == ".json":
        assert main(["analyze", "--boxes", str(path)]) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_a_byte_order_mark_is_accepted_and_utf16_raises_an_error(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(coco()).encode())
    assert len(read_boxes(path)) == 13
    path.write_bytes(json.dumps(coco()).encode("utf-16"))
    with pytest.raises(rd.DatasetError, match="is not a JSON file, or is corrupt"):
        read_boxes(path)


def test_skipped_boxes_are_counted_in_the_log(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    flat = [{**ANNOTATIONS[i], "bbox": [1, 1, i % 2, 1 - i % 2]} for i in range(4)]
    assert len(read_boxes(write(tmp_path / "boxes.json", coco(annotations=[*ANNOTATIONS[4:], *flat])))) == 9
    assert "skipped 4 boxes without width or height" in caplog.text


@pytest.mark.slow
def test_outlines_of_a_huge_file_are_dropped_while_it_is_parsed(tmp_path):
    import tracemalloc

    outline = [[float(i) for i in range(2000)]]
    annotations = [{**ANNOTATIONS[i % 13], "id": i, "segmentation": outline} for i in range(500)]
    path = write(tmp_path / "boxes.json", coco(annotations=annotations))
    tracemalloc.start()
    assert len(read_boxes(path)) == 13
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * path.stat().st_size  # twice the text; the parsed outlines would need five times as much
