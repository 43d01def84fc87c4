"""Which class of an annotator is which class of a dataset, by name."""

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
_NUM_PAIRS = 20  # classes listed in a message


def match_classes(
    annotator_classes: Sequence[str] | None,
    dataset_classes: Sequence[str],
    mapping: Mapping[str, str | int] | None = None,
    num_classes: int | None = None,
) -> list[int]:
    """Return, for each class of a dataset, the index of the annotator's class that it is.

    A class is looked for in `mapping`, then by its exact name. Failing that, it is looked for by human names, whatever
    their case and with `_`, `-` and spaces alike: an ImageNet synset has all the names that WordNet gives it, such as
    "church, church building". The whole text counts before its first name, and that before any of its names.

    Args:
        annotator_classes: names or synsets in the order of the annotator's logits, or None where they are unknown: as
            many classes as the dataset's are then taken to be the same, in the same order. That order must be clear, see
            `check_order`.
        dataset_classes: names or synsets in the order of the dataset's labels.
        mapping: dataset class -> the annotator's class, or its index, for classes whose names do not tell.
        num_classes: of the annotator, needed where `annotator_classes` is None.

    Raises:
        ValueError: a class has no or several matches, two classes have the same one, or `mapping` names what there is
            not. The message lists the classes, close names, and what to do.

    Example:
        >>> match_classes(("n01440764", "n03028079"), ("church", "tench"))
        [1, 0]
    """
    num_rows = num_classes if annotator_classes is None else len(annotator_classes)
    if num_rows is None:
        raise ValueError("num_classes must be given where the names of the annotator's classes are unknown")
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
            f"{len(dataset_classes)} cannot be found among them: name them, or give the index of each in mapping"
        )
    found = [rows[name] for name in dataset_classes]
    _check_distinct(found, dataset_classes)
    return found


def check_order(dataset_classes: Sequence[str]) -> None:
    """Raise ValueError if training code may have numbered these classes in another order.

    Class folders are sorted by code point in torchvision and `datasets`, which gives 0, 1, 10, 11, 2; timm sorts numbers by
    value and ignores case, which gives 0, 1, 2, 10, 11. Names in neither order, as in a `ClassLabel`, are in an explicit order.
    """
    by_number = sorted(dataset_classes, key=_natural_key)
    if list(dataset_classes) == by_number or list(dataset_classes) != sorted(dataset_classes):
        return
    row = next(row for row, name in enumerate(dataset_classes) if name != by_number[row])
    raise ValueError(
        "the annotator's classes have no names, and the order of the dataset's is ambiguous: row "
        f"{row} of the annotator is {dataset_classes[row]!r} if it was trained with torchvision's order "
        f"({_listed(dataset_classes)}), but {by_number[row]!r} with timm's or by number ({_listed(by_number)}). Name the "
        "annotator's classes in the order of its logits (classes=, --classes-file), or give the index of each class "
        "(class_mapping=, --class-mapping)"
    )


def describe_pairs(dataset_classes: Sequence[str], rows: Sequence[int]) -> str:
    """Return which class of the dataset each row of the annotator is; of many, the first and the last."""
    pairs = [f"{row} = {name!r}" for name, row in zip(dataset_classes, rows, strict=True)]
    return ", ".join(pairs if len(pairs) <= _NUM_PAIRS else [*pairs[: _NUM_PAIRS - 1], "...", pairs[-1]])


