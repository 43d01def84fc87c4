"""Classes of a dataset are matched with those of an annotator."""

from __future__ import annotations

import subprocess
import sys

import pytest

from relabel_datasets.annotate.classes import describe_pairs, match_classes

IMAGENETTE = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
ROWS = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]  # of Imagenette's classes in ImageNet-1k


@pytest.fixture(scope="module")
def imagenet() -> tuple[str, ...]:
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo().label_names())


def test_equal_names_match_in_any_order():
    assert match_classes(("a", "b", "c"), ("c", "a")) == [2, 0]


@pytest.mark.slow  # imports torch in a new process
def test_exact_names_do_not_import_timm():
    code = "from relabel_datasets.annotate.classes import match_classes; import sys; match_classes(['a', 'b'], ['b']); "
    subprocess.run([sys.executable, "-c", code + "assert 'timm' not in sys.modules"], check=True)


def test_case_underscores_hyphens_and_spaces_are_ignored():
    assert match_classes(("hot dog", "Polar_Bear", "tam-tam"), ("tam tam", "HOT-DOG", "polar  bear")) == [2, 0, 1]


def test_exact_case_has_priority():
    assert match_classes(("Cardigan", "cardigan"), ("cardigan", "Cardigan")) == [1, 0]


def test_synsets_match_themselves(imagenet):
    assert match_classes(imagenet, tuple(IMAGENETTE)) == ROWS
    assert match_classes(imagenet, imagenet) == list(range(1000))


def test_human_names_match_synsets(imagenet):
    assert match_classes(imagenet, tuple(IMAGENETTE.values())) == ROWS
    assert match_classes(imagenet, ("chainsaw", "English_springer_spaniel", "Tinca tinca")) == [491, 217, 0]


def test_synsets_match_human_names():
    assert match_classes(tuple(IMAGENETTE.values()), tuple(IMAGENETTE)) == list(range(10))


def test_full_descriptions_have_priority_over_single_words(imagenet):
    # "missile", "cardigan" and "maillot" are names of one class and words of another.
    names = ("missile", "projectile, missile", "cardigan", "maillot, tank suit", "maillot", "harp", "tub")
    synsets = ["n03773504", "n04008634", "n02963159", "n03710721", "n03710637", "n03495258", "n04493381"]
    assert [imagenet[row] for row in match_classes(imagenet, names)] == synsets


def test_a_synset_never_matches_another_synset(imagenet):
    # Both are "crane", the bird and the machine.
    with pytest.raises(ValueError, match=r"1 of 2 classes .* 'n03126707' is none of them"):
        match_classes(("n02012849", "n01440764"), ("n03126707", "n01440764"))
    assert match_classes(imagenet, ("n03126707", "n02012849")) == [517, 134]


def test_unknown_synsets_are_treated_as_names():
    with pytest.raises(ValueError, match="'n99999999' is none of them"):
        match_classes(("cat", "dog"), ("n99999999", "dog"))


def test_ambiguous_names_are_refused_with_their_candidates(imagenet):
    message = r"1 of 2 classes .*'crane' may be 134 \(n02012849: crane\) or 517 \(n03126707: crane\).*class_mapping="
    with pytest.raises(ValueError, match=message):
        match_classes(imagenet, ("crane", "tench"))


def test_equal_names_of_the_annotator_are_ambiguous():
    with pytest.raises(ValueError, match=r"'a' may be 0 \(a: a\) or 2"):
        match_classes(("a", "b", "a"), ("a", "b"))


def test_errors_list_unmatched_classes_with_similar_names(imagenet):
    message = r"2 of 3 .*'zebr' is none of them \(did you mean 'zebra'\?\); 'qqqqqq' is none of them\. Give"
    with pytest.raises(ValueError, match=message):
        match_classes(imagenet, ("zebr", "tench", "qqqqqq"))


def test_errors_abbreviate_many_unmatched_classes():
    names = tuple(f"class {i}" for i in range(40))
    with pytest.raises(ValueError, match=r"40 of 40 classes .*'class 4' is none of them; and 35 more"):
        match_classes(("x", "y"), names)


def test_two_classes_on_one_row_are_refused(imagenet):
    with pytest.raises(ValueError, match="'tench' and 'Tinca tinca' are both the annotator's class 0"):
        match_classes(imagenet, ("tench", "Tinca tinca"))


