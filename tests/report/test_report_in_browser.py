"""The report page in a real browser: crops by mouse, touch and keyboard, filters, heatmaps, hostile names, layout."""

from __future__ import annotations

import math

import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.report.tiles import CLASS_COLORS
from tests.report.browser import Report, start_chromium
from tests.report.pages import DISPLAYED_CLASSES, HostileImages, build_many

pytestmark = pytest.mark.slow

BOXES = [  # in percent of the image
    (0, 0, 100, 100), (0, 0, 1, 1), (99, 99, 100, 100), (0, 37, 100, 38), (14.3, 0, 42.9, 100), (20, 20, 60, 80),
    (33.3, 66.6, 34.5, 71), (50, 50, 51, 51), (7.25, 0, 93.5, 12.5), (28.5714, 20, 57.1429, 60),
]  # fmt: skip


@pytest.fixture(scope="module")
def chromium():
    with start_chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def report_paths(hostile_dataset, tmp_path_factory):
    """One report per config; `maps` has no images."""
    folder = tmp_path_factory.mktemp("reports")
    return {
        name: rd.report.write_report(hostile_dataset, folder / f"{name}.html", name, num_crops=500, progress=False)
        for name in ("heatmaps", "topk", "maps")
    }


@pytest.fixture
def open_report(chromium, report_paths):
    """Return a function that opens a report. At the end, all opened reports must be free of errors and requests."""
    opened = []

    def open_report(name="heatmaps", *, width=1280, scheme="light", path=None) -> Report:
        context = chromium.new_context(
            viewport={"width": width, "height": 1100 if width > 500 else 800},
            color_scheme=scheme,
            has_touch=width < 500,
        )
        report = Report(context.new_page(), path or report_paths[name])
        opened.append((context, report))
        return report

    yield open_report
    for context, report in opened:
        report.check_safe()
        context.close()


@pytest.mark.parametrize("config", ["heatmaps", "topk", "maps"])
def test_displayed_labels_equal_pool_labels(open_report, hostile_dataset, config):
    report, label_maps = open_report(config), rd.LabelMaps(hostile_dataset, config)
    for position in (0, 7, 23):
        report.page.locator("#gallery li").nth(position).click()
        label_map = label_maps[report.key]
        for box in BOXES:
            report.set_box(*box)
            assert report.box == pytest.approx([value / 100 for value in box], abs=1e-12)
            report.check_label(label_map, DISPLAYED_CLASSES)


@pytest.mark.parametrize("config", ["heatmaps", "topk"])
def test_the_mouse_moves_resizes_and_draws_the_box(open_report, hostile_dataset, config):
    report = open_report(config)
    label_map = rd.LabelMaps(hostile_dataset, config)[report.key]

    def check(*expected: float) -> None:
        assert report.box == pytest.approx(expected, abs=0.006)  # one or two pixels
        report.check_label(label_map, DISPLAYED_CLASSES)

    check(0.2, 0.2, 0.8, 0.8)
    report.drag(report.middle("#box"), 0.1, -0.05)
    check(0.3, 0.15, 0.9, 0.75)
    report.drag(report.middle("#box"), 0.5, 0.1)  # stops at the edge and keeps its size
    check(0.4, 0.25, 1, 0.85)
    report.drag(report.middle(".handle.left.top"), -0.3, -0.2)
    check(0.1, 0.05, 1, 0.85)
    report.drag(report.middle('[data-edges="right"]'), -0.4, 0.3)
    check(0.1, 0.05, 0.6, 0.85)
    report.drag(report.middle('[data-edges="bottom"]'), 0.2, 0.9)
    check(0.1, 0.05, 0.6, 1)
    report.drag(report.middle('[data-edges="left"]'), 0.9, 0)  # stops at the opposite edge
    check(0.59, 0.05, 0.6, 1)
    stage = report.page.locator("#stage").bounding_box()
    report.drag((stage["x"] + 0.3 * stage["width"], stage["y"] + 0.8 * stage["height"]), -0.2, -0.5)
    check(0.1, 0.3, 0.3, 0.8)
    report.page.locator("#whole").click()
    check(0, 0, 1, 1)
    boxes = set()
    for _ in range(20):
        report.page.locator("#random").click()
        x1, y1, x2, y2 = report.box
        height, width = label_map.canvas_size
        pixels = [x1 * width, y1 * height, x2 * width, y2 * height]
        assert pixels == pytest.approx([round(value) for value in pixels], abs=1e-6)
        assert 0 <= x1 < x2 <= 1
        assert 0 <= y1 < y2 <= 1
        boxes.add(tuple(report.box))
    assert len(boxes) > 10
    report.check_label(label_map, DISPLAYED_CLASSES)


