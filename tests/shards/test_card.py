"""Cards of published datasets have valid metadata for the Hub and `datasets`, and code snippets that run unchanged."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import pytest
import yaml
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData

import relabel_datasets as rd
from relabel_datasets.labels import windows
from relabel_datasets.shards.card_template import package_templates
from tests.bad_names import change_manifest
from tests.conftest import ROOT
from tests.labels.samples import set_calibration

REPO = "org/photos"
TEMPLATES = ("default", "imagenet-relabel", "imagenette-relabel", "scenes-relabel")
pytestmark = [
    pytest.mark.usefixtures("impatient"),
    # webdataset leaves tar files open until they are garbage-collected
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def _isolated_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("RELABEL_CACHE", str(tmp_path / "our-cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_user")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()


@pytest.fixture
def publish(local_hub, dataset_folder, image_folder, annotator):
    """Return a function that publishes a dataset of two configs, one of them with two splits, and returns its card."""

    def publish(template: str | None = None, *configs: str) -> str:
        rd.build(rd.data.ImageFolderSource(image_folder), dataset_folder, annotator, config="colours", split="validation",
                 shard_size=7, progress=False, build_config=rd.annotate.BuildConfig(batch_size=4))  # fmt: skip
        for config in configs or (None,):
            rd.publish(dataset_folder, REPO, config=config, card=template, restricted_images="ImageNet", progress=False)
        return local_hub.files(REPO)["README.md"].decode()

    return publish


@pytest.mark.parametrize("template", TEMPLATES)
def test_metadata_is_valid_for_the_hub_and_datasets(publish, template):
    card = publish(template)
    data = DatasetCard(card).data
    assert card.count("\n---\n") == 1
    assert data.license in {"default": (None,), "scenes-relabel": ("cc0-1.0",)}.get(template, ("other",))
    assert data.license != "other" or (data.license_name, data.license_link[:8]) == ("imagenet", "https://")
    assert data.task_categories == ["image-classification"]
    assert data.size_categories == ["n<1K"]
    assert {"relabel", "webdataset"} <= set(data.tags)
    configs = MetadataConfigs.from_dataset_card_data(data)
    assert {name: [file["split"] for file in config["data_files"]] for name, config in configs.items()} == {
        "colours": ["train", "validation"], "labels-only": ["train"]}  # fmt: skip
    assert configs.get_default_config_name() == "colours"
    infos = datasets.info.DatasetInfosDict.from_dataset_card_data(data)
    assert {name: split.num_examples for name, split in infos["colours"].splits.items()} == {
        "train": 13, "validation": 13}  # fmt: skip
    # the client reads it back without loss
    assert DatasetCardData(**yaml.safe_load(card.split("---")[1])).to_dict() == data.to_dict()


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_rendered_card_has_complete_tables(publish, template):
    card = publish(template)
    text = card.split("\n---\n", 1)[1]
    assert "{{" not in text
    assert "None" not in text
    assert "{%" not in text
    assert text.count("```") % 2 == 0
    tables = re.findall(r"((?:^\|.*\|\n)+)", text, re.MULTILINE)
    assert len(tables) == 6  # provenance, splits and statistics of each config
    for table in tables:  # Markdown needs the same number of cells in each row
        assert len({line.count("|") for line in table.splitlines()}) == 1
        assert re.fullmatch(r"\| (?:--- \|\s?)+", table.splitlines()[1] + " ")
    made, splits, measured = (table.splitlines() for table in tables[:3])
    assert "| annotator | `colours` at 48 x 64 px |" in made
    assert len(splits) == len(measured) == 4
    assert [line.split(" | ")[:3] for line in splits[2:]] == [["| train", "13", "3"], ["| validation", "13", "2"]]
    for line in measured[2:]:
        split, agreement, several, kl, same_best, crops = line.strip("| ").split(" | ")
        assert split in ("train", "validation")
        assert all(0 <= float(share.removesuffix("%")) <= 100 for share in (agreement, several, same_best))
        assert 0 <= float(kl.removesuffix(" nats")) < 1
        assert crops == "13"
    assert "arxiv.org/abs/2101.05022" in text
    assert "## Limits" in text


def test_a_card_has_a_table_of_gains_if_a_split_has_them(publish, dataset_folder):
    assert "calibrated" not in publish()
    set_calibration(dataset_folder / "colours")
    text = publish()
    row = "| train | 1.000 nats | 0.500 nats | 0.50 at 10%, 1.50 at 40%, 3.00 at 100% | 8 |"
    assert text.count("| gain at each share of the area |") == text.count(row) == 1
    assert f"| --- | --- | --- | --- | --- |\n{row}\n\n" in text


@pytest.mark.parametrize("name", ["colours", "labels-only"])
def test_datasets_opens_no_shard_before_the_first_sample(publish, local_hub, name):
    publish()
    local_hub.reset()
    loaded = datasets.load_dataset(REPO, name, streaming=True)
    opened = [request for request in local_hub.requests if request.path.startswith("/lfs/") or ".tar" in request.path]
    assert [request for request in opened if request.method == "GET"] == []
    features = {"cls", "safetensors", "__key__", "__url__"} | ({"jpg"} if name == "colours" else set())
    for split in loaded.values():
        assert set(split.features) == features
        assert split.features["cls"].names == ["cat", "dog", "emu"]
        assert split.info.splits["train"].num_examples == 13
        assert set(next(iter(split))) == features
    assert any(request.path.startswith("/lfs/") for request in local_hub.requests)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("configs", [("colours",), ("labels-only",)])
def test_every_snippet_of_a_published_card_runs(publish, image_folder, template, configs):
    card = publish(template, *configs)
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == (4 if configs == ("colours",) else 3)
    assert REPO in snippets[0]
    names: dict[str, object] = {}
    for snippet in snippets:
        names.pop("label_map", None)
        code = re.sub("path/to/images|/path/to/imagenet", str(image_folder), snippet)
        exec(compile(code, REPO, "exec"), names)
        if "label_map = " in code:
            assert names["label_map"].num_classes == 3
    assert names["soft_label"].shape == (3,)
    if configs == ("colours",):
        image, label = next(iter(names["images"]))
        assert image.size in ((56, 40), (32, 48))
        assert label in range(3)


def test_snippets_of_an_unpublished_card_run(dataset_folder, tmp_path):
    card = (dataset_folder / "README.md").read_text()
    names: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(compile(snippet.replace("path/to/this/folder", str(dataset_folder)), "card", "exec"), names)
    assert names["soft_label"].shape == (3,)


def test_the_card_of_stored_crops_describes_them_and_its_snippets_run(tmp_path, image_folder, annotator, local_hub):
    build_config = rd.annotate.BuildConfig(encoding="crops", num_crops=5, batch_size=4)
    source = rd.data.ImageFolderSource(image_folder)
    rd.build(source, tmp_path / "data", annotator, build_config=build_config, progress=False)
    change_manifest(tmp_path / "data" / "colours" / "_info.json", lambda c: c["annotator"].update(linear_head=True))
    rd.publish(tmp_path / "data", REPO, progress=False)
    card = local_hub.files(REPO)["README.md"].decode()
    assert "| encoding | `crops` with k = `16`, `compact`, 5 crops per image |" in card
    assert "| train | " in card.partition("shows several classes")[2]
    assert "not measured" not in card
    assert "| maps |" not in card  # how exact they are
    assert windows.CROPS_DEFINITION in card
    assert windows.DEFINITION not in card
    assert "None" not in card
    names: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(compile(snippet, REPO, "exec"), names)
        if "labels = " in snippet:
            assert names.pop("labels").num_crops == 5
    assert names["soft_label"].shape == (3,)


def test_every_page_in_cards_is_a_template_except_the_guide_and_the_shared_part():
    pages = {path.stem for path in (ROOT / "cards").glob("*.md")}
    assert package_templates() == TEMPLATES
    assert pages == {*TEMPLATES, "README", "shared"}


@pytest.mark.slow  # builds the package
def test_the_wheel_contains_the_templates(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "installed")
    code = "from relabel_datasets.shards import card_template as card; print(card.__file__); [card.read_template(n) for n in {!r}]"
    result = subprocess.run(
        [sys.executable, "-c", code.format(TEMPLATES)],
        cwd=tmp_path / "installed", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(result.stdout.strip()).is_relative_to(tmp_path / "installed")
