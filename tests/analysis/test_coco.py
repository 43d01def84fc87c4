"""COCO's JSON as `--boxes`: read, matched by name or id, and what is no COCO refused in one short line."""

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


RENAMED = {  # the same boxes, as other tools and other keys have them
    "file names": coco(),
    "file names with folders": coco(
        images=[{**each, "file_name": f"val\\deep/{each['file_name']}"} for each in IMAGES]
    ),
    "addresses, as in LVIS": coco(
        images=[
            {"coco_url": f"http://images.cocodataset.org/val/{each['file_name']}"}
            | {name: each[name] for name in ("id", "width", "height")}
            for each in IMAGES
        ]
    ),
    "ids in texts": coco(annotations=[{**each, "image_id": str(each["image_id"])} for each in ANNOTATIONS]),
    "ids that are the names": coco(
        images=[{**each, "id": f"photo_{i:02d}", "file_name": f"{i}.png"} for i, each in enumerate(IMAGES)],
        annotations=[{**each, "image_id": f"photo_{i:02d}"} for i, each in enumerate(ANNOTATIONS)],
    ),
    "sizes in floats": coco(images=[{**each, "width": float(each["width"])} for each in IMAGES]),
    "segmentation only": coco(annotations=[{k: v for k, v in each.items() if k != "bbox"} for each in ANNOTATIONS]),
    "no iscrowd and no segmentation": coco(
        annotations=[{k: v for k, v in each.items() if k not in ("iscrowd", "segmentation")} for each in ANNOTATIONS]
    ),
    "crowds beside them": coco(
        annotations=[*ANNOTATIONS, {**ANNOTATIONS[0], "bbox": [0, 0, 32, 48], "category_id": 3, "iscrowd": 1}]
    ),
    "boxes without width beside them": coco(annotations=[*ANNOTATIONS, {**ANNOTATIONS[0], "bbox": [1, 1, 0, 5]}]),
    "images without objects beside them": coco(images=[*IMAGES, {"id": 99, "file_name": "x", "width": 1, "height": 1}]),
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
    rd.build(rd.ImageFolderSource(root / "images"), root / "data", annotator, progress=False)
    return root / "data"


@pytest.fixture(scope="module")
def expected(dataset_folder, tmp_path_factory):
    """The analysis with boxes of a CSV table."""
    boxes = csv_of_the_same(tmp_path_factory.mktemp("csv") / "boxes.csv")
    return rd.analyze(dataset_folder, "colours", boxes=boxes, num_crops=26, progress=False)


@pytest.mark.parametrize("kind", RENAMED)
def test_coco_boxes_give_analyze_what_the_same_csv_gives(kind, dataset_folder, expected, tmp_path):
    boxes = write(tmp_path / "boxes.json", RENAMED[kind])
    found = rd.analyze(dataset_folder, "colours", boxes=boxes, num_crops=26, progress=False)
    assert found.to_json() == expected.to_json()
    assert found.summary["label maps and objects"]["images"] == 13


def test_the_commands_read_coco_and_log_unmatched_categories(dataset_folder, tmp_path, capsys, caplog):
    content = coco(categories=[*CATEGORIES[:2], {"id": 90, "name": "person"}])
    boxes = write(tmp_path / "instances.json", content)
    assert (
        main(["analyze", str(dataset_folder), "--config", "colours", "--boxes", str(boxes), "--num-crops", "13"]) == 0
    )
    assert "13/13" in capsys.readouterr().err
    text = "1 of 3 object classes match none of the 3 classes, such as 'cat': 'person'; their boxes count only where"
    assert text in caplog.text


def test_a_file_without_categories_has_boxes_of_unknown_classes(tmp_path):
    found = read_boxes(write(tmp_path / "boxes.json", coco(categories=None)))
    assert found["photo_04"].names == ()
    assert found["photo_04"].boxes_xyxy == pytest.approx(np.array([[4 / 32, 5 / 48, 20.5 / 32, 30 / 48]]))


def test_running_numbers_are_never_taken_for_ids(dataset_folder, tmp_path):
    images = [{**each, "file_name": f"elsewhere_{i}.jpg"} for i, each in enumerate(IMAGES)]
    boxes = write(tmp_path / "boxes.json", coco(images=images))
    with pytest.raises(
        ValueError, match=r"none of the 13 images, .*, has boxes among the 13 that have, .*with the id 0"
    ):
        rd.analyze(dataset_folder, "colours", boxes=boxes, progress=False)
    objects = read_boxes(boxes)
    assert list(find_objects(["12", "x/7"], objects)) == ["12", "x/7"]
    assert list(find_objects(["000000000012"], objects)) == ["000000000012"]  # as COCO names its files
    with pytest.raises(ValueError, match="none of the 2 images"):
        find_objects(["00000012", "00000007"], objects)  # rows of a dataset without file names


@pytest.mark.parametrize(
    ("key", "name", "what"),
    [
        ("n01440764_10026_n01440764", "n01440764_10026", "without class suffix"),
        ("n01440764_10026", "n01440764_10026_n01440764", "without class suffix"),
        ("caf\u00e9", "cafe\u0301", "without folders"),
        ("PHOTO", "photo", "lower case"),
    ],
)
def test_boxes_are_found_by_other_spellings_of_a_name(key, name, what, caplog):
    box = Objects((4, 4), np.array([[0.0, 0, 1, 1]]))
    assert find_objects(["a/other", f"a/{key}"], {name: box, "third": box}) == {f"a/{key}": box}
    assert what in caplog.text
    with pytest.raises(ValueError, match="none of the 2 images"):
        find_objects([f"a/{key}", f"b/{key}"], {name: box})  # it is not clear of which


def test_boxes_measured_on_an_image_that_exif_turns_are_left_out(dataset_folder, tmp_path, caplog):
    swapped = [{**each, "width": each["height"], "height": each["width"]} for each in IMAGES[:1]]
    boxes = write(tmp_path / "boxes.json", coco(images=[*swapped, *IMAGES[1:]]))
    found = rd.analyze(dataset_folder, "colours", boxes=boxes, num_crops=13, progress=False)
    assert found.summary["label maps and objects"]["images"] == 12
    assert "1 of 13 images with boxes, such as 'photo_00', are left out: EXIF turns the image" in caplog.text


FILLER = "secret content of the file " * 500
BAD = {  # name: (content, message)
    "results": (
        [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}] * 99,
        "is a list, as COCO's resu",
    ),
    "another object": ({FILLER: 1, **{str(i): FILLER for i in range(99)}}, r"has other content \(fields 'secret"),
    "an empty object": ({}, "has other content"),
    "a text": (json.dumps(FILLER), "has other content"),
    "a number": ("17", "has other content"),
    "cut off": (json.dumps(coco())[:-200], "is no JSON, or damaged"),
    "lines of JSON": ("\n".join(json.dumps({"image": "a", "x": FILLER}) for _ in range(9)), "is no JSON, or damaged"),
    "nested too deeply": ("[" * 200_000, "nested too deeply"),
    "an endless integer": ('{"images": ' + "9" * 5000 + "}", "is no JSON, or damaged"),
    "images that are a table": (coco(images={"0": {"id": 0, "note": FILLER}}), "'images' must be a list of objects"),
    "annotations that are texts": (coco(annotations=[FILLER]), "'annotations' must be a list of objects"),
    "images without ids": (coco(images=[{"file_name": FILLER}]), "image 0: 'id' must be a number or a text, got None"),
    "repeated ids": (coco(images=[IMAGES[0], IMAGES[0]]), "image 0: another image has the same id '0'"),
    "file names that are lists": (
        coco(images=[{**IMAGES[0], "file_name": [FILLER]}]),
        "'file_name' must be a text, got",
    ),
    "no width": (coco(images=[{"id": 0, "file_name": "a", "height": 5}]), "image 0: 'width' must be the image's width"),
    "no height": (
        coco(images=[{"id": 0, "file_name": "a", "width": 5}]),
        "image 0: 'height' must be the image's height",
    ),
    "a width of 0": (coco(images=[{**IMAGES[0], "width": 0}]), "'width' must be the image's width in pixels, got 0"),
    "half a pixel": (coco(images=[{**IMAGES[0], "width": 31.5}]), "'width' must be .* got 31.5: boxes need it"),
    "a width that is infinite": (coco(images=[{**IMAGES[0], "width": float("inf")}]), "'width' must be .* got inf"),
    "no annotations": (coco(annotations=[]), "has no objects: 13 images, 0 crowds"),
    "only crowds": (one(iscrowd=1), "has no objects: 13 images, 1 crowds"),
    "only boxes without height": (one(bbox=[1, 2, 3, 0]), "has no objects: 13 images, 0 crowds, 1 boxes without"),
    "captions": (one(bbox=None, segmentation=None, category_id=None, caption=FILLER), "'category_id' must be a number"),
    "panoptic": (one(bbox=None, segmentation=None, segments_info=[{}]), "panoptic annotations have no boxes"),
    "no box": (one(bbox=None, segmentation=None), "annotation 100: 'bbox' must be x, y, width and height .* or 'segm"),
    "an outline that is run-length": (
        one(bbox=None, segmentation={"counts": FILLER}),
        "'bbox' must be x, y, width and",
    ),
    "an outline of odd length": (one(bbox=None, segmentation=[[1, 2, 3]]), "'bbox' must be x, y, width and height"),
    "three numbers": (one(bbox=[1, 2, 3]), "'bbox' must be x, y, width and height in pixels, got"),
    "numbers in texts": (one(bbox=["1", "2", "3", "4"]), "'bbox' must be x, y, width and height"),
    "NaN": (one(bbox=[1, 2, float("nan"), 4]), "'bbox' must be x, y, width and height in pixels, got"),
    "a huge number": (one(bbox=[1, 2, 10**400, 4]), "'bbox' must be x, y, width and height in pixels, got"),
    "truth values": (one(bbox=[True, True, True, True]), "'bbox' must be x, y, width and height in pixels, got"),
    "a negative width": (one(bbox=[9, 9, -3, 4]), "annotation 100: the box .* is empty or leaves the image"),
    "outside the image": (
        one(bbox=[30, 5, 16, 25]),
        "annotation 100: the box .* leaves the image of height 48 and width 32",
    ),
    "an unknown image": (one(image_id=FILLER), "image_id 'secret.* is none of the 13 images"),
    "an unknown category": (one(category_id=1), "category_id '1' is none of the 3 categories"),
    "a category without name": (coco(categories=[{"id": 1, "name": ["a"]}]), "category 1: 'name' must be a text"),
    "two images of one name": (
        coco(images=[{**each, "file_name": f"{i}/a.jpg"} for i, each in enumerate(IMAGES)]),
        "images '0' and '1' are both called 'a' without folder and extension",
    ),
}


