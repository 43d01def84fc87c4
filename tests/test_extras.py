"""Without an optional package, what needs it names the extra before any work, and everything else works."""

import re
import subprocess
import sys

import pytest

import relabel_datasets as rd
from relabel_datasets.annotate.remake import check_package
from relabel_datasets.cli import main
from relabel_datasets.errors import MissingExtraError
from relabel_datasets.extras import EXTRAS, FASTER, check_extra, is_installed
from relabel_datasets.train.recipe import RuntimeConfig
from tests.conftest import ROOT
from tests.markdown import tables_of

USES = {  # extra: uses of it in Python
    "gcs": [lambda _: rd.load_dataset("gs://bucket/name"), lambda _: rd.storage.open_folder("gcs://bucket/name")],
    "hf": [
        lambda _: rd.HFAnnotator("some/model"),
        lambda _: check_package({"kind": "transformers", "name": "some/model"}),
    ],
    "plots": [lambda path: rd.report.save_plots(rd.analysis.Analysis({}, {}), path)],
    "ray": [lambda _: rd.annotate.RayEngine(), lambda path: rd.build(Images(), path, None, engine="ray")],
    "s3": [lambda _: rd.load_dataset("s3://bucket/name"), lambda path: rd.build(Images(), "s3://bucket/name", None)],
    "tensorboard": [lambda _: RuntimeConfig(tensorboard=True)],
}
COMMANDS = {  # command line: extra. IMAGES, OUT and DATA are replaced.
    "build IMAGES OUT --annotator hf:some/model": "hf",
    "build IMAGES OUT --annotator resnet10t --engine ray": "ray",
    "build no/images s3://user:secret@bucket/name --annotator resnet10t": "s3",
    "build no/images gs://bucket/name --annotator resnet10t": "gcs",
    "import no/maps OUT --format relabel --order auto --images IMAGES --annotator hf:some/model": "hf",
    "verify s3://bucket/name": "s3",
    "report gs://bucket/name --out OUT": "gcs",
    "train DATA --config colours --validation train --tensorboard --out OUT": "tensorboard",
    "compare DATA --configs colours --validation train --presets relabel --tensorboard --out OUT": "tensorboard",
}


class Images:
    keys = ("a",)
    labels = (0,)
    extension = "jpg"

    def name(self, index):
        return "a.jpg"


def remove(monkeypatch, extra):
    """Let imports of the package of an extra fail as if it were not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == EXTRAS[extra]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, EXTRAS[extra], None)


def expected(extra):
    return re.escape(f'{EXTRAS[extra]!r}, which is not installed: pip install "relabel-datasets[{extra}]"')


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_needs_a_missing_package_raises_one_error_that_names_the_extra(extra, tmp_path, monkeypatch):
    remove(monkeypatch, extra)
    assert not is_installed(extra)
    for use in USES[extra]:
        with pytest.raises(MissingExtraError, match=expected(extra)):
            use(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_needs_a_missing_package_is_refused_before_any_work(
    command, tmp_path, request, monkeypatch, capsys
):
    extra, out = COMMANDS[command], tmp_path / "out"
    remove(monkeypatch, extra)
    fixtures = {"IMAGES": "image_folder", "DATA": "dataset_folder"}
    places = {word: request.getfixturevalue(name) for word, name in fixtures.items() if word in command.split()}
    assert main([str({**places, "OUT": out}.get(word, word)) for word in command.split()]) == 1
    printed = capsys.readouterr()
    assert re.search(expected(extra), printed.err)
    assert len(printed.err.splitlines()) == 1
    assert not printed.out
    assert "secret" not in printed.err
    assert not out.exists()


def test_every_extra_but_plots_has_a_command_that_refuses():
    assert {*COMMANDS.values(), "plots"} == {*USES} == {*EXTRAS}


def test_a_package_that_is_installed_but_broken_raises_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "gcsfs.py").write_text("import a_package_that_does_not_exist")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gcsfs", raising=False)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_does_not_exist"):
        check_extra("gcs", "gs://")


def test_the_extras_are_those_of_the_project_and_of_the_front_page():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert extras.keys() == {*EXTRAS, *FASTER, "dev"}
    for extra, package in {**EXTRAS, **FASTER}.items():
        assert any(re.match(rf"{package}\b", requirement) for requirement in extras[extra])
        assert set(extras[extra]) <= set(extras["dev"])
        assert not any(re.match(rf"{package}\b", requirement) for requirement in project["dependencies"])
    (rows,) = (rows for rows in tables_of(ROOT / "README.md") if rows[0].startswith("| extra"))
    assert [row.split("|")[1].strip(" `") for row in rows[2:]] == [*sorted({**EXTRAS, **FASTER}), "dev"]


# A finder that hides the packages of all extras, as in an environment of the core alone.
CORE_ALONE = f"""
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {[*EXTRAS.values(), *FASTER.values()]!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
"""
EVERYDAY = """
import logging, sys
from pathlib import Path
import relabel_datasets as rd
from relabel_datasets.cli import main

data, out = sys.argv[1], Path(sys.argv[2])
assert len(rd.load_dataset(data, "colours", split="train")[0]) == 2
assert rd.TimmAnnotator("resnet10t", pretrained=False, num_classes=3, device="cpu").describe()["kind"] == "timm"
from relabel_datasets.report.overlay import save_overlays
assert save_overlays(rd.RelabelDataset(data, "colours"), out / "overlays")
for command in ("analyze DATA --config colours --num-crops 100 --out OUT/analysis", "verify DATA",
                "report DATA --config colours --num-crops 100 --out OUT/report.html",
                "pictures DATA --config colours --out OUT/pictures"):
    assert main([word.replace("DATA", data).replace("OUT", str(out)) for word in command.split()]) == 0, command
assert (out / "analysis" / "analysis.json").exists() and not list((out / "analysis").glob("*.png"))
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.slow
def test_the_core_alone_loads_reads_analyzes_and_draws(dataset_folder, tmp_path):
    arguments = [sys.executable, "-c", CORE_ALONE + EVERYDAY, str(dataset_folder), str(tmp_path / "out")]
    run = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert not {*EXTRAS.values(), *FASTER.values()} & {*run.stdout.split()}
    assert run.stderr.count('need matplotlib: pip install "relabel-datasets[plots]"') == 2  # analyze and report
    assert "<svg" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_the_demo_runs_with_the_core_alone(tmp_path):
    script = "from relabel_datasets.cli import main; sys.exit(main(['demo', sys.argv[1], '--seeds', '1']))"
    run = subprocess.run(
        [sys.executable, "-c", CORE_ALONE + script, str(tmp_path / "out")], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    assert 'pip install "relabel-datasets[plots]"' in run.stderr
    assert {"overlays", "report.html", "table.md"} <= {path.name for path in (tmp_path / "out").iterdir()}
