"""Layout of the report page on narrow and wide screens, in light and dark mode."""

import math

import pytest

pytestmark = pytest.mark.slow

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

# Texts that are cut off, leave their element or the window, or cover each other. Pictures and drawn boxes may have texts on them.
TEXT_PROBLEMS = """() => {
    const problems = [];
    const boxes = [];
    const scrolls = (element) => ["auto", "scroll"].includes(getComputedStyle(element).overflowY);
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      const element = node.parentElement;
      if (!node.data.trim() || ["SCRIPT", "STYLE", "NOSCRIPT", "OPTION"].includes(element.tagName)) continue;
      if (!element.checkVisibility() || element.closest(".hidden, .skip, svg")) continue;
      const range = document.createRange();
      range.selectNodeContents(node);
      const text = node.data.trim().slice(0, 40);
      for (const box of range.getClientRects()) {
        if (box.width < 1) continue;
        const scroller = element.closest("#gallery, .scroll");
        if (!scroller && (box.left < 0 || box.right > innerWidth)) problems.push(["outside the window", text]);
        for (let parent = element; parent && !scrolls(parent); parent = parent.parentElement) {
          if (getComputedStyle(parent).display.startsWith("inline")) continue;
          const frame = parent.getBoundingClientRect();
          if (box.left < frame.left - 1 || box.right > frame.right + 1) problems.push([`outside ${parent.tagName}`, text]);
        }
        boxes.push({ box, text, element });
      }
    }
    const shared = (a, b, low, high) => Math.min(a[high], b[high]) - Math.max(a[low], b[low]);
    boxes.forEach(({ box, text, element }, i) => {
      for (const other of boxes.slice(i + 1)) {
        const isSplit = other.element === element || element.contains(other.element) || other.element.contains(element);
        if (isSplit || element.closest("#gallery, .scroll") !== other.element.closest("#gallery, .scroll")) continue;
        if (shared(box, other.box, "left", "right") > 1 && shared(box, other.box, "top", "bottom") > 3) problems.push(["overlap", text, other.text]);
      }
    });
    for (const element of document.querySelectorAll("body *")) {
      if (element.closest("svg, #gallery, .scroll, .clip, .hidden, .skip, select, input") || !element.checkVisibility()) continue;
      if (element.scrollWidth > element.clientWidth + 1 && getComputedStyle(element).overflowX !== "visible") {
        problems.push(["cut off", element.textContent.trim().slice(0, 40)]);
      }
      const { left, right, width } = element.getBoundingClientRect();
      if (width && (left < -0.5 || right > innerWidth + 0.5) && !element.closest("#stage")) problems.push(["element outside the window", element.className]);
    }
    for (const element of document.querySelectorAll(".scroll")) {
      if (element.scrollWidth > element.clientWidth + 1 && innerWidth < 640) problems.push(["scrolls sideways", element.getAttribute("aria-label")]);
    }
    return { problems, count: boxes.length };
}"""


@pytest.mark.parametrize("width", [390, 1400])
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
    if width == 390:  # large enough for touch
        small = page.evaluate("""
            [...document.querySelectorAll("button, select, .filters input, .numbers input, .handle, .toggles label")].filter(
              (control) => control.getBoundingClientRect().height < 28).map((control) => control.outerHTML)
        """)
        assert small == []


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("config", ["heatmaps", "topk", "maps"])
def test_no_text_is_cut_off_or_covered(open_report, config, width):
    page = open_report(config, width=width).page
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    found = page.evaluate(TEXT_PROBLEMS)
    assert found["count"] > 200
    assert found["problems"] == []


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ("h1 { white-space: nowrap; width: 3000px; }", "element outside the window"),
        (".name { overflow: hidden; white-space: nowrap; }", "cut off"),
        ("#about { margin-top: -1.5rem; }", "overlap"),
        (".facts dt { white-space: nowrap; letter-spacing: 3em; }", "outside DIV"),
    ],
)
def test_misplaced_texts_are_found(open_report, rule, problem):
    page = open_report(width=390).page
    page.evaluate("rule => document.querySelector('style').append(rule)", rule)
    assert problem in {kind for kind, *_ in page.evaluate(TEXT_PROBLEMS)["problems"]}
