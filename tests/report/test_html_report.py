"""The report page without a browser: its content, and the arithmetic of its scripts in Node.js."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import relabel_datasets as rd
from relabel_datasets.analysis import analyze, suspects
from relabel_datasets.cli import main
from relabel_datasets.labels import windows
from relabel_datasets.report import html_report
from relabel_datasets.report.html_samples import PAGE_ENCODINGS
from relabel_datasets.shards.card import write_card
from tests.bad_names import change_manifest
from tests.conftest import ROOT, picture
from tests.labels.samples import STORED_FORMS, random_dense
from tests.report.pages import CLASSES, DISPLAYED_CLASSES, HostileImages, Page, RandomNet

QUICK = {"num_crops": 200, "progress": False}
PAGE_FOLDER = Path(html_report.__file__).parent / "page"
BOXES = (
    [0, 0, 1, 1], [0, 0, 0.01, 0.01], [0.99, 0.99, 1, 1], [0, 0.4, 1, 0.41], [0.2, 0, 0.6, 1], [0.4, 1 / 7, 0.8, 3 / 7],
    [0.5, 0.5, 0.5, 0.5], [0.1, 0.3, 0.1, 0.9], [0.07, 0.13, 0.93, 0.88], [1 / 3, 1 / 3, 2 / 3, 2 / 3],
)  # fmt: skip


@pytest.fixture
def write(hostile_dataset, tmp_path):
    """Write a report of the hostile dataset and return its content."""

    def write(config="heatmaps", **options) -> Page:
        path = rd.report.write_report(hostile_dataset, tmp_path / "report.html", config, **{**QUICK, **options})
        assert path == tmp_path / "report.html"
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        return Page(path)

    return write


def test_the_page_contains_the_stored_bytes_of_every_sample(write, hostile_dataset):
    page = write()
    label_maps = rd.LabelMaps(hostile_dataset, "heatmaps")
    samples = page.data["index"]["samples"]
    assert samples["key"] == list(label_maps)
    assert sorted(samples["key"]) == sorted(HostileImages().keys)
    assert page.data["index"]["classes"] == list(DISPLAYED_CLASSES)
    assert {len(column) for column in samples.values()} == {len(label_maps)}
    soft = [rd.LabelPooling()(label_maps.at(row)) for row in range(len(label_maps))]
    assert samples["best"] == [int(label.argmax()) for label in soft]
    assert samples["label"] == label_maps.index.labels.tolist()
    for row, (p_best, p_label) in enumerate(zip(samples["p_best"], samples["p_label"], strict=True)):
        assert p_best == pytest.approx(float(soft[row].max()), abs=1e-4)
        assert p_label == pytest.approx(float(soft[row][samples["label"][row]]), abs=1e-4)
        sample = page.data[f"sample-{row}"]
        assert base64.b64decode(sample["map"]) == label_maps.map_bytes(row)
        with Image.open(io.BytesIO(base64.b64decode(sample["image"]))) as image:
            assert image.format == "JPEG"
            assert (image.height, image.width) == label_maps.at(row).canvas_size


def test_large_images_are_downscaled(tmp_path, annotator):
    path = tmp_path / "images" / "cat" / "large.png"
    path.parent.mkdir(parents=True)
    for name in ("dog", "emu"):
        (tmp_path / "images" / name).mkdir()
        picture(1).save(tmp_path / "images" / name / f"{name}.png")
    picture(2, (900, 600)).save(path)
    source = rd.data.ImageFolderSource(tmp_path / "images")
    rd.build(source, tmp_path / "data", annotator, config="one", progress=False)
    page = Page(rd.report.write_report(tmp_path / "data", tmp_path / "report.html", **QUICK))
    number = page.data["index"]["samples"]["key"].index("large")
    with Image.open(io.BytesIO(base64.b64decode(page.data[f"sample-{number}"]["image"]))) as image:
        assert image.size == (171, 256)


def test_strings_of_the_dataset_are_escaped(write, hostile_dataset):
    page, clean = write(), DISPLAYED_CLASSES[9]
    assert [tag for tag, attributes in page.tags if tag == "script" and attributes.get("type") is None] == ["script"]
    assert len(page.scripts) == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert [tag for tag, _ in page.tags if tag in ("img", "i", "b", "iframe")].count("img") == 2  # those of the page
    assert ("i", {}) not in page.tags
    texts = [text.strip() for text in page.texts]
    assert {clean, DISPLAYED_CLASSES[5]} <= set(texts)
    all_text = "".join(page.texts)
    for name in (*DISPLAYED_CLASSES, HostileImages().keys[0], "<i>annotator</i>"):
        assert name in all_text, name


def test_the_page_loads_nothing_and_allows_only_its_own_script(write):
    page = write()
    policy = next(tag["content"] for _, tag in page.tags if tag.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    links = [value for _, tag in page.tags for name, value in tag.items() if name in ("src", "href", "xlink:href")]
    assert all(link.startswith(("#", "data:,")) for link in links), links


def test_checksums_are_behind_a_details_element(write, hostile_dataset):
    page = write()
    digests = [
        value
        for value in rd.LabelMaps(hostile_dataset, "heatmaps").manifest.annotator.values()
        if re.fullmatch("[0-9a-f]{64}", str(value))
    ]
    texts = [text.strip() for text in page.texts if text.strip()]
    assert digests
    assert [text for text in texts if re.search("[0-9a-f]{32}", text)] == digests
    assert all(texts.index(digest) > texts.index("Checksums") for digest in digests)
    assert [tag for tag, _ in page.tags].count("dd") >= len(digests)


def test_the_page_says_what_a_label_map_is_before_the_first_number(write):
    texts = "".join(write().texts)
    assert texts.index("A label map holds the class scores of the annotator") < texts.index("Size of a label map")


def test_ids_are_unique_across_all_plots(write, tmp_path, hostile_dataset):
    boxes = tmp_path / "boxes.csv"
    lines = [f"key_{i},100,80,10,10,60,50" for i in range(3)]
    names = [key.replace('"', '""') for key in list(rd.LabelMaps(hostile_dataset, "heatmaps"))[:6]]
    lines += [f'"{name}",100,80,10,10,60,50' for name in names]
    boxes.write_text("\n".join(["image,width,height,xmin,ymin,xmax,ymax", *lines]), encoding="utf-8")
    path = rd.report.write_report(hostile_dataset, tmp_path / "out" / "report.html", "heatmaps", boxes=boxes, **QUICK)
    page = Page(path)
    ids = [tag["id"] for _, tag in page.tags if "id" in tag]
    assert len(ids) == len(set(ids))
    assert (
        sum(tag == "svg" for tag, _ in page.tags) == 5
    )  # overlap, overlap and confidence, number of classes, confused classes, gains
    references = re.findall(
        r'(?:href="#|url\(#|aria-labelledby="|aria-describedby=")([^")]+)', path.read_text(encoding="utf-8")
    )
    assert set(references) - {"y"} <= set(ids)  # y is part of a class name


def test_num_samples_limits_samples_but_neither_statistics_nor_suspects(write, hostile_dataset, monkeypatch):
    suspected = analyze(hostile_dataset, "heatmaps", **QUICK).tables["suspects"].rows
    monkeypatch.setattr(html_report, "NUM_SUSPECTS", 3)
    page = write(num_samples=5)
    source = HostileImages()
    keys = page.data["index"]["samples"]["key"]
    assert len([name for name in page.data if name.startswith("sample-")]) == len(keys) == len(set(keys))
    assert 5 < len(keys) <= 8
    assert {key for key, *_ in suspected[:3]} < set(keys)
    order = list(rd.LabelMaps(hostile_dataset, "heatmaps"))
    assert keys == sorted(keys, key=order.index)
    assert f"Measured on all {len(source.keys)} images" in "".join(page.texts)


def test_reports_are_reproducible_and_contain_no_local_paths(hostile_dataset, tmp_path):
    paths = [rd.report.write_report(hostile_dataset, tmp_path / name, "topk", **QUICK) for name in ("a", "b")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert str(tmp_path) not in paths[0].read_text(encoding="utf-8")
    assert str(hostile_dataset.parent) not in paths[0].read_text(encoding="utf-8")


@pytest.mark.parametrize(("config", "options"), [("heatmaps", {"images": False}), ("maps", {})])
def test_a_page_without_images_has_a_note(write, config, options):
    page = write(config, **options)
    assert all(page.data[f"sample-{i}"]["image"] is None for i in range(len(HostileImages().keys)))
    assert "labels are shown without them" in "".join(page.texts)


def test_images_of_a_label_only_dataset_are_joined(write):
    source = HostileImages()
    page = write("maps", images={key: source.read(i) for i, key in enumerate(source.keys)})
    assert all(page.data[f"sample-{i}"]["image"] for i in range(len(source.keys)))


@pytest.fixture
def restricted_dataset(dataset_folder, tmp_path):
    (tmp_path / "mine.md").write_text("---\nrestricted_images: SecretNet\n{{ card_data }}\n---\n{{ mark }}\n")
    write_card(dataset_folder, tmp_path / "mine.md")
    return dataset_folder


@pytest.mark.parametrize("config", [None, "colours"])
def test_restricted_images_are_left_out_unless_named(restricted_dataset, tmp_path, config, caplog):
    folder = restricted_dataset if config is None else restricted_dataset / config  # the folder of one config
    out = tmp_path / "report.html"
    page = Page(rd.report.write_report(folder, out, "colours", **QUICK))
    assert page.data["sample-0"]["image"] is None
    assert "Images of SecretNet must not be redistributed" in "".join(page.texts)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "--restricted-images 'SecretNet'" in caplog.text
    page = Page(rd.report.write_report(folder, out, "colours", restricted_images="SecretNet", **QUICK))
    assert page.data["sample-0"]["image"] is not None
    assert "do not share it" in "".join(page.texts)
    with pytest.raises(
        ValueError, match=r"'OtherNet', but the card of .* restricts the images of 'SecretNet': give this name"
    ):
        rd.report.write_report(folder, out, "colours", restricted_images="OtherNet", **QUICK)


def test_restricted_images_of_the_hub_are_left_out(restricted_dataset, tmp_path, local_hub):
    local_hub.publish("org/name", restricted_dataset)
    page = Page(rd.report.write_report("org/name", tmp_path / "report.html", "colours", **QUICK))
    assert page.data["sample-0"]["image"] is None
    assert "name: label maps" in page.texts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples= must be at least 1, got 0"),
        ({"restricted_images": "ImageNet"}, "does not restrict its images: leave it out"),
        ({"config": "blue"}, "no config 'blue'"),
        ({"split": "test"}, "no split 'test'"),
        ({"boxes": "nowhere.csv"}, "nowhere.csv"),
        ({"num_crops": 0}, "num_crops= must be at least 1, got 0"),
        ({"out": "."}, "is a folder: give the path of the file"),
    ],
)
def test_invalid_arguments_raise_an_error_before_anything_is_written(
    hostile_dataset, tmp_path, options, message, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        rd.report.write_report(hostile_dataset, **{"config": "heatmaps", **QUICK, **options})
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_page_and_prints_its_path(dataset_folder, image_folder, tmp_path, capsys):
    out = tmp_path / "new" / "report.html"
    arguments = [
        "report",
        str(dataset_folder),
        "--config",
        "labels-only",
        "--num-samples",
        "4",
        "--num-crops",
        "99",
        "--out",
        str(out),
    ]
    assert main([*arguments, "--images", str(image_folder)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    assert "MB; open it in a browser" in printed.err
    page = Page(out)
    assert page.data["sample-3"]["image"] is not None
    assert main([*arguments, "--no-images"]) == 0
    assert Page(out).data["sample-3"]["image"] is None
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--num-samples", "0"])
    assert "argument --num-samples: expected an integer of at least 1, got '0'" in capsys.readouterr().err


DRIVER = """
const {maps, boxes} = JSON.parse(require("fs").readFileSync(0, "utf8"));
const answers = maps.map((text) => {
  const map = decodeLabelMap(new Uint8Array(Buffer.from(text, "base64")));
  return {
    canvas: map.canvas,
    labels: boxes.map((box) => [...poolLabel(map, box)]),
    strongest: strongestClasses(map, 4).map(({index, highest, heatmap}) => [index, highest, [...heatmap]]),
  };
});
console.log(JSON.stringify(answers));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="requires Node.js; the browser tests also cover pooling")
@pytest.mark.parametrize("num_classes", [13, 300])
def test_pooling_in_the_page_equals_pool_labels(num_classes):
    generator = np.random.default_rng(5)
    corners = np.sort(generator.random((40, 2, 2)), axis=1).reshape(-1, 4)
    boxes = [*BOXES, *corners.tolist()]
    blobs = [
        rd.LabelMap.from_logits(random_dense(num_classes, 7, 5), encoding, canvas_size=(17, 11)).to_safetensors(dtype)
        for encoding, dtype in STORED_FORMS
        if encoding in PAGE_ENCODINGS
    ]
    request = json.dumps({"maps": [base64.b64encode(blob).decode() for blob in blobs], "boxes": boxes})
    script = (PAGE_FOLDER / "label_map.js").read_text(encoding="utf-8") + DRIVER
    result = subprocess.run(["node", "-e", script], input=request, capture_output=True, text=True, check=True)
    for blob, answer in zip(blobs, json.loads(result.stdout), strict=True):
        label_map = rd.LabelMap.from_safetensors(blob)
        assert tuple(answer["canvas"]) == label_map.canvas_size
        count = len(boxes)
        expected = rd.pool_labels(
            label_map.logits.expand(count, -1, -1, -1),
            label_map.classes.expand(count, *label_map.classes.shape),
            torch.tensor(boxes),
            num_classes=num_classes,
            base=None if label_map.base is None else label_map.base.expand(count, -1),
        )
        torch.testing.assert_close(torch.tensor(answer["labels"]), expected, atol=2e-5, rtol=0)
        probabilities = label_map.dense().softmax(0)
        highest = probabilities[label_map.classes.unique()].amax((1, 2)).sort(descending=True).values[:4]
        for (index, peak, heatmap), expected_peak in zip(answer["strongest"], highest.tolist(), strict=True):
            assert peak == pytest.approx(expected_peak, abs=1e-5)
            torch.testing.assert_close(torch.tensor(heatmap), probabilities[index].flatten(), atol=1e-5, rtol=0)