def test_touch_moves_the_box_inside_and_scrolls_the_page_outside(open_report, hostile_dataset):
    report = open_report(width=375)
    page = report.page
    page.locator("#stage").scroll_into_view_if_needed()
    touch = page.context.new_cdp_session(page)

    def swipe(start: tuple[float, float], dx: float, dy: float) -> None:
        def send(event, *points):
            touch.send("Input.dispatchTouchEvent", {"type": event, "touchPoints": list(points)})

        send("touchStart", {"x": start[0], "y": start[1]})
        for step in range(1, 9):
            send("touchMove", {"x": start[0] + dx * step / 8, "y": start[1] + dy * step / 8})
        send("touchEnd")

    stage = page.locator("#stage").bounding_box()
    scrolled = page.evaluate("scrollY")
    swipe(report.middle("#box"), 0.1 * stage["width"], 0.2 * stage["height"])
    assert report.box == pytest.approx([0.3, 0.4, 0.9, 1], abs=0.01)
    swipe(report.middle(".handle.left.top"), -0.2 * stage["width"], -0.1 * stage["height"])
    assert report.box == pytest.approx([0.1, 0.3, 0.9, 1], abs=0.01)
    assert page.evaluate("scrollY") == scrolled
    report.check_label(rd.LabelMaps(hostile_dataset, "heatmaps")[report.key], DISPLAYED_CLASSES)
    box = report.box
    swipe((stage["x"] + 0.3 * stage["width"], stage["y"] + 0.1 * stage["height"]), 0, -100)
    page.wait_for_function("scrolled => scrollY > scrolled", arg=scrolled)
    assert report.box == box


def test_everything_can_be_done_with_the_keyboard(open_report, hostile_dataset):
    report = open_report()
    page, label_maps = report.page, rd.LabelMaps(hostile_dataset, "heatmaps")
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate("(document.activeElement.id || document.activeElement.getAttribute('role')) ?? ''")
        reached.append(name)
        if name and page.evaluate("document.activeElement !== document.body"):
            outline = page.evaluate("getComputedStyle(document.activeElement).outline")
            assert "none" not in outline, name
            assert "3px" in outline, name
        if name == "random":
            break
    for name in ("text", "class", "agreement", "shown", "order", "option", "box", "all", "none", "left", "whole"):
        assert name in reached, name
    assert reached.index("option") < reached.index("box") < reached.index("all") < reached.index("left")
    assert reached.count("option") == 1  # one tab stop for all samples

    page.locator("#box").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Shift+ArrowLeft", "Shift+ArrowUp", "Shift+ArrowUp"):
        page.keyboard.press(key)
    assert report.box == pytest.approx([0.24, 0.22, 0.82, 0.78])
    report.check_label(label_maps[report.key], DISPLAYED_CLASSES)
    for _ in range(40):
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Shift+ArrowUp")
    assert report.box == pytest.approx([0.42, 0.22, 1, 0.23])

    keys = report.shown_keys()
    page.locator("#gallery [aria-selected=true]").focus()
    columns = page.evaluate(
        "getComputedStyle(document.getElementById('gallery')).gridTemplateColumns.split(' ').length"
    )
    position = 0
    for key, step in (("ArrowRight", 1), ("ArrowRight", 1), ("ArrowLeft", -1), ("ArrowDown", columns), ("ArrowUp", -columns),
                      ("ArrowUp", 0), ("End", None), ("ArrowRight", 0), ("Home", None), ("ArrowLeft", 0)):  # fmt: skip
        page.keyboard.press(key)
        position = {"End": len(keys) - 1, "Home": 0}.get(key, position + (step or 0))
        assert report.key == keys[position], key
        assert page.evaluate("document.activeElement.title") == keys[position]
        assert page.locator("#gallery [aria-selected=true]").count() == 1
    page.locator("#toggles input").first.focus()
    page.keyboard.press("Space")
    assert not page.locator("#toggles input").first.is_checked()


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


