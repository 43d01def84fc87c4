"""Documentation: Python snippets run, commands are accepted, links exist, and the front page stays short."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest

import relabel_datasets as rd
from relabel_datasets.annotate import BuildConfig
from relabel_datasets.cli import make_parser
from relabel_datasets.data import ImageFolderSource
from relabel_datasets.shards.card import write_card
from tests.annotate.crop_releases import write_fkd
from tests.conftest import ROOT
from tests.labels.samples import set_calibration
from tests.markdown import Block, anchors_of, links_of, read_page, tables_of
from tests.servers import FaultyServer

MAX_WORDS = 1500
README = ROOT / "README.md"
GUIDES = sorted(
    [
        *(ROOT / "relabel_datasets").rglob("README.md"),
        *(ROOT / "tests").rglob("README.md"),
        ROOT / "cards" / "README.md",
    ]
)
PAGES = sorted({*GUIDES, *ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.md")})
BLOCKS = {page: read_page(page)[1] for page in PAGES}
PYTHON = [block for page in (README, *GUIDES) for block in BLOCKS[page] if block.language == "python"]
SECTIONS: dict[tuple[Path, int], list[Block]] = {}  # snippets below each heading
for _block in PYTHON:
    SECTIONS.setdefault((_block.page, _block.heading), []).append(_block)
COMMANDS = sorted(
    {
        line.partition(" #")[0].strip()
        for blocks in BLOCKS.values()
        for block in blocks
        if block.language == "bash"
        for line in block.code.splitlines()
    }
)
# Replacements that avoid downloads, large models and worker processes.
SUBSTITUTES = {
    "n01440764_10026": "photo_03",
    '"CONFIG"': '"colours"',
    "CONFIG/": "colours/",
    "{00000..00001}-of-00002": "{00000..00002}-of-00003",
    "images-{00000..00001}": "images-{00000..00002}",
    "batch_size=64": "batch_size=4",
    "num_workers=2": "num_workers=0",
    "num_workers=4": "num_workers=0",
    "range(8)": "range(3)",
    '"resnet18"': '"test_resnet"',
    '"resnet50.a1_in1k", pretrained=True': '"resnet10t", num_classes=3',
    '{"anon": True}': "{}",
}


def name_of(section: list[Block]) -> str:
    return f"{section[0].page.relative_to(ROOT)}:{section[0].line}"


@pytest.fixture
def working_folder(dataset_folder, image_folder, annotator, tmp_path, monkeypatch, request) -> Iterator[dict[str, str]]:
    """Create a working folder with the paths of the guides, and yield the replacements in their code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RELABEL_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "path" / "to"
    folder.mkdir(parents=True)
    set_calibration(dataset_folder / "colours")  # its images are too few for a build to fit gains
    (dataset_folder / "labels-only").rename(folder / "label-only")
    (folder / "dataset").symlink_to(dataset_folder)
    (tmp_path / "scenes-relabel").symlink_to(dataset_folder)
    (folder / "images").symlink_to(image_folder)
    (folder / "photo_03.jpg").symlink_to(image_folder / "cat" / "photo_03.jpg")
    for shard in ("00000", "00001", "00002"):  # images are read like those of any tar
        (folder / f"images-{shard}.tar").symlink_to(dataset_folder / "colours" / f"train-{shard}-of-00003.tar")
    write_card(dataset_folder)
    code = "".join(block.code for block in request.node.callspec.params["section"])
    if "path/to/release" in code:
        write_fkd(folder / "release", image_folder, "smoothing", np.float32, 3)
    if "path/to/crops" in code:
        crops = BuildConfig(encoding="crops", num_crops=5)
        rd.build(ImageFolderSource(image_folder), folder / "crops", annotator, build_config=crops, progress=False)
    if "org/name" in code:
        local_hub = request.getfixturevalue("local_hub")
        commit = local_hub.publish("org/name", dataset_folder)
        local_hub.repos["org/name"].tags["v1"] = commit.oid
    with FaultyServer(tmp_path) as server:
        yield {"https://example.org": server.url, "s3://bucket": f"{server.url}/path/to"}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset does not close its tars
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")  # Trainer also pins memory without a GPU
@pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")  # this and the next three are Lightning's
@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:The 'train_dataloader' does not have")
@pytest.mark.filterwarnings("ignore:`training_step` returned", "ignore:Starting from v1.9")
@pytest.mark.parametrize("section", SECTIONS.values(), ids=name_of)
def test_a_snippet_runs_after_the_first_one_of_its_page_and_those_above_it_in_its_section(section, working_folder):
    first = next(block for block in PYTHON if block.page == section[0].page)
    names: dict[str, object] = {}
    for block in section if first in section else [first, *section]:
        code = "\n" * (block.line - 1) + block.code
        for text, substitute in {**working_folder, **SUBSTITUTES}.items():
            code = code.replace(text, substitute)
        exec(compile(code, str(block.page), "exec"), names)
        check_values(names)


