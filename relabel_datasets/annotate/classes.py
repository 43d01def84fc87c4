"""Match the classes of a dataset with those of an annotator by name."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from timm.data.imagenet_info import ImageNetInfo

_NUM_SHOWN = 5  # classes listed in an error
_NUM_PAIRS = 20  # classes listed in a log message


def match_classes(
    annotator_classes: Sequence[str] | None,
    dataset_classes: Sequence[str],
    mapping: Mapping[str, str | int] | None = None,
    num_classes: int | None = None,
) -> list[int]:
    """Find the class of an annotator for each class of a dataset.

    A class is looked up in `mapping`, then by its exact name, then by human-readable names. The latter ignore case and treat
    `_`, `-` and spaces alike. An ImageNet synset has all names of WordNet, such as "church, church building". A match of the
    full text has priority over a match of the first name, which has priority over a match of any name.

    Args:
        annotator_classes: Names or synsets in the order of the annotator's logits, or None if unknown. In that case the number
            of classes must be that of the dataset, and the classes are assumed to be the same in the same order. The order
            must be unambiguous, see `check_order`.
        dataset_classes: Names or synsets in the order of the labels of the dataset.
        mapping: Annotator class, by name or index, of each dataset class whose name does not match. Default: none.
        num_classes: Number of classes of the annotator. Required if `annotator_classes` is None.

    Returns:
        Class index of the annotator for each class of the dataset.

    Raises:
        ValueError: A class has no match or several, two classes have the same match, or `mapping` has an unknown class. The
            message lists the classes and similar names.

    Example:
        >>> match_classes(("n01440764", "n03028079"), ("church", "tench"))
        [1, 0]
    """
    num_rows = num_classes if annotator_classes is None else len(annotator_classes)
    if num_rows is None:
        raise ValueError("num_classes must be given if the names of the annotator's classes are unknown")
    rows = _mapped_rows(mapping or {}, annotator_classes, dataset_classes, num_rows)
    unmapped = [name for name in dataset_classes if name not in rows]
    if annotator_classes is not None:
        rows.update(_rows_by_name(annotator_classes, unmapped))
    elif not mapping and num_rows == len(dataset_classes):
        check_order(dataset_classes)
        return list(range(num_rows))
    elif unmapped:
        raise ValueError(
            f"the annotator's {num_rows} classes have no names, so {len(unmapped)} of the dataset's "
            f"{len(dataset_classes)} classes cannot be matched: name the annotator's classes with classes=, or "
            "give the index of each class with class_mapping="
        )
    matches = [rows[name] for name in dataset_classes]
    _check_distinct(matches, dataset_classes)
    return matches


def check_order(dataset_classes: Sequence[str]) -> None:
    """Check that training code can have numbered these classes in one order only.

    torchvision and `datasets` sort class folders by code point: 0, 1, 10, 11, 2. timm sorts numbers by value and ignores case:
    0, 1, 2, 10, 11. Names in neither order, as in a `ClassLabel`, are in an explicit order.

    Args:
        dataset_classes: Names in the order of the labels of the dataset.

    Raises:
        ValueError: torchvision and timm order these classes differently.
    """
    by_number = sorted(dataset_classes, key=_natural_key)
    if list(dataset_classes) == by_number or list(dataset_classes) != sorted(dataset_classes):
        return
    row = next(row for row, name in enumerate(dataset_classes) if name != by_number[row])
    raise ValueError(
        "the annotator's classes have no names, and the order of the dataset's classes is ambiguous: row "
        f"{row} of the annotator is {dataset_classes[row]!r} if it was trained with torchvision's order "
        f"({_listed(dataset_classes)}), but {by_number[row]!r} with timm's order ({_listed(by_number)}). Name the "
        "annotator's classes in the order of its logits with classes=, or give the index of each class "
        "with class_mapping="
    )


def describe_pairs(dataset_classes: Sequence[str], rows: Sequence[int]) -> str:
    """Format the dataset class of each row of the annotator, abbreviated if there are many.

    Args:
        dataset_classes: Names in the order of the labels of the dataset.
        rows: Class index of the annotator for each class.

    Returns:
        Text such as `0 = 'cat', 1 = 'dog'`.
    """
    pairs = [f"{row} = {name!r}" for name, row in zip(dataset_classes, rows, strict=True)]
    return ", ".join(pairs if len(pairs) <= _NUM_PAIRS else [*pairs[: _NUM_PAIRS - 1], "...", pairs[-1]])


def _natural_key(name: str) -> list[int | str]:
    """Return the sort key of a class folder in timm, see `timm.utils.misc.natural_key`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def _mapped_rows(
    mapping: Mapping[str, str | int],
    annotator_classes: Sequence[str] | None,
    dataset_classes: Sequence[str],
    num_rows: int,
) -> dict[str, int]:
    """Return the rows of the classes in the user's mapping."""
    if unknown := sorted(set(mapping) - set(dataset_classes)):
        raise ValueError(f"mapping has classes that the dataset does not have: {_listed(unknown)}")
    rows = {}
    for name, target in mapping.items():
        if isinstance(target, int):
            if not 0 <= target < num_rows:
                raise ValueError(f"mapping of {name!r} must be an index in 0 .. {num_rows - 1}, got {target}")
            rows[name] = target
        elif annotator_classes is None or target not in annotator_classes:
            close = difflib.get_close_matches(target, annotator_classes or (), n=3)
            raise ValueError(
                f"mapping of {name!r} must be a class of the annotator or its index, got {target!r}{_hint(close)}"
            )
        else:
            rows[name] = annotator_classes.index(target)
    return rows


