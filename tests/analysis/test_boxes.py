import numpy as np
import pytest

import relabel_datasets as rd
from relabel_datasets.analysis.boxes import read_boxes
from relabel_datasets.demo.scenes import CLASSES, draw_scenes, read_objects

# As in VOC2012/Annotations, including folders, poses and parts of objects.
VOC = """<annotation>
	<folder>VOC2012</folder>
	<filename>2007_000027.jpg</filename>
	<source><database>The VOC2007 Database</database><image>flickr</image></source>
	<size><width>486</width><height>500</height><depth>3</depth></size>
	<segmented>0</segmented>
	<object>
		<name>person</name>
		<pose>Unspecified</pose>
		<truncated>0</truncated>
		<difficult>0</difficult>
		<bndbox><xmin>174</xmin><ymin>101</ymin><xmax>349</xmax><ymax>351</ymax></bndbox>
		<part>
			<name>head</name>
			<bndbox><xmin>169</xmin><ymin>104</ymin><xmax>209</xmax><ymax>146</ymax></bndbox>
		</part>
	</object>
	<object>
		<name>dog</name>
		<truncated>1</truncated>
		<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>486</xmax><ymax>45.70000076293945</ymax></bndbox>
	</object>
	<object>
		<name>sheep</name>
		<difficult>1</difficult>
		<bndbox><xmin>7</xmin><ymin>9</ymin><xmax>7</xmax><ymax>9</ymax></bndbox>
	</object>
</annotation>
"""


@pytest.fixture
def voc(tmp_path):
    path = tmp_path / "Annotations" / "2007_000027.xml"
    path.parent.mkdir()
    path.write_text(VOC)
    return path


def test_voc_pixels_are_counted_from_1_and_the_last_one_is_inside(voc):
    objects = read_boxes(voc)["2007_000027"]
    assert objects.size == (500, 486)
    assert objects.names == ("person", "dog")  # truncated objects are included; parts and difficult objects are not
    width, height = 486, 500
    assert objects.boxes_xyxy == pytest.approx(
        np.array([[173 / width, 100 / height, 349 / width, 351 / height], [0, 0, 1, 45.70000076293945 / height]])
    )


def test_difficult_objects_are_included_on_request(voc):
    objects = read_boxes(voc, difficult=True)["2007_000027"]
    assert objects.names == ("person", "dog", "sheep")
    x1, y1, x2, y2 = objects.boxes_xyxy[2]
    assert (x2 - x1) * 486 == pytest.approx(1)  # one pixel
    assert (y2 - y1) * 500 == pytest.approx(1)


def test_a_folder_may_hold_xml_files_at_any_depth(voc):
    nested = voc.parent / "n01440764"
    nested.mkdir()
    (nested / "n01440764_18.v2.xml").write_text(VOC)
    (nested / "empty.xml").write_text("<annotation><size><width>5</width><height>4</height></size></annotation>")
    (nested / "notes.txt").write_text("not of interest")
    assert sorted(read_boxes(voc.parent)) == ["2007_000027", "n01440764_18.v2"]  # none without objects


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<annotation>", "<annotation", "is not an XML file, or is corrupt: not well-formed"),
        ("</annotation>", "", "is not an XML file, or is corrupt"),
        ("<annotation>", '<?xml version="1.0" encoding="no-such"?><annotation>', "is not an XML file, or is corrupt"),
        ("annotation>", "labels>", "has the root element <labels>: expected <annotation>"),
        ("<width>486</width>", "", "has no <size><width>"),
        ("<width>486</width>", "<width>486.5</width>", "<size><width> must be a whole number, got '486.5'"),
        ("<width>486</width>", "<width>0</width>", "object 1: image size .height 500, width 0. is not positive"),
        ("<name>dog</name>", "<name> </name>", "object 2 has no <name>"),
        ("<xmin>174</xmin>", "", "object 1 has no <bndbox><xmin>"),
        ("<xmin>174</xmin>", "<xmin>left</xmin>", "object 1: <bndbox><xmin> must be a number, got 'left'"),
        ("<xmin>174</xmin>", "<xmin/>", "object 1: <bndbox><xmin> must be a number, got ''"),
        ("<xmin>174</xmin>", "<xmin>350</xmin>", "object 1: the box .* is empty or leaves the image"),
        ("<xmax>349</xmax>", "<xmax>488</xmax>", "object 1: the box .* of height 500 and width 486"),
        ("<ymin>101</ymin>", "<ymin>nan</ymin>", "object 1: the box .* is empty or leaves the image"),
    ],
)
def test_bad_xml_names_file_and_element(voc, old, new, message):
    voc.write_text(VOC.replace(old, new))
    with pytest.raises(rd.DatasetError, match=message) as error:
        read_boxes(voc.parent)
    assert str(voc) in str(error.value)