@pytest.mark.slow  # builds the package
def test_the_wheel_contains_the_page(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = {Path(name).name for name in wheel.namelist() if "/report/page/" in name}
    assert names == {path.name for path in PAGE_FOLDER.iterdir()}


def test_the_page_of_stored_crops_has_their_boxes_flips_and_labels(tmp_path):
    data = tmp_path / "data"
    annotator = rd.ModuleAnnotator(RandomNet(), (56, 40), classes=CLASSES, name="<i>annotator</i>")
    crops = rd.annotate.BuildConfig(encoding="crops", num_crops=6)
    rd.build(HostileImages(), data, annotator, config="crops", build_config=crops, progress=False)
    change_manifest(data / "crops" / "_info.json", lambda content: content["annotator"].update(linear_head=True))
    (tmp_path / "boxes.csv").write_text(
        "\n".join(["image,width,height,xmin,ymin,xmax,ymax", *(f"a&lt;b_{i:02d},56,40,10,10,40,30" for i in (2, 7))])
    )
    boxes = tmp_path / "boxes.csv"
    page = Page(rd.report.write_report(data, tmp_path / "crops.html", num_samples=5, boxes=boxes, progress=False))
    index, (script,) = page.data["index"], page.scripts
    policy = next(attributes["content"] for _, attributes in page.tags if "content" in attributes)
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert index["classes"] == list(DISPLAYED_CLASSES)
    analysis = analyze(data, boxes=boxes, progress=False)
    assert {key for key, *_ in analysis.tables["suspects"].rows} <= set(index["samples"]["key"])
    label_maps = rd.LabelMaps(data)
    for position, key in enumerate(index["samples"]["key"]):
        sample, labels = page.data[f"sample-{position}"], label_maps[key]
        soft, mean = labels.soft_labels(), labels.mean_label()
        assert sample["boxes"] == [list(labels.pixel_box(crop)) for crop in range(6)]
        assert sample["flips"] == labels.flips.int().tolist()
        assert sample["size"] == list(labels.canvas_size)
        assert (index["samples"]["label"][position], index["samples"]["best"][position]) == (
            labels.label,
            int(mean.argmax()),
        )
        for shown, label in ((sample["mean"], mean), *zip(sample["labels"], soft, strict=True)):
            assert [p for _, p in shown] == pytest.approx(label.topk(5).values.tolist(), abs=1e-4)
            assert all(float(label[index]) == pytest.approx(p, abs=1e-4) for index, p in shown)
        with Image.open(io.BytesIO(base64.b64decode(sample["image"]))) as picture_of_sample:
            assert picture_of_sample.size == labels.canvas_size[::-1]
    assert "hacked" not in script
    texts = "".join(page.texts)
    assert "6 per image" in texts
    assert "exact maps" not in texts
    assert f"Measured on all {len(label_maps)} images and {6 * len(label_maps)} stored crops" in texts
    for text in (
        suspects.CROPS_DEFINITION,
        windows.CROPS_DEFINITION,
        "Stored crops and objects",
        "Mean label and label",
    ):
        assert text in texts
    assert "<i>annotator</i>" in texts