def test_repeated_class_names_are_refused():
    with pytest.raises(ValueError, match="'a' and 'a' are both"):
        match_classes(("a", "b"), ("a", "b", "a"))


def test_mapping_has_priority_over_names(imagenet):
    mapping: dict[str, str | int] = {"crane": "n03126707", "bird": 134, "tench": 5}
    assert match_classes(imagenet, ("tench", "bird", "crane", "church"), mapping) == [5, 134, 517, 497]


def test_mapping_by_index_supports_annotators_without_names():
    assert match_classes(None, ("a", "b"), {"a": 2, "b": 0}, num_classes=3) == [2, 0]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"z": 0}, "mapping has classes that the dataset does not have: 'z'"),
        ({"a": 3}, r"mapping of 'a' must be an index in 0 \.\. 2, got 3"),
        ({"a": -1}, r"must be an index in 0 \.\. 2, got -1"),
        (
            {"a": "fores"},
            r"mapping of 'a' must be a class of the annotator or its index, got 'fores' \(did you mean 'forest'\?\)",
        ),
        ({"a": 0, "b": "forest"}, "'a' and 'b' are both the annotator's class 0"),
    ],
)
def test_invalid_mappings_are_refused(mapping, message):
    with pytest.raises(ValueError, match=message):
        match_classes(("forest", "lake", "a"), ("a", "b"), mapping)


def test_annotators_without_names_are_assumed_to_have_the_classes_of_the_dataset():
    assert match_classes(None, ("a", "b", "c"), num_classes=3) == [0, 1, 2]


@pytest.mark.parametrize("mapping", [None, {"a": 1}])
def test_annotators_without_names_must_have_the_number_of_classes_of_the_dataset(mapping):
    with pytest.raises(
        ValueError, match=r"annotator's 1000 classes have no names, so .* of the dataset's 3 classes cannot"
    ):
        match_classes(None, ("a", "b", "c"), mapping, num_classes=1000)


def test_the_number_of_classes_is_required():
    with pytest.raises(ValueError, match="num_classes must be given"):
        match_classes(None, ("a",))


def test_no_classes_match_nothing():
    assert match_classes(("a",), ()) == []


# Class names in the order of the dataset, and whether they determine the rows of an annotator without names.
ORDERS = {
    "0 to 9": ([str(i) for i in range(10)], True),
    "0 to 11 as folders": (sorted(str(i) for i in range(12)), False),
    "0 to 11 in a ClassLabel": ([str(i) for i in range(12)], True),
    "00 to 11": ([f"{i:02d}" for i in range(12)], True),
    "class1 to class10": (sorted(f"class{i}" for i in range(1, 11)), False),
    "1 to 1000 as folders": (sorted(map(str, range(1, 1001))), False),
    "one digit in a long name": (["a1b", "a2b"], True),
    "upper case first": (["Zebra", "ape"], False),
    "upper case last": (["ape", "Zebra"], True),
    "synsets": (["n01440764", "n02102040"], True),
    "names in no order": (["dog", "10", "9", "cat"], True),
    "one class": (["10"], True),
}


@pytest.mark.parametrize("name", ORDERS)
def test_rows_without_names_require_an_order_on_which_timm_and_torchvision_agree(name):
    classes, is_clear = ORDERS[name]
    if is_clear:
        assert match_classes(None, classes, num_classes=len(classes)) == list(range(len(classes)))
        return
    with pytest.raises(ValueError, match=r"ambiguous: row \d+ of the annotator is '.*classes=.*class_mapping="):
        match_classes(None, classes, num_classes=len(classes))
    mapping = {name: row for row, name in enumerate(classes)}
    assert match_classes(None, classes, mapping, len(classes)) == list(range(len(classes)))
    assert match_classes(sorted(classes, reverse=True), classes) == list(range(len(classes)))[::-1]


def test_an_order_is_ambiguous_only_if_that_of_timm_differs():
    from timm.utils.misc import natural_key

    for classes, is_clear in ORDERS.values():
        if classes == sorted(classes):
            assert is_clear == (sorted(classes, key=natural_key) == classes)


def test_many_pairs_of_classes_are_abbreviated():
    assert describe_pairs(["a", "b"], [1, 0]) == "1 = 'a', 0 = 'b'"
    text = describe_pairs([f"c{i}" for i in range(1000)], range(1000))
    assert text.startswith("0 = 'c0', 1 = 'c1', ")
    assert text.endswith(", 18 = 'c18', ..., 999 = 'c999'")
