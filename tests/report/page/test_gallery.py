"""The list of samples of the report page, and its filters."""

import pytest

import relabel_datasets as rd
from tests.report.pages import DISPLAYED_CLASSES, build_many

pytestmark = pytest.mark.slow

TWICE = """
window.IntersectionObserver = class extends IntersectionObserver {
  constructor(callback, options) { super((entries) => callback([...entries, ...entries]), options); }
};
"""


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


def test_thumbnails_are_drawn_once_even_if_reported_visible_several_times(open_report):
    page = open_report().page
    page.add_init_script(TWICE)  # as busy browsers do
    page.reload()
    page.wait_for_selector("#gallery img")
    counts = page.evaluate("[...document.querySelectorAll('.thumbnail')].map((thumbnail) => thumbnail.children.length)")
    assert set(counts) <= {0, 1}
    assert sum(counts) > 0


def test_long_lists_draw_only_visible_thumbnails(open_report, tmp_path):
    count = 400
    build_many(tmp_path / "many", count)
    path = rd.report.write_report(tmp_path / "many", tmp_path / "report.html", num_crops=count, progress=False)
    report = open_report(path=path)
    page = report.page
    page.locator("#gallery [aria-selected=true]").focus()
    page.keyboard.press("Home")
    page.locator("#text").fill("image")  # builds the list again
    page.wait_for_selector("#gallery img")
    assert page.locator("#gallery li").count() < count / 2
    assert page.locator("#gallery img").count() < count / 4
    page.locator("#gallery [aria-selected=true]").focus()
    page.keyboard.press("End")
    last = page.locator("#gallery li").last
    assert report.key == last.get_attribute("title") == rd.LabelMaps(tmp_path / "many").index.key(count - 1)
    last.locator("img").wait_for()
    assert page.locator("#gallery img").count() < count / 2
