"""A dataset whose names try to inject code into a page, and a parser of report pages."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import torch

import relabel_datasets as rd
from relabel_datasets.words import printable
from tests.conftest import picture

CLASSES = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "\"><svg onload='window.hacked = 1'>",
    "a & b &amp; 'c' \"d\"",
    "$x$ and $\\frac$",
    "{{ 7 * 7 }}{% raw %}",
    "<!-- <script>",
    "__proto__",
    "constructor",
    "火山 ☃",
    "id=\"x\" url(#y) #000000",
    "]]> \u2028 line",
)  # fmt: skip
DISPLAYED_CLASSES = tuple(map(printable, CLASSES))
SIZES = ((40, 56), (48, 32), (61, 61))


class HostileImages:
    """Two images per class, of different sizes, with hostile keys."""

    classes = CLASSES
    extension = "jpg"
    key_rule = None

    def __init__(self) -> None:
        self.labels = [i % len(CLASSES) for i in range(2 * len(CLASSES))]
        names = (
            "</script><script>hacked = 1</script>", "'\"><img src=x onerror=hacked=1>", "a&lt;b", "</title><b>", "{{ key }}"
        )  # fmt: skip
        self.keys = [f"{names[i % len(names)]}_{i:02d}" for i in range(len(self.labels))]

    def read(self, index: int) -> bytes:
        data = io.BytesIO()
        picture(index, SIZES[index % len(SIZES)]).save(data, "JPEG")
        return data.getvalue()

    def name(self, index: int) -> str:
        return self.keys[index]


class RandomNet(torch.nn.Module):
    """A fully convolutional classifier with random weights; its maps vary between locations."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Conv2d(3, len(CLASSES), 8, 8)
        torch.nn.init.normal_(self.net.weight, std=0.4, generator=torch.Generator().manual_seed(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)


def build_hostile(root: Path) -> Path:
    """Build a dataset with one config per encoding, `heatmaps` and `topk`, and the label-only config `maps`."""
    annotator = rd.ModuleAnnotator(RandomNet(), (56, 40), classes=CLASSES, name="<i>annotator</i>")
    for config, build_config in (
        ("heatmaps", rd.annotate.BuildConfig()),
        ("topk", rd.annotate.BuildConfig(encoding="topk")),
        ("maps", rd.annotate.BuildConfig(images=False)),
    ):
        rd.build(HostileImages(), root, annotator, config=config, build_config=build_config, progress=False)
    return root


class Page(HTMLParser):
    """Content of an HTML file.

    Attributes:
        tags: Name and attributes of each element, in order.
        scripts: Texts of the executable script elements.
        data: Parsed content of the JSON elements by id.
        texts: All other texts.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.data: dict[str, object] = {}
        self.texts: list[str] = []
        self._inside: tuple[str, dict[str, str | None]] | None = None
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._inside = self.tags[-1]

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._inside = None

    def handle_data(self, data):
        if self._inside is None:
            self.texts.append(data)
        elif self._inside[1].get("type") == "application/json":
            self.data[self._inside[1]["id"]] = json.loads(data)
        elif self._inside[0] == "script":
            self.scripts.append(data)


def build_many(root: Path, count: int) -> None:
    """Build a dataset of many small images."""

    class Many(HostileImages):
        def __init__(self) -> None:
            self.labels = [i % len(CLASSES) for i in range(count)]
            self.keys = [f"image_{i:05d}" for i in range(count)]

    annotator = rd.ModuleAnnotator(RandomNet(), (56, 40), classes=CLASSES, name="random")
    rd.build(Many(), root, annotator, config="many", progress=False)
