"""Open report pages in the headless Chromium of the system."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page, sync_playwright

import relabel_datasets as rd

_ARGUMENTS = (  # for root, without a GPU, without network access
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
EDGES = ("left", "top", "right", "bottom")


@contextmanager
def start_chromium() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        message = "requires Chromium: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_ARGUMENTS)
        yield browser
        browser.close()


class Report:
    """An open report page, with the actions of a user and the displayed values."""

    def __init__(self, page: Page, path: Path) -> None:
        self.page, self._path = page, path
        self.messages: list[str] = []  # of the console and dialogs, including script errors
        self.requests: list[str] = []
        page.on("console", lambda message: self.messages.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.messages.append(f"error: {error}"))
        page.on("dialog", lambda dialog: self.messages.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(path.as_uri())

    def check_safe(self) -> None:
        """Assert that no script failed, no injected script ran, and no server was contacted."""
        assert self.messages == []
        assert {url for url in self.requests if not url.startswith("data:image/jpeg;base64,")} == {self._path.as_uri()}
        assert self.page.evaluate("'hacked' in window") is False

    @property
    def key(self) -> str:
        return self.page.locator("#key").text_content()

    @property
    def box(self) -> list[float]:
        return [float(value) for value in self.page.locator("#box").get_attribute("data-box").split()]

    def set_box(self, *percent: float) -> None:
        """Type the four edges in percent."""
        for edge, value in zip(EDGES, percent, strict=True):
            self.page.locator(f"#{edge}").fill(str(value))
            self.page.locator(f"#{edge}").press("Enter")

    def label(self) -> list[tuple[int, float, str, str]]:
        """Return (index, probability, name, displayed probability) of the classes of the label, in order."""
        return [
            tuple(row)
            for row in self.page.evaluate("""
                [...document.querySelectorAll("#label li")].map((row) => [
                  Number(row.dataset.class), Number(row.querySelector("data").value), row.querySelector(".name").textContent,
                  row.querySelector("data").textContent])
            """)
        ]

    def shown_keys(self) -> list[str]:
        return self.page.evaluate("[...document.querySelectorAll('#gallery li')].map((option) => option.title)")

    def middle(self, selector: str) -> tuple[float, float]:
        box = self.page.locator(selector).bounding_box()
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def drag(self, start: tuple[float, float], dx: float, dy: float) -> None:
        """Drag the mouse by fractions of the size of the image."""
        size = self.page.locator("#stage").bounding_box()
        self.page.mouse.move(*start)
        self.page.mouse.down()
        self.page.mouse.move(start[0] + dx * size["width"] / 2, start[1] + dy * size["height"] / 2)
        self.page.mouse.move(start[0] + dx * size["width"], start[1] + dy * size["height"])
        self.page.mouse.up()

    def check_label(self, label_map: rd.LabelMap, classes: tuple[str, ...]) -> None:
        """Assert that the displayed label equals `pool_labels` for the displayed box."""
        soft = rd.pool_labels(
            label_map.logits[None],
            label_map.classes[None],
            torch.tensor([self.box]),
            num_classes=label_map.num_classes,
            base=None if label_map.base is None else label_map.base[None],
        )[0]
        shown = self.label()
        assert 8 <= len(shown) <= 9
        assert label_map.label in [index for index, *_ in shown]
        best = soft.topk(8).values.tolist()
        assert [probability for _, probability, *_ in shown[:8]] == pytest.approx(best, abs=1e-3)
        for index, probability, name, text in shown:
            assert probability == pytest.approx(float(soft[index]), abs=1e-3), (self.box, name)
            assert name == classes[index]
            assert text == f"{100 * probability:.1f}%" or abs(100 * probability * 10 % 1 - 0.5) < 1e-6
