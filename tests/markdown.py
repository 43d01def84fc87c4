"""Pages of documentation taken apart: their prose, their blocks of code, links and anchors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple


class Block(NamedTuple):
    """A block of code."""

    page: Path
    language: str
    line: int  # of its first line, from 1
    heading: int  # line of the heading above, 0 if there is none
    code: str


def read_page(page: Path) -> tuple[str, list[Block]]:
    """Return the prose of a page, in which code lines are empty, and its blocks of code."""
    prose, blocks = [], []
    fence, start, heading = None, 0, 0
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if line.startswith("```"):
            if fence is None:
                fence, start = line.removeprefix("```"), number
            else:
                code = "\n".join(lines[start : number - 1]) + "\n"
                blocks.append(Block(page, fence, start + 1, heading, code))
                fence = None
            prose.append("")
        elif fence is not None:
            prose.append("")
        else:
            heading = number if line.startswith("#") else heading
            prose.append(line)
    assert fence is None, f"{page}: the block that starts in line {start} has no end"
    return "\n".join(prose), blocks


def links_of(page: Path) -> list[str]:
    """Return the relative links and images of a page."""
    prose = re.sub(r"`[^`\n]*`", "", read_page(page)[0])
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"(?m)^#+ (.*)$", read_page(page)[0])
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tables_of(page: Path) -> list[list[str]]:
    """Return the rows of each table of a page."""
    return [table.splitlines() for table in re.findall(r"(?m)((?:^\|.*\n)+)", read_page(page)[0] + "\n")]
