"""The sheet of suspect labels of the report page."""

import pytest

from tests.report.pages import HostileImages

pytestmark = pytest.mark.slow

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