def test_boxes_that_leave_the_image_by_a_pixel_are_clipped(voc):
    voc.write_text(VOC.replace("<xmax>349</xmax>", "<xmax>487</xmax>").replace("<xmin>174</xmin>", "<xmin>0</xmin>"))
    assert read_boxes(voc)["2007_000027"].boxes_xyxy[0, ::2].tolist() == [0, 1]


def test_missing_boxes_raise_an_error(tmp_path, voc):
    with pytest.raises(FileNotFoundError, match=r"no boxes at .*/nowhere: expected a COCO JSON file, a CSV table"):
        read_boxes(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no boxes in .*/empty: expected XML files"):
        read_boxes(tmp_path / "empty")
    voc.write_text(VOC.replace("<truncated>1</truncated>", "<difficult>1</difficult>").replace(">0</diff", ">1</diff"))
    with pytest.raises(rd.DatasetError, match="has no objects in 1 file; objects that are marked as difficult"):
        read_boxes(voc)
    assert len(read_boxes(voc, difficult=True)["2007_000027"].boxes_xyxy) == 3
    (voc.parent / "again").mkdir()
    (voc.parent / "again" / voc.name).write_text(VOC)
    with pytest.raises(rd.DatasetError, match="another file has boxes of an image '2007_000027'"):
        read_boxes(voc.parent)


HEADER = "image,width,height,xmin,ymin,xmax,ymax\n"


def _table(folder, text):
    path = folder / "boxes.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_table_has_one_object_per_line_in_pixels_from_the_edge(tmp_path):
    lines = "val/a.JPEG,100,50,0,0,100,50\nb.v2,10,20,1,2,3,4\nval/a.JPEG,100,50,10,5,60.5,30\n"
    objects = read_boxes(_table(tmp_path, "\ufeff" + HEADER + lines))
    assert sorted(objects) == ["a", "b.v2"]  # only image extensions are removed
    assert objects["a"].size == (50, 100)
    assert objects["a"].names == ()
    assert objects["a"].boxes_xyxy == pytest.approx(np.array([[0, 0, 1, 1], [0.1, 0.1, 0.605, 0.6]]))
    assert objects["b.v2"].boxes_xyxy == pytest.approx(np.array([[0.1, 0.1, 0.3, 0.2]]))


TABLE = "image,width,height,class,xmin,ymin,xmax,ymax\nval/a.JPEG,100,50,cat,10,5,60.5,30\n"


@pytest.mark.parametrize(
    "text",
    [
        TABLE,
        "\ufeff" + TABLE,
        TABLE.replace(",", ";"),
        "\ufeff" + TABLE.replace(",", ";"),
        TABLE.replace(",", "\t"),
        TABLE.replace(",", ", "),
        TABLE.replace("\n", "\r\n"),
        TABLE.replace("image,width", "Image,WIDTH"),
        TABLE.replace("image,", '"image",').replace("val/a.JPEG", '"val/a.JPEG"'),
        TABLE.replace("ymax\n", "ymax,score\n").replace(",30\n", ",30,0.5\n"),
        TABLE + "\n",
    ],
    ids=[
        "plain",
        "bom",
        "semicolons",
        "bom-semicolons",
        "tabs",
        "spaces",
        "crlf",
        "case",
        "quotes",
        "more",
        "blank-line",
    ],
)
def test_common_table_dialects_give_the_same_boxes(tmp_path, text):
    objects = read_boxes(_table(tmp_path, text))
    assert list(objects) == ["a"]
    assert (objects["a"].size, objects["a"].names) == ((50, 100), ("cat",))
    assert objects["a"].boxes_xyxy == pytest.approx(np.array([[0.1, 0.1, 0.605, 0.6]]))


def test_of_class_returns_all_boxes_if_classes_are_unknown_or_absent(tmp_path):
    lines = "a,10,10,cat,0,0,5,5\na,10,10,dog,0,0,10,10\n"
    known = read_boxes(_table(tmp_path, "image,width,height,class,x1,y1,x2,y2\n" + lines))["a"]
    assert known.names == ("cat", "dog")
    assert known.of_class("dog").tolist() == [[0, 0, 1, 1]]
    assert len(known.of_class("emu")) == 2
    unknown = read_boxes(_table(tmp_path, HEADER + "a,10,10,0,0,5,5\na,10,10,0,0,10,10\n"))["a"]
    assert len(unknown.of_class("dog")) == 2


def test_tables_of_the_demo_scenes_can_be_read(tmp_path):
    draw_scenes(tmp_path, "train", 12)
    expected, actual = read_objects(tmp_path / "train-boxes.csv"), read_boxes(tmp_path / "train-boxes.csv")
    assert actual.keys() == expected.keys()
    for key, objects in actual.items():
        height, width = objects.size
        assert objects.names == tuple(CLASSES[scene_object.label] for scene_object in expected[key])
        assert objects.boxes_xyxy * (width, height, width, height) == pytest.approx(
            np.array([scene_object.box_xyxy for scene_object in expected[key]])
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has the columns .*: expected image, width, height, xmin"),
        ("image,xmin,ymin,xmax,ymax\na,1,2,3,4\n", "has the columns .*: expected image, width, height"),
        (HEADER, "has no boxes: expected one line per object"),
        (
            HEADER + "a,10,10,0,0,5,5\na,10,ten,0,0,5,5\n",
            "line 3: expected the name of an image, and its size and a box as num",
        ),
        (HEADER + "a,10,10,0,0,5\n", "line 2: expected the name of an image, and its size and a box as numbers"),
        (HEADER + "a,10,10,5,0,5,5\n", "line 2: the box .* is empty or leaves the image of height 10 and width 10"),
        (HEADER + "a,10,10,0,0,5,12\n", "line 2: the box .* is empty or leaves the image"),
        (HEADER + "a,0,10,0,0,5,5\n", "line 2: image size .height 10, width 0. is not positive"),
        (HEADER + "a,10,10,0,0,5,5\na,10,12,0,0,5,5\n", "line 3: image 'a' with .height, width. .12, 10. conflicts"),
        (
            HEADER + "x/a.jpg,9,9,0,0,5,5\ny/a.jpg,9,9,0,0,5,5\n",
            "line 3: image 'y/a.jpg' .* an earlier line, which has 'x/a.jpg'",
        ),
        (HEADER.encode() + b"\xff\xfe\n", "is not a CSV table"),
        (
            HEADER.replace(",", ";") + "a;10;10;0;0;5,5;5\n",
            "line 2: expected the name of an image, .*, got .*xmax='5,5'",
        ),
        (HEADER.replace(",", ":"), "has the columns 'image:width:height:.* in its first line: expected image, width"),
        (HEADER.encode("utf-16"), "is not a CSV table"),
        (HEADER.replace("xmin", "left").replace("ymin", "top"), "has the columns .*'left', 'top'"),
        ("long," * 5000 + "\n" + "x," * 5000, "has the columns 'long', .* and 4993 more in its first line"),
        ("x" * 100_000, "has the columns 'xxx"),
        (
            HEADER + "a" * 9000 + ",10,10,0,0,five,5\n",
            "line 2: expected the name of an image, .* got image='aaa.*xmax='five'",
        ),
        (b"\xff\xd8\xff\xe0" + bytes(200), "is not a CSV table"),
    ],
)
def test_bad_tables_name_file_and_line(tmp_path, text, message):
    with pytest.raises(rd.DatasetError, match=message) as error:
        read_boxes(_table(tmp_path, text))
    assert str(tmp_path / "boxes.csv") in str(error.value)
    assert len(str(error.value)) < 600  # the message does not print the whole file
