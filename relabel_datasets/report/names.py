"""Names of classes that people can read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..annotate.classes import class_words
from ..words import printable


def legible_names(classes: Sequence[str]) -> tuple[str, ...]:
    """Return a name for people of each class, all different: the first word that WordNet has for an ImageNet synset.

    All its words where the first alone is another class's, too; and the synset itself where that is not enough. Classes
    that are no synsets keep their names, with control characters escaped, see `printable`: neither SVG nor a picture can
    hold them.

    Example:
        >>> legible_names(["n01440764", "n02012849", "n03126707", "striped_star"])
        ('tench', 'crane (n02012849)', 'crane (n03126707)', 'striped_star')
    """
    words = class_words(classes)
    full = [words[name] for name in classes]
    first = [name if text == name else text.split(",")[0] for name, text in zip(classes, full, strict=True)]
    times_first, times_full = Counter(first), Counter(full)
    return tuple(
        printable(short if times_first[short] == 1 else text if times_full[text] == 1 else f"{short} ({name})")
        for name, short, text in zip(classes, first, full, strict=True)
    )
