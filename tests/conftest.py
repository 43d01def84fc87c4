"""What tests share: images in many formats, a small real annotator, and real data where it is at hand."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import pytest
import torch

from tests.hub import LocalHub

if TYPE_CHECKING:
    from relabel_datasets.annotate.annotator import ModuleAnnotator

ROOT = Path(__file__).parents[1]
pytest_plugins = ["tests.fixtures"]
HUB_PORT = int(os.environ["RELABEL_TESTS_HUB_PORT"])


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run in two processes, but a single file in one: starting others would take longer than its tests."""
    return 0 if any(".py" in argument for argument in config.args) else 2


def pytest_unconfigure() -> None:
    """Remove the home of huggingface_hub."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bear with huggingface_hub 2.4, which uploads to the storage in a way that its own HTTP library calls deprecated."""
    for item in items:
        if "local_hub" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"))


@pytest.fixture
def impatient(monkeypatch):
    """The client of the Hub waits for nothing before it tries again."""
    in_no_time = SimpleNamespace(**{**vars(time), "sleep": lambda _: None})
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", in_no_time)


@pytest.fixture
def hf_cache(tmp_path: Path, monkeypatch) -> Path:
    """An empty cache of huggingface_hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    return tmp_path / "hf-cache"


@pytest.fixture
def hf_home(tmp_path: Path, monkeypatch) -> None:
    """An empty cache of `datasets`, without progress bars."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-datasets-cache")
    datasets.disable_progress_bars()


@pytest.fixture
def local_hub(hf_cache) -> Iterator[LocalHub]:
    """A Hub without repositories, at which the client of the Hub looks by itself."""
    from huggingface_hub import HfFileSystem

    HfFileSystem.clear_instance_cache()  # or it would know the files of another test
    with LocalHub(port=HUB_PORT) as hub:
        yield hub


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_order():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  timm and torchvision still draw from it


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real ImageNet images and a real annotator, which users do not have."""
    folder = Path(os.environ.get("RELABEL_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "imagenette-train.tar").is_file():
        pytest.skip("real images are not at hand; RELABEL_TEST_DATA may name their folder")
    return folder


def picture(seed: int, size: tuple[int, int] = (40, 56)) -> PIL.Image.Image:
    """Return a smooth random RGB image of (height, width), which JPEG keeps well."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return PIL.Image.fromarray(small).resize((size[1], size[0]), PIL.Image.Resampling.BICUBIC)


def jpeg(seed: int) -> bytes:
    """Return the bytes of a JPEG file of `picture`."""
    buffer = io.BytesIO()
    picture(seed).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Write a tar of (name, content) and return its path."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


class ColourNet(torch.nn.Module):
    """A fully-convolutional classifier of 3 classes, red, green and blue, with stride 8: its maps can be foreseen."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 4 * torch.nn.functional.avg_pool2d(images, 8)


def colours() -> ModuleAnnotator:
    """Return an annotator of the classes of `image_folder` that sees red as cat, green as dog and blue as emu."""
    from relabel_datasets.annotate.annotator import ModuleAnnotator

    return ModuleAnnotator(ColourNet(), (48, 64), classes=("cat", "dog", "emu"), name="colours")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Path:
    """Folder with the originals of `image_folder` and `dataset_folder`. Tests must not change it."""
    from relabel_datasets.annotate.builder import build
    from relabel_datasets.annotate.shard import BuildConfig
    from relabel_datasets.data.sources import ImageFolderSource

    folder = tmp_path_factory.mktemp("made-once")
    for i in range(13):
        path = folder / "images" / ("cat", "dog", "emu")[i % 3] / f"photo_{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, (40, 56) if i % 2 else (48, 32)).save(path, quality=95)
    for config, images in (("colours", True), ("labels-only", False)):
        build(
            ImageFolderSource(folder / "images"),
            folder / "dataset",
            colours(),
            config=config,
            build_config=BuildConfig(images=images, batch_size=4),
            shard_size=5,
            progress=False,
        )
    return folder


@pytest.fixture
def image_folder(made_once: Path, tmp_path: Path) -> Path:
    """An ImageFolder of 3 classes and 13 images of two sizes."""
    return Path(shutil.copytree(made_once / "images", tmp_path / "images"))


@pytest.fixture
def annotator() -> ModuleAnnotator:
    """The annotator that `colours` returns."""
    return colours()


@pytest.fixture
def dataset_folder(made_once: Path, tmp_path: Path, image_folder: Path) -> Path:
    """A dataset with a config `colours` in 3 shards, images inside, and a config `labels-only` of the same images."""
    return Path(shutil.copytree(made_once / "dataset", tmp_path / "dataset"))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of a megabyte of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("only root may make a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
