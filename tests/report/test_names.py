import sys

import pytest

from relabel_datasets.report.names import legible_names
from tests.bad_names import change_manifest


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


def test_reports_plots_and_pictures_hold_any_class_name(dataset_folder, tmp_path):
    import relabel_datasets as rd
    from relabel_datasets.analysis import analyze
    from relabel_datasets.report.html_report import write_report
    from relabel_datasets.report.pictures import draw_pictures
    from relabel_datasets.report.plots import save_plots
    from relabel_datasets.report.terminal import describe
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