def _rows_by_name(annotator_classes: Sequence[str], wanted: Sequence[str]) -> dict[str, int]:
    """Return the row of every wanted class."""
    if not set(wanted) - set(annotator_classes) and len(set(annotator_classes)) == len(annotator_classes):
        exact = {name: row for row, name in enumerate(annotator_classes)}
        return {name: exact[name] for name in wanted}  # without loading the words of WordNet, which is slow
    words = class_words([*annotator_classes, *wanted])
    tables = _tables(annotator_classes, words)
    candidates = {name: _candidates(name, words[name], annotator_classes, tables) for name in wanted}
    unclear = [name for name, rows in candidates.items() if len(rows) != 1]
    if unclear:
        reasons = []
        for name in unclear[:_NUM_SHOWN]:
            if candidates[name]:
                options = [
                    f"{row} ({annotator_classes[row]}: {words[annotator_classes[row]]})" for row in candidates[name]
                ]
                reasons.append(f"{name!r} may be {' or '.join(options[:_NUM_SHOWN])}")
            else:
                reasons.append(f"{name!r} is none of them{_hint(_close_to(words[name], tables[-1]))}")
        more = f"; and {len(unclear) - _NUM_SHOWN} more" if len(unclear) > _NUM_SHOWN else ""
        raise ValueError(
            f"{len(unclear)} of {len(wanted)} classes of the dataset cannot be matched with the annotator's "
            f"{len(annotator_classes)} classes: {'; '.join(reasons)}{more}. Give the annotator's class, or its index, for "
            "each with class_mapping="
        )
    return {name: rows[0] for name, rows in candidates.items()}


def candidate_rows(classes: Sequence[str], wanted: Sequence[str]) -> dict[str, list[int]]:
    """Find all rows that each name may refer to, with the rules of `match_classes`.

    Args:
        classes: Names or synsets of the rows.
        wanted: Names or synsets to look up.

    Returns:
        Matching rows of each wanted name. A name may have none or several.
    """
    words = class_words([*classes, *wanted])
    tables = _tables(classes, words)
    return {name: _candidates(name, words[name], classes, tables) for name in wanted}


def _tables(classes: Sequence[str], words: Mapping[str, str]) -> list[dict[str, list[int]]]:
    """Return the rows by name, one table per form of the names, see `_forms`."""
    tables: list[dict[str, list[int]]] = [defaultdict(list) for _ in range(4)]
    for row, name in enumerate(classes):
        for table, forms in zip(tables, _forms(name, words[name]), strict=True):
            for form in forms:
                table[form].append(row)
    return tables


def _candidates(
    name: str, words: str, annotator_classes: Sequence[str], tables: Sequence[Mapping[str, list[int]]]
) -> list[int]:
    """Return the rows that match a class by the first form of its name that has any match."""
    for priority, (table, forms) in enumerate(zip(tables, _forms(name, words), strict=True)):
        rows = {row for form in forms for row in table.get(form, ())}
        if priority > 0 and is_synset(name):  # two synsets are different classes even if they share a word
            rows = {row for row in rows if not is_synset(annotator_classes[row])}
        if rows:
            return sorted(rows)
    return []


def _forms(name: str, words: str) -> tuple[set[str], set[str], set[str], set[str]]:
    """Return the forms of a class name by priority: the exact name; normalized, all words, the first word, and any word."""
    normalized = [_normalized(word) for word in words.split(",")]
    return {name}, {_normalized(words)}, {normalized[0]}, set(normalized)


def _normalized(name: str) -> str:
    return re.sub(r"[_\-\s]+", " ", unicodedata.normalize("NFC", name)).strip().casefold()


def is_synset(name: str) -> bool:
    """Check whether a class name is a WordNet synset.

    Args:
        name: Class name.

    Returns:
        Whether the name has the form of a synset, such as `n01440764`.
    """
    return re.fullmatch(r"n\d{8}", name) is not None


def class_words(names: Iterable[str]) -> dict[str, str]:
    """Look up the words of WordNet for synsets.

    Args:
        names: Names or synsets.

    Returns:
        Comma-separated words of each synset. Other names are mapped to themselves.
    """
    words = {name: name for name in names}
    synsets = list(filter(is_synset, words))
    if synsets:
        from timm.data.imagenet_info import ImageNetInfo  # slow import

        info = ImageNetInfo()
        words.update({synset: _lemmas(info, synset) for synset in synsets})
    return words


def _lemmas(info: ImageNetInfo, synset: str) -> str:
    try:
        return info.label_name_to_description(synset)
    except KeyError:
        return synset  # not a synset of ImageNet


def _check_distinct(rows: Sequence[int], dataset_classes: Sequence[str]) -> None:
    first: dict[int, str] = {}
    for row, name in zip(rows, dataset_classes, strict=True):
        if row in first:
            raise ValueError(
                f"the dataset's classes {first[row]!r} and {name!r} are both the annotator's class {row}: give each its own "
                "class with class_mapping="
            )
        first[row] = name


def _close_to(words: str, known: Iterable[str]) -> list[str]:
    options = list(known)
    return [close for word in words.split(",") for close in difflib.get_close_matches(_normalized(word), options, n=2)]


def _hint(close: Sequence[str]) -> str:
    return f" (did you mean {_listed(close[:3])}?)" if close else ""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return ", ".join(repr(name) for name in names[:_NUM_SHOWN]) + more