def test_filters_show_the_matching_samples(open_report, report_paths):
    report = open_report()
    page = report.page
    columns = page.evaluate("JSON.parse(document.getElementById('index').textContent).samples")
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def check(matches) -> None:
        expected = [row["key"] for row in rows if matches(row)]
        assert report.shown_keys() == expected
        assert page.locator("#count").text_content() == f"{len(expected)} of {len(rows)} samples"
        if expected:
            assert report.key in expected

    check(lambda row: True)
    page.locator("#text").fill("ONERROR")
    check(lambda row: "onerror" in row["key"])
    page.locator("#text").fill("_2")
    page.locator("#agreement").select_option("disagree")
    check(lambda row: "_2" in row["key"] and row["label"] != row["best"])
    page.locator("#text").fill("")
    page.locator("#agreement").select_option("agree")
    check(lambda row: row["label"] == row["best"])
    page.locator("#filters button").click()
    page.wait_for_function("count => document.querySelectorAll('#gallery li').length === count", arg=len(rows))
    check(lambda row: True)
    for index, name in enumerate(DISPLAYED_CLASSES):
        page.locator("#class").select_option(name)
        check(lambda row, index=index: index in (row["label"], row["best"]))
    page.locator("#class").select_option("")
    for number in {row["shown"] for row in rows}:
        page.locator("#shown").select_option(str(number))
        check(lambda row, number=number: row["shown"] == number)
    page.locator("#shown").select_option("")
    page.locator("#order").select_option("suspect")
    margins = {row["key"]: row["margin"] for row in rows}
    shown = [margins[key] for key in report.shown_keys()]
    assert shown == sorted(shown)
    assert shown[0] < 0
    page.locator("#text").fill("no such key")
    check(lambda row: False)


SHEET = ("key", "label", "best", "p_label", "p_best", "margin", "count")


@pytest.mark.parametrize("config", ["heatmaps", "topk", "maps"])
def test_the_sheet_shows_suspect_labels_by_button_click_and_key(open_report, config):
    page = open_report(config).page
    index = page.evaluate("JSON.parse(document.getElementById('index').textContent)")
    columns, classes = index["samples"], index["classes"]
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    suspects = sorted(
        (row for row in rows if row["best"] != row["label"] and row["margin"] < 0), key=lambda row: row["margin"]
    )
    assert len(suspects) > 5

    def check(position: int) -> None:
        row = suspects[position]
        expected = {
            "key": row["key"],
            "label": classes[row["label"]],
            "best": classes[row["best"]],
            "margin": f"{row['margin']:.2f}".replace("-", "\u2212"),
            "count": f"{position + 1} of {len(suspects)}",
        }
        for name in SHEET:  # everything is visible without hovering
            assert page.locator(f"#sheet-{name}").is_visible()
        assert {name: page.locator(f"#sheet-{name}").text_content() for name in expected} == expected
        assert page.locator("#sheet-p_label").text_content() == page.evaluate("p => percent(p)", row["p_label"])
        assert page.locator("#sheet-picture").is_visible() == (config != "maps")

    check(0)
    page.locator("#sheet-next").click()
    check(1)
    page.locator("#sheet-image").click()
    check(2)
    page.locator("#sheet-previous").click()
    check(1)
    position = 1
    for key, expected in (("ArrowRight", 2), ("End", len(suspects) - 1), ("ArrowRight", len(suspects) - 1),
                          ("ArrowLeft", len(suspects) - 2), ("Home", 0), ("ArrowLeft", 0), ("ArrowRight", 1)):  # fmt: skip
        page.keyboard.press(key)
        position = expected
        check(position)
    painted = page.evaluate("""() => {
        const {width, height} = document.getElementById("sheet-heatmap");
        return document.getElementById("sheet-heatmap").getContext("2d").getImageData(0, 0, width, height).data.some(Boolean);
    }""")
    assert painted