@pytest.mark.parametrize("suffix", [".json", ".txt"])
@pytest.mark.parametrize("name", BAD)
def test_any_other_json_is_refused_in_one_short_line(name, suffix, tmp_path, capsys):
    content, message = BAD[name]
    path = write(tmp_path / f"boxes{suffix}", content)
    if suffix == ".txt" and not path.read_text().startswith(("{", "[")):
        message = "has the columns"  # of a table
    with pytest.raises(rd.DatasetError, match=message) as error:
        read_boxes(path)
    assert str(error.value).startswith(str(path))
    assert len(str(error.value)) - len(str(path)) < 400
    assert str(error.value).count("secret content") <= 4
    if suffix == ".json":
        assert main(["analyze", "--boxes", str(path)]) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_a_byte_order_mark_and_other_encodings(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(coco()).encode())
    assert len(read_boxes(path)) == 13
    path.write_bytes(json.dumps(coco()).encode("utf-16"))
    with pytest.raises(rd.DatasetError, match="is no JSON, or damaged"):
        read_boxes(path)


def test_skipped_boxes_are_counted_in_the_log(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    flat = [{**ANNOTATIONS[i], "bbox": [1, 1, i % 2, 1 - i % 2]} for i in range(4)]
    assert len(read_boxes(write(tmp_path / "boxes.json", coco(annotations=[*ANNOTATIONS[4:], *flat])))) == 9
    assert "4 boxes without width or height are skipped" in caplog.text


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
    assert peak < 2.5 * path.stat().st_size  # the text twice; the parsed outlines would take five times as much
