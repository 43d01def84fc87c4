"""Removing the folder during a build stops it with a clear error at any moment, and the next run rebuilds everything."""

import re

import pytest

import relabel_datasets as rd
from tests.conftest import colours
from tests.sabotage import at_once, files_first, nth, sabotaged

MESSAGES = "|".join(
    (
        "cannot be written to",  # before the build has started
        "was removed during the build",
        "was removed or changed during the build",
        "its build is unfinished",
        "there is no such folder",
        "not on disk",
        "has no config",
    )
)


def files_below(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def build_and_remove(build, root, is_moment, remove):
    """Build; return the error, and whether the moment occurred."""
    error = None
    with sabotaged(root, is_moment, remove) as has_occurred:
        try:
            build(root)
        except (rd.DatasetError, OSError) as raised:
            error = raised
            assert re.search(MESSAGES, str(error)), error
            assert str(root) in str(error)
        return error, has_occurred()


@pytest.fixture(scope="module")
def build(made_once):
    options = {"shard_size": 7, "build_config": rd.annotate.BuildConfig(batch_size=2), "progress": False}
    return lambda root: rd.build(rd.data.ImageFolderSource(made_once / "images"), root, colours(), **options)


@pytest.fixture(scope="module")
def whole(build, tmp_path_factory):
    """Files of a build that nothing disturbs."""
    root = tmp_path_factory.mktemp("whole")
    build(root)
    return files_below(root)


@pytest.mark.parametrize("remove", [at_once, files_first])
@pytest.mark.parametrize(
    "moment",
    [
        ("os.rename", ".plan.json."),
        ("os.rename", ".train-00000-of-00002.tar."),
        ("os.rename", ".train-00001-of-00002.tar.json."),
        ("os.remove", ".train-00001-of-00002.tar.json."),
        ("os.rename", ".train.index.safetensors."),
        ("os.rename", "._info.json."),
        ("os.remove", "._info.json."),
        ("open", "train.index.safetensors"),
        ("os.rename", ".README.md."),
    ],
    ids=" ".join,
)
def test_errors_name_the_removed_folder(tmp_path, build, whole, moment, remove):
    root = tmp_path / "data"
    error, occurred = build_and_remove(
        build, root, lambda event, name: event == moment[0] and name.startswith(moment[1]), remove
    )
    assert occurred
    assert error is not None
    build(root)
    assert files_below(root) == whole


@pytest.mark.slow
@pytest.mark.parametrize("remove", [at_once, files_first])
@pytest.mark.parametrize("repair", [False, True])
def test_a_folder_may_be_removed_at_any_moment(tmp_path, build, whole, repair, remove):
    occurred, number = True, 0
    while occurred:
        root = tmp_path / f"data-{number}"
        if repair:  # one shard is missing
            build(root)
            (root / "colours" / "train-00001-of-00002.tar").unlink()
        number += 1
        _, occurred = build_and_remove(build, root, nth(number), remove)
        build(root)
        assert files_below(root) == whole, number
    assert number > 30
