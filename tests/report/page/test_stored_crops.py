"""The page of stored crops in a browser."""

import pytest

import relabel_datasets as rd
from tests.report.pages import CLASSES, DISPLAYED_CLASSES, HostileImages, RandomNet

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A dataset of stored crops, with its report."""
    folder = tmp_path_factory.mktemp("crops")
    annotator = rd.ModuleAnnotator(RandomNet(), (56, 40), classes=CLASSES, name="random")
    crops = rd.annotate.BuildConfig(encoding="crops", num_crops=6)
    rd.build(HostileImages(), folder / "data", annotator, build_config=crops, progress=False)
    rd.report.write_report(folder / "data", folder / "data" / "report.html", num_samples=4, progress=False)
    return folder / "data"


def test_the_page_opens_on_the_sample_and_the_crop_of_the_index(open_report, dataset):
    report = open_report(path=dataset / "report.html")
    index = report.page.evaluate("JSON.parse(document.getElementById('index').textContent)")
    sample, crop = index["opening"]["sample"], index["opening"]["crop"]
    assert report.key == index["samples"]["key"][sample]
    assert report.page.locator("#gallery [aria-selected=true]").get_attribute("title") == report.key
    assert report.page.locator("#boxes rect.selected").get_attribute("data-crop") == str(crop)
    assert report.page.locator("#label-title").text_content().startswith(f"Label of crop {crop + 1} of 6")


def test_a_click_on_a_stored_box_shows_its_crop_and_label(open_report, dataset):
    page = open_report(path=dataset / "report.html").page
    label_maps = rd.LabelMaps(dataset)
    for position in (2, 0):
        page.locator("#gallery li").nth(position).click()
        labels = label_maps[page.locator("#key").text_content()]
        for crop in range(6):
            page.locator(f'#boxes rect[data-crop="{crop}"]').dispatch_event("click")
            mirrored = ", mirrored" if labels.flips[crop] else ""
            assert page.locator("#label-title").text_content() == f"Label of crop {crop + 1} of 6{mirrored}"
            rows = page.locator("#label li").all()
            shown = {int(r.get_attribute("data-class")): float(r.locator("data").get_attribute("value")) for r in rows}
            soft = labels.soft_labels([crop])[0]
            assert len(shown) == 5
            assert all(float(soft[index]) == pytest.approx(p, abs=1e-4) for index, p in shown.items())
        page.locator("#mean").click()
        assert page.locator("#label-title").text_content() == "Mean label of 6 crops"
    page.locator("#next").click()
    assert page.locator("#label-title").text_content().startswith("Label of crop 2 of 6")
    rows = rd.analysis.analyze(dataset, progress=False).tables["suspects"].rows
    page.locator("#sheet-next").click()
    texts = {name: page.locator(f"#sheet-{name}").text_content() for name in ("key", "label", "best", "count")}
    shown = DISPLAYED_CLASSES[CLASSES.index(rows[1][1])], DISPLAYED_CLASSES[CLASSES.index(rows[1][2])]
    assert texts == {"key": rows[1][0], "label": shown[0], "best": shown[1], "count": f"2 of {len(rows)}"}
    page.locator("#sheet-open").click()
    assert page.locator("#key").text_content() == rows[1][0]
    page.locator("#order").select_option("suspect")
    assert page.locator("#gallery li").first.get_attribute("title") == rows[0][0]
