"""An access token is sent only to the Hub, whatever is logged and whatever fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.hub import LocalHub

pytestmark = pytest.mark.slow  # each test starts a new process, whose client waits between attempts

REPO, TOKEN = "org/photos", "hf_mVerySecretTokenOfAUser"
PROGRAM = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)  # all libraries
import relabel_datasets as rd
from relabel_datasets import hub
from relabel_datasets.cli import main
hub._COMMIT_PAUSES_S = ()
repo, folder, token = sys.argv[1], sys.argv[2], {token}
for streaming in (False, True):
    try:
        dataset = rd.load_dataset(repo, "colours", "train", token=token, streaming=streaming)
        print(dataset, repr(dataset), [label_map.key for _, label_map in dataset])
        print(vars(dataset))
    except Exception:
        logging.exception("loading")
try:
    print(rd.publish(folder, repo, token=token))
except Exception:
    logging.exception("publishing")
sys.exit(main(["publish", folder, repo]) | main(["verify", repo, "--json", "report.json"]))
"""


@pytest.fixture
def hub(local_hub, dataset_folder) -> LocalHub:
    local_hub.users[TOKEN] = "user"
    local_hub.publish(REPO, dataset_folder)
    local_hub.repos[REPO].private = True
    return local_hub


def run(folder: Path, home: Path, *, token: str = TOKEN, as_argument: bool = False) -> subprocess.CompletedProcess[str]:
    """Load, publish and verify with debug logging of all libraries. All files are written below `home`."""
    home.mkdir()
    environment = {
        **os.environ,
        "HF_HOME": str(home / "hf"),
        "HOME": str(home),
        "RELABEL_CACHE": str(home / "ours"),
        "TMPDIR": str(home),
        "HF_DEBUG": "1",
        "HF_HUB_VERBOSITY": "debug",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_TOKEN": token,
    }
    code = PROGRAM.format(token=repr(token) if as_argument else None)
    command = [sys.executable, "-c", code, REPO, str(folder)]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)


def assert_kept(hub: LocalHub, home: Path, output: str, token: str = TOKEN) -> None:
    """Assert that a token is in no output, file, file name or repository, and only in requests to the host of the Hub."""
    assert token not in output
    for path in home.rglob("*"):
        assert token not in str(path)
        if path.is_file():
            assert token.encode() not in path.read_bytes(), path
    for name, repo in hub.repos.items():
        for commit in repo.commits.values():
            assert token not in f"{name} {commit}"
            assert all(token.encode() not in file.content for file in commit.files.values())
    assert hub.leaks == []
    assert all(token not in request.path for request in hub.requests)


@pytest.mark.parametrize("as_argument", [True, False])
def test_a_token_is_not_leaked_on_success(hub, dataset_folder, tmp_path, as_argument):
    finished = run(dataset_folder, tmp_path / "home", as_argument=as_argument)
    assert finished.returncode == 0, finished.stderr
    assert any(request.authorization == f"Bearer {TOKEN}" for request in hub.requests)  # the token was used
    assert finished.stderr.count("DEBUG") > 50
    assert "photo_05" in finished.stdout
    assert list((tmp_path / "home").rglob("*.tar"))
    assert_kept(hub, tmp_path / "home", finished.stdout + finished.stderr)


@pytest.mark.parametrize(
    ("fault", "method", "path"),
    [
        ("403", "POST", "/commit/main"),
        ("400", "POST", "/preupload/main"),
        ("401", "GET", f"/api/datasets/{REPO}"),
        ("drop", "PUT", ""),
    ],
)
def test_a_token_is_not_leaked_on_permanent_errors(hub, dataset_folder, tmp_path, fault, method, path):
    hub.commit(REPO, {f"colours/train-{i:05d}-of-00003.tar": None for i in range(3)})
    hub.objects.clear()  # so that files are uploaded again
    hub.fail(fault, path, method=method, times=None)
    finished = run(dataset_folder, tmp_path / "home")
    assert finished.returncode != 0
    assert "Traceback" in finished.stderr  # in the log
    assert_kept(hub, tmp_path / "home", finished.stdout + finished.stderr)


@pytest.mark.parametrize("as_argument", [True, False])
def test_an_invalid_token_is_not_leaked(hub, dataset_folder, tmp_path, as_argument):
    token = "hf_thatNobodyHas"
    finished = run(dataset_folder, tmp_path / "home", token=token, as_argument=as_argument)
    assert finished.returncode != 0
    assert "token" in finished.stderr
    assert_kept(hub, tmp_path / "home", finished.stdout + finished.stderr, token)
