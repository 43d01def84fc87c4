"""The report page: opening, heatmaps, hostile names, screen readers, no JavaScript."""

import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.report.tiles import CLASS_COLORS
from tests.report.pages import DISPLAYED_CLASSES, HostileImages

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("config", ["heatmaps", "maps"])
@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_opens_on_the_sample_and_the_crop_of_the_index(open_report, config, width):
    report = open_report(config, width=width)
    index = report.page.evaluate("JSON.parse(document.getElementById('index').textContent)")
    assert report.key == index["samples"]["key"][index["opening"]["sample"]]
    assert report.box == index["opening"]["box"]
    selected = report.page.locator("#gallery [aria-selected=true]")
    assert selected.get_attribute("title") == report.key
    gallery, option = report.page.locator("#gallery").bounding_box(), selected.bounding_box()
    for start, length in (("x", "width"), ("y", "height")):  # the list is scrolled to the sample
        assert gallery[start] <= option[start] <= option[start] + option[length] <= gallery[start] + gallery[length] + 1
    assert report.page.evaluate("scrollY") == 0


@pytest.mark.parametrize("config", ["heatmaps", "topk", "maps"])
def test_heatmaps_show_class_probabilities(open_report, hostile_dataset, config):
    report = open_report(config)
    page = report.page
    label_map = rd.LabelMaps(hostile_dataset, config)[report.key]
    probabilities = label_map.dense().softmax(0)
    stored = label_map.classes.unique()
    order = stored[probabilities[stored].amax((1, 2)).argsort(descending=True)].tolist()[: len(CLASS_COLORS)]
    assert [name.text_content() for name in page.locator("#toggles .name").all()] == [
        DISPLAYED_CLASSES[i] for i in order
    ]
    strength = 1 if config == "maps" else 0.6

    def pixels() -> torch.Tensor:
        values = page.evaluate("""() => {
            const {width, height} = document.getElementById("heatmap");
            const context = new OffscreenCanvas(width, height).getContext("2d", {willReadFrequently: true});
            context.drawImage(document.getElementById("heatmap"), 0, 0);
            return [...context.getImageData(0, 0, width, height).data];
        }""")
        return torch.tensor(values, dtype=torch.float32).reshape(*label_map.shape[1:], 4)

    page.locator("#none").click()
    assert not pixels().any()
    for rank in (0, 2):
        page.locator("#toggles input").nth(rank).check()
        painted = pixels()
        expected = 255 * strength * probabilities[order[rank]]
        torch.testing.assert_close(painted[..., 3], expected, atol=0.51, rtol=0)
        bright = painted[..., 3] > 100
        if bright.any():
            color = torch.tensor(CLASS_COLORS[rank], dtype=torch.float32).expand(int(bright.sum()), 3)
            torch.testing.assert_close(
                painted[bright][:, :3], color, atol=2, rtol=0
            )  # canvases premultiply colors by opacity
        page.locator("#toggles input").nth(rank).uncheck()
    page.locator("#all").click()
    total = 255 * strength * probabilities[order].sum(0)
    torch.testing.assert_close(pixels()[..., 3], total, atol=0.51, rtol=0)


def test_without_images_heatmaps_are_shown(open_report, hostile_dataset):
    report = open_report("maps")
    assert report.page.locator("#picture").is_hidden()
    report.page.wait_for_selector("#gallery canvas")
    assert report.page.locator("#gallery img").count() == 0
    stage = report.page.locator("#stage").bounding_box()
    height, width = rd.LabelMaps(hostile_dataset, "maps")[report.key].canvas_size
    assert stage["width"] / stage["height"] == pytest.approx(width / height, abs=0.01)


def test_hostile_names_are_shown_literally(open_report):
    report = open_report()  # the fixture checks for injected code at the end
    page, source = report.page, HostileImages()
    assert sorted(report.shown_keys()) == sorted(source.keys)
    for position, key in enumerate(report.shown_keys()):
        page.locator("#gallery li").nth(position).click()
        assert report.key == key
        label = DISPLAYED_CLASSES[source.labels[source.keys.index(key)]]
        assert page.locator("#about").text_content().startswith(f"Label: {label}, ")
    assert set(page.locator("#class option").all_text_contents()) >= set(DISPLAYED_CLASSES)
    for name in DISPLAYED_CLASSES:
        assert page.locator("#statistics").get_by_role("cell", name=name, exact=True).count() == 0  # collapsed
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    texts = set(page.locator("#statistics td").all_text_contents())
    assert set(DISPLAYED_CLASSES) <= texts
    short = [name if len(name) <= 24 else f"{name[:23]}…" for name in DISPLAYED_CLASSES]
    pairs = [text.strip().split(" → ") for text in page.locator("svg text").all_text_contents()]
    plotted = [pair for pair in pairs if len(pair) == 2 and pair[0] != "label"]
    assert len(plotted) == 12
    assert all(name in short for pair in plotted for name in pair)
    assert page.locator("#samples script, #statistics script, svg image, iframe, object").count() == 0


def test_changes_are_announced_to_screen_readers(open_report):
    report = open_report()
    report.page.locator("#whole").click()
    best = report.label()[0]
    expected = f"{best[2]} {best[3]}"
    report.page.wait_for_function("text => document.getElementById('spoken').textContent.includes(text)", arg=expected)
    tree = report.page.locator("#samples").aria_snapshot()
    assert "listbox" in tree
    assert 'group "Crop box"' in tree
    assert tree.count("option ") >= len(HostileImages().keys)
    unnamed = report.page.evaluate("""
        [...document.querySelectorAll("input, select, button")].filter(
          (input) => !input.labels?.length && !input.textContent.trim()).map((input) => input.outerHTML)
    """)
    assert unnamed == []


def test_statistics_are_shown_without_javascript(chromium, report_paths):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report_paths["heatmaps"].as_uri())
    assert page.locator("#browser").is_hidden()
    assert page.locator("noscript").inner_text().startswith("The samples need JavaScript")
    assert page.locator("svg").first.is_visible()
    context.close()