def test_the_sheet_opens_an_image_among_the_samples_despite_filters(open_report):
    report = open_report()
    page = report.page
    page.locator("#text").fill("no such key")
    assert report.shown_keys() == []
    page.locator("#sheet-next").click()
    key = page.locator("#sheet-key").text_content()
    page.locator("#sheet-open").click()
    page.wait_for_function("key => document.getElementById('key').textContent === key", arg=key)
    assert page.evaluate("document.activeElement.title") == key
    assert len(report.shown_keys()) == len(HostileImages().keys)


TWICE = """
window.IntersectionObserver = class extends IntersectionObserver {
  constructor(callback, options) { super((entries) => callback([...entries, ...entries]), options); }
};
"""


def test_thumbnails_are_drawn_once_even_if_reported_visible_several_times(open_report):
    page = open_report().page
    page.add_init_script(TWICE)  # as busy browsers do
    page.reload()
    page.wait_for_selector("#gallery img")
    counts = page.evaluate("[...document.querySelectorAll('.thumbnail')].map((thumbnail) => thumbnail.children.length)")
    assert set(counts) <= {0, 1}
    assert counts[0] == 1


def test_long_lists_draw_only_visible_thumbnails(open_report, tmp_path):
    count = 400
    build_many(tmp_path / "many", count)
    path = rd.report.write_report(tmp_path / "many", tmp_path / "report.html", num_crops=count, progress=False)
    report = open_report(path=path)
    page = report.page
    page.wait_for_selector("#gallery img")
    assert page.locator("#gallery li").count() < count / 2
    assert page.locator("#gallery img").count() < count / 4
    page.locator("#gallery [aria-selected=true]").focus()
    page.keyboard.press("End")
    last = page.locator("#gallery li").last
    assert report.key == last.get_attribute("title") == rd.LabelMaps(tmp_path / "many").index.key(count - 1)
    last.locator("img").wait_for()
    assert page.locator("#gallery img").count() < count / 2


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


CONTRASTS = """() => {
    const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
    const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
      .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const background = (element) => {
      for (let ancestor = element; ancestor; ancestor = ancestor.parentElement) {
        const color = rgb(getComputedStyle(ancestor).backgroundColor);
        if (color.length === 3 || color[3] === 1) return color;
      }
    };
    return [...document.querySelectorAll("body *")].filter((element) =>
      element.checkVisibility() && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())
      && !["SCRIPT", "OPTION"].includes(element.tagName.toUpperCase())
    ).map((element) => {
      const style = getComputedStyle(element);
      const [a, b] = [luminance(rgb(element instanceof SVGElement ? style.fill : style.color)), luminance(background(element))];
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.tagName, element.textContent.slice(0, 40)];
    });
}"""


@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("config", ["heatmaps", "maps"])
def test_the_page_fits_the_screen_and_has_enough_contrast(open_report, config, scheme, width):
    report = open_report(config, scheme=scheme, width=width)
    page = report.page
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("scrollTo(500, 0), scrollX") == 0
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = math.fsum(int(value) for value in background[4:-1].split(",")) / 3
    assert brightness > 200 if scheme == "light" else brightness < 60
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert [contrast for contrast in contrasts if contrast[0] < 4.5] == []
    assert page.locator("svg text").count() > 20
    if width == 375:  # large enough for touch
        small = page.evaluate("""
            [...document.querySelectorAll("button, select, .filters input, .numbers input, .handle, .toggles label")].filter(
              (control) => control.getBoundingClientRect().height < 28).map((control) => control.outerHTML)
        """)
        assert small == []


def test_statistics_are_shown_without_javascript(chromium, report_paths):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report_paths["heatmaps"].as_uri())
    assert page.locator("#browser").is_hidden()
    assert page.locator("noscript").inner_text().startswith("The samples need JavaScript")
    assert page.locator("svg").first.is_visible()
    context.close()