def check_values(names: dict[str, object]) -> None:
    """Check what a snippet has assigned to the names that several snippets use."""
    soft_labels = names.get("soft_labels")
    assert soft_labels is None or (soft_labels.shape[-1] == 3 and (soft_labels.sum(-1) - 1).abs().max() < 1e-5)
    assert "token_labels" not in names or names["token_labels"].shape == (4, 3, 14, 14)
    assert "trainer" not in names or names["trainer"].state.global_step == 4  # 13 images in batches of 4
    assert "checkpoint" not in names or names["checkpoint"]["data"]["epoch"] == 2  # after the last batch of epoch 1


def words_of(command: str) -> list[str]:
    """Split a command into words, without the brackets around optional parts."""
    return shlex.split(re.sub(r"(?<![\"'\w])\[|\](?![\"'\w])", "", command))


@pytest.mark.parametrize("command", [command for command in COMMANDS if " relabel " in f" {command}"])
def test_a_relabel_command_is_accepted_by_the_parser(command):
    words = words_of(command)
    make_parser().parse_args(words[words.index("relabel") + 1 :])  # exits for an option that does not exist


@pytest.mark.parametrize("command", [command for command in COMMANDS if " -m relabel_datasets.train " in command])
def test_a_torchrun_command_is_accepted_by_the_parser(command):
    make_parser().parse_args(["train", *words_of(command.partition(" -m relabel_datasets.train ")[2])])


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("python ")])
def test_a_python_command_has_an_existing_script_and_existing_options(command):
    (commands,) = (action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
    shared = commands.choices["build"]._option_string_actions  # options of annotators, which benchmarks also have
    _, script, *words = words_of(command)
    source = (ROOT / script).read_text()
    for option in (word for word in words if word.startswith("--")):
        assert f'"{option}"' in source or ("annotator_from" in source and option in shared), option


def test_each_kind_of_command_is_found():
    assert {f"relabel {name}" for name in ("build", "verify", "report", "train", "evaluate", "compare", "analyze")} <= {
        " ".join(command.split()[:2]) for command in COMMANDS
    }
    assert sum(command.startswith("python tests/benchmarks/") for command in COMMANDS) >= 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_and_image_exists(page):
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_row_of_a_table_has_as_many_cells_as_its_header(page):
    for rows in tables_of(page):
        assert len({re.sub(r"`[^`]*`", "", row).count("|") for row in rows}) == 1, rows[0]


def test_every_file_that_the_contributing_page_names_exists():
    names = re.findall(r"`([\w./]+\.(?:py|js|md|toml))`", (ROOT / ".github" / "CONTRIBUTING.md").read_text())
    folders = (ROOT, ROOT / "relabel_datasets", ROOT / "relabel_datasets" / "annotate", ROOT / "tests" / "annotate")
    missing = [name for name in names if "NAME" not in name and not any((folder / name).exists() for folder in folders)]
    assert len(names) > 20
    assert not missing


def test_every_guide_is_linked_from_the_front_page():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links_of(README)}
    assert set(GUIDES) <= linked


def test_the_front_page_is_short():
    assert len(README.read_text().split()) <= MAX_WORDS
