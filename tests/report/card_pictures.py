"""Draw the pictures of the guides that show `scenes-relabel`: `python tests/report/card_pictures.py cards`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from browser import Report, start_chromium  # this folder is on the path of its scripts
from PIL import Image

import relabel_datasets as rd
from relabel_datasets.report.pictures import draw_pictures

SPLIT, KEY = "validation", "validation_00179"  # the sample that the report of this split opens on
SIZE = (1200, 1100)  # of the window, in pixels


def main(folder: Path) -> None:
    """Write `scene.png` and `report.png` to a folder."""
    with tempfile.TemporaryDirectory() as name:
        dataset = rd.load_dataset("scenes-relabel", split=SPLIT)
        figure = draw_pictures(dataset, Path(name), keys=[KEY], progress=False)[0]
        _optimize(figure, folder / "scene.png")
        page = rd.report.write_report("scenes-relabel", Path(name) / "report.html", split=SPLIT, progress=False)
        screenshot = Path(name) / "report.png"
        _photograph(page, screenshot)
        _optimize(screenshot, folder / "report.png")


def _photograph(page: Path, out: Path) -> None:
    """Write a picture of the samples of a report."""
    with start_chromium() as chromium:
        context = chromium.new_context(viewport={"width": SIZE[0], "height": SIZE[1]}, color_scheme="light")
        report = Report(context.new_page(), page)
        report.page.wait_for_selector("#gallery img")
        report.page.wait_for_timeout(500)  # until all visible thumbnails are drawn
        report.page.evaluate("document.getElementById('samples').scrollIntoView()")
        top, height = (report.page.locator("#samples").bounding_box()[side] for side in ("y", "height"))
        clip = {"x": 0, "y": top, "width": SIZE[0], "height": height + 12}
        report.page.screenshot(path=out, clip=clip)
        report.check_safe()


def _optimize(picture: Path, out: Path) -> None:
    """Copy a picture in fewer bytes. It keeps all colors: with fewer, those of several classes would be the same."""
    with Image.open(picture) as image:
        image.convert("RGB").save(out, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
