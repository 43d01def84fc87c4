"""Legible names of classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..annotate.classes import class_words
from ..words import printable


def legible_names(classes: Sequence[str]) -> tuple[str, ...]:
    """Return a unique, legible name for each class.

    An ImageNet synset is replaced by its first word in WordNet. If another class has the same first word, all words are used;
    if these are not unique either, the synset is added. Other classes keep their names. Control characters are escaped, see
    `printable`, because SVG files and pictures cannot hold them.

    Args:
        classes: Synsets or names.

    Returns:
        The legible names in the same order.

    Example:
        >>> legible_names(["n01440764", "n02012849", "n03126707", "striped_star"])
        ('tench', 'crane (n02012849)', 'crane (n03126707)', 'striped_star')
    """
    words = class_words(classes)
    full = [words[name] for name in classes]
    first = [name if text == name else text.split(",")[0] for name, text in zip(classes, full, strict=True)]
    num_first, num_full = Counter(first), Counter(full)
    return tuple(
        printable(short if num_first[short] == 1 else text if num_full[text] == 1 else f"{short} ({name})")
        for name, short, text in zip(classes, first, full, strict=True)
    )
