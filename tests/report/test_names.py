import sys

import pytest

from relabel_datasets.report.names import legible_names


def test_synsets_have_their_first_word_and_other_classes_their_names():
    assert legible_names(["n01440764", "striped_star", "cat, dog"]) == ("tench", "striped_star", "cat, dog")


def test_names_differ_where_words_are_the_same():
    assert legible_names(["n02012849", "n03126707"]) == ("crane (n02012849)", "crane (n03126707)")  # bird and machine
    assert legible_names(["n03710637", "n03710721"]) == ("maillot", "maillot, tank suit")
    assert legible_names(["n02012849", "n01440764"]) == ("crane", "tench")


def test_all_of_imagenets_names_differ():
    from timm.data.imagenet_info import ImageNetInfo

    names = legible_names(ImageNetInfo().label_names())
    assert len(set(names)) == len(names) == 1000
    assert all(names)


def test_what_only_looks_like_a_synset_keeps_its_name():
    assert legible_names(["n99999999", "n01440764x"]) == ("n99999999", "n01440764x")


def test_without_synsets_timm_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.data.imagenet_info", None)  # an import of it fails
    assert legible_names(["cat", "dog"]) == ("cat", "dog")
    with pytest.raises(ImportError):
        legible_names(["n01440764"])


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb", r"a\nb"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\0", r"\x00"),
        ("a\rb", r"a\rb"),
        ("a\u202eb", r"a\u202eb"),
        ("a é 日", "a é 日"),
    ],
)
def test_what_cannot_be_shown_is_escaped(name, shown):
    assert legible_names([name, "dog"]) == (shown, "dog")
