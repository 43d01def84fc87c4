"""Crops of the report page: by number, mouse, touch and keyboard."""

import pytest

import relabel_datasets as rd
from tests.report.pages import DISPLAYED_CLASSES

pytestmark = pytest.mark.slow

BOXES = [  # in percent of the image
    (0, 0, 100, 100), (0, 0, 1, 1), (99, 99, 100, 100), (0, 37, 100, 38), (14.3, 0, 42.9, 100), (20, 20, 60, 80),
    (33.3, 66.6, 34.5, 71), (50, 50, 51, 51), (7.25, 0, 93.5, 12.5), (28.5714, 20, 57.1429, 60),
]  # fmt: skip


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

    report.set_box(20, 20, 80, 80)
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
    report.set_box(20, 20, 80, 80)
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

    report.set_box(20, 20, 80, 80)
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
    page.keyboard.press("Home")
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
