import sys

import pytest

from relabel_datasets.report.names import legible_names
from tests.bad_names import change_manifest


def test_synsets_become_their_first_word_and_other_classes_keep_their_names():
    assert legible_names(["n01440764", "striped_star", "cat, dog"]) == ("tench", "striped_star", "cat, dog")


def test_repeated_words_are_made_unique():
    assert legible_names(["n02012849", "n03126707"]) == (
        "crane (n02012849)",
        "crane (n03126707)",
    )  # the bird and the machine
    assert legible_names(["n03710637", "n03710721"]) == ("maillot", "maillot, tank suit")
    assert legible_names(["n02012849", "n01440764"]) == ("crane", "tench")


def test_legible_names_of_imagenet_are_unique():
    from timm.data.imagenet_info import ImageNetInfo

    names = legible_names(ImageNetInfo().label_names())
    assert len(set(names)) == len(names) == 1000
    assert all(names)


def test_unknown_synsets_keep_their_names():
    assert legible_names(["n99999999", "n01440764x"]) == ("n99999999", "n01440764x")


def test_timm_is_imported_only_for_synsets(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.data.imagenet_info", None)  # makes the import fail
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
def test_control_characters_are_escaped(name, shown):
    assert legible_names([name, "dog"]) == (shown, "dog")


def test_reports_plots_and_pictures_accept_any_class_name(dataset_folder, tmp_path):
    import relabel_datasets as rd
    from relabel_datasets.analysis import analyze
    from relabel_datasets.report import describe, draw_pictures, save_plots, write_report
    from tests.report.pages import Page

    nasty = "a\nb\rc\0\x07\x1b[31m\u2028\u202e|`$x$</script><script>{{ 7 * 7 }}--><!--"

    def change(content):
        content["classes"] = [nasty, f"dog {nasty}", f"emu {nasty}"]
        content["annotator"]["name"] = content["made_with"] = nasty

    change_manifest(dataset_folder / "colours" / "_info.json", change)
    path = write_report(dataset_folder, tmp_path / "report.html", "colours", num_crops=100, progress=False)
    assert len(Page(path).scripts) == 1
    (tmp_path / "plots").mkdir()
    assert save_plots(analyze(dataset_folder, "colours", num_crops=100, progress=False), tmp_path / "plots")
    assert draw_pictures(rd.load_dataset(dataset_folder, "colours", "train"), tmp_path / "pictures")
    assert "samples in" in describe(dataset_folder, "colours")