def _natural_key(name: str) -> list[int | str]:
    """Return timm's sort key of a class folder, see `timm.utils.misc.natural_key`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def _mapped_rows(
    mapping: Mapping[str, str | int],
    annotator_classes: Sequence[str] | None,
    dataset_classes: Sequence[str],
    num_rows: int,
) -> dict[str, int]:
    """Return the rows of the classes that the user has mapped."""
    if unknown := sorted(set(mapping) - set(dataset_classes)):
        raise ValueError(f"mapping is for classes that the dataset does not have: {_listed(unknown)}")
    rows = {}
    for name, target in mapping.items():
        if isinstance(target, int):
            if not 0 <= target < num_rows:
                raise ValueError(f"mapping gives {name!r} the index {target}, but there are 0 .. {num_rows - 1}")
            rows[name] = target
        elif annotator_classes is None or target not in annotator_classes:
            close = difflib.get_close_matches(target, annotator_classes or (), n=3)
            raise ValueError(f"mapping gives {name!r} the class {target!r}, which the annotator has not{_hint(close)}")
        else:
            rows[name] = annotator_classes.index(target)
    return rows


def _rows_by_name(annotator_classes: Sequence[str], wanted: Sequence[str]) -> dict[str, int]:
    """Return the row of every wanted class."""
    if not set(wanted) - set(annotator_classes) and len(set(annotator_classes)) == len(annotator_classes):
        exact = {name: row for row, name in enumerate(annotator_classes)}
        return {name: exact[name] for name in wanted}  # without the words of WordNet, which take a while to load
    words = class_words([*annotator_classes, *wanted])
    tables = _tables(annotator_classes, words)
    candidates = {name: _candidates(name, words[name], annotator_classes, tables) for name in wanted}
    unclear = [name for name, rows in candidates.items() if len(rows) != 1]
    if unclear:
        reasons = []
        for name in unclear[:_NUM_SHOWN]:
            if candidates[name]:
                several = [
                    f"{row} ({annotator_classes[row]}: {words[annotator_classes[row]]})" for row in candidates[name]
                ]
                reasons.append(f"{name!r} may be {' or '.join(several[:_NUM_SHOWN])}")
            else:
                reasons.append(f"{name!r} is none of them{_hint(_close_to(words[name], tables[-1]))}")
        more = f"; and {len(unclear) - _NUM_SHOWN} more" if len(unclear) > _NUM_SHOWN else ""
        raise ValueError(
            f"{len(unclear)} of {len(wanted)} classes of the dataset cannot be found among the annotator's "
            f"{len(annotator_classes)}: {'; '.join(reasons)}{more}. Give their annotator class, or its index, in mapping"
        )
    return {name: rows[0] for name, rows in candidates.items()}


def candidate_rows(classes: Sequence[str], wanted: Sequence[str]) -> dict[str, list[int]]:
    """Return the rows of `classes` that each wanted name may be, compared as in `match_classes`; none or several may fit."""
    words = class_words([*classes, *wanted])
    tables = _tables(classes, words)
    return {name: _candidates(name, words[name], classes, tables) for name in wanted}


def _tables(classes: Sequence[str], words: Mapping[str, str]) -> list[dict[str, list[int]]]:
    """Return, for each kind of name, the rows of the classes that have it."""
    tables: list[dict[str, list[int]]] = [defaultdict(list) for _ in range(4)]
    for row, name in enumerate(classes):
        for table, forms in zip(tables, _forms(name, words[name]), strict=True):
            for form in forms:
                table[form].append(row)
    return tables


def _candidates(
    name: str, words: str, annotator_classes: Sequence[str], tables: Sequence[Mapping[str, list[int]]]
) -> list[int]:
    """Return the rows that a class may be, by the first kind of name that finds any."""
    for kind, (table, forms) in enumerate(zip(tables, _forms(name, words), strict=True)):
        rows = {row for form in forms for row in table.get(form, ())}
        if kind > 0 and _is_synset(name):  # two synsets are never the same class, even where they share a word
            rows = {row for row in rows if not _is_synset(annotator_classes[row])}
        if rows:
            return sorted(rows)
    return []


def _forms(name: str, words: str) -> tuple[set[str], set[str], set[str], set[str]]:
    """Return what a class may be found by: its name as it is, then in normal form its words, the first, any of them."""
    each = [_normal(word) for word in words.split(",")]
    return {name}, {_normal(words)}, {each[0]}, set(each)


def _normal(name: str) -> str:
    return re.sub(r"[_\-\s]+", " ", unicodedata.normalize("NFC", name)).strip().casefold()


def _is_synset(name: str) -> bool:
    return re.fullmatch(r"n\d{8}", name) is not None


def class_words(names: Iterable[str]) -> dict[str, str]:
    """Return the words that WordNet has for each synset, separated by commas; every other name as it is."""
    words = {name: name for name in names}
    synsets = list(filter(_is_synset, words))
    if synsets:
        from timm.data.imagenet_info import ImageNetInfo  # timm takes seconds to import

        info = ImageNetInfo()
        words.update({synset: _lemmas(info, synset) for synset in synsets})
    return words


def _lemmas(info: ImageNetInfo, synset: str) -> str:
    try:
        return info.label_name_to_description(synset)
    except KeyError:
        return synset  # none of ImageNet's, whatever it looks like


def _check_distinct(rows: Sequence[int], dataset_classes: Sequence[str]) -> None:
    first: dict[int, str] = {}
    for row, name in zip(rows, dataset_classes, strict=True):
        if row in first:
            raise ValueError(
                f"the dataset's classes {first[row]!r} and {name!r} are both the annotator's class {row}: tell them "
                "apart by mapping"
            )
        first[row] = name


def _close_to(words: str, known: Iterable[str]) -> list[str]:
    options = list(known)
    return [close for word in words.split(",") for close in difflib.get_close_matches(_normal(word), options, n=2)]


def _hint(close: Sequence[str]) -> str:
    return f" (did you mean {_listed(close[:3])}?)" if close else ""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return ", ".join(repr(name) for name in names[:_NUM_SHOWN]) + more
