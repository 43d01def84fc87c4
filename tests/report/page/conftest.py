"""Reports that are opened in Chromium."""

import pytest

import relabel_datasets as rd
from tests.report.browser import Report, start_chromium


@pytest.fixture(scope="package")
def chromium():
    with start_chromium() as browser:
        yield browser


@pytest.fixture(scope="package")
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
