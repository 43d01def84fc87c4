"""After SIGKILL at any moment, the next run writes the same bytes as an uninterrupted build and leaves no other files."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

import relabel_datasets as rd
from tests.annotate.crop_releases import write_fkd
from tests.conftest import ROOT, picture
from tests.test_real_data import MODEL


def kill_builds(job, timeout=1200):
    process = subprocess.run(
        [sys.executable, "-m", "tests.annotate.kill_driver"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=timeout,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def tree_of(root):
    """Return all files and folders below a folder, including hidden ones."""
    return {str(path.relative_to(root)): path.is_file() and path.read_bytes() for path in root.rglob("*")}


def assert_all_equal(out, reference):
    whole = tree_of(reference)
    assert any(name.endswith(".tar") for name in whole)
    for root in out.iterdir():
        assert tree_of(root) == whole, root


@pytest.fixture
def small_images(tmp_path):
    for i in range(40):
        path = tmp_path / "images" / ("cat", "dog", "emu")[i % 3] / f"photo_{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return tmp_path / "images"


def job_of(tmp_path, images, **more):
    (tmp_path / "out").mkdir()
    return {"images": str(images), "out": str(tmp_path / "out"), "seed": 0, "batch_size": 2, "shard_size": 4, **more}


def uninterrupted(tmp_path, job):
    """Build once, in the same type of process."""
    (tmp_path / "whole").mkdir()
    kill_builds({**job, "out": str(tmp_path / "whole"), "kills": 0})
    return tmp_path / "whole" / "000"


@pytest.mark.slow  # tests of `build` cover a single kill
def test_25_kills_at_random_moments(tmp_path, small_images):
    job = job_of(tmp_path, small_images, seconds=0.01, kills=25, seconds_alive=0.3)
    assert kill_builds(job)["kills"] == 25
    assert_all_equal(tmp_path / "out", uninterrupted(tmp_path, job))


@pytest.mark.slow
def test_25_kills_of_a_build_of_stored_crops(tmp_path, small_images):
    crops = {"encoding": "crops", "num_crops": 6}
    job = job_of(tmp_path, small_images, seconds=0.003, kills=25, seconds_alive=0.3, build_config=crops)
    assert kill_builds(job)["kills"] == 25
    whole = uninterrupted(tmp_path, job)
    assert rd.load_dataset(whole, split="train")[0][1].num_crops == 6
    assert_all_equal(tmp_path / "out", whole)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["build", "import"])
def test_a_kill_before_each_change_to_the_folder(tmp_path, image_folder, command):
    job = job_of(tmp_path, image_folder, seconds=0.0, kills=1000, shard_size=5)
    if command == "import":
        write_fkd(tmp_path / "release", image_folder)
        job["release"] = str(tmp_path / "release")
    result = kill_builds(job)
    assert result["kills"] == result["rounds"] > 30
    assert_all_equal(tmp_path / "out", uninterrupted(tmp_path, job))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [False, True])
def test_a_kill_before_each_batch_in_and_between_shards(tmp_path, image_folder, processes):
    job = job_of(tmp_path, image_folder, seconds=0.0, kills=1000, shard_size=5, kill_at="batches", processes=processes)
    assert kill_builds(job) == {"kills": 8, "rounds": 8}  # shards of 3, 3 and 2 batches
    assert_all_equal(tmp_path / "out", uninterrupted(tmp_path, job))


def children_of(pid):
    """Return the processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
def test_processes_that_decode_end_with_a_killed_build(tmp_path, image_folder):
    job = job_of(tmp_path, image_folder, seconds=1, kills=0, processes=True)
    code = f"import json; from tests.annotate import kill_driver as d; d.os.waitpid(d.start(json.loads({json.dumps(job)!r}), {job['out']!r}), 0)"
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while not (builds := children_of(driver.pid)) or len(workers := children_of(builds[0])) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(builds[0], signal.SIGKILL)
        while any(is_running(pid) for pid in workers):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        driver.kill()
        driver.wait()


def is_running(pid):
    """Return whether a process exists and is not a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def real_images(real_data, folder, count):
    """Return an ImageFolder with images of Imagenette, and the arguments of an annotator."""
    with tarfile.open(real_data / "imagenette-train.tar") as tar:
        members = [member for member in tar if member.isfile()]
        for member in members[:: len(members) // count][:count]:
            tar.extract(member, folder, filter="data")
    return folder / "train", {**MODEL, "checkpoint": str(real_data / MODEL["checkpoint"]), "input_size": 224}


@pytest.mark.slow
def test_25_kills_of_a_real_build(tmp_path, real_data):
    images, model = real_images(real_data, tmp_path, 400)
    job = job_of(tmp_path, images, model="mobilenetv2_100", model_kwargs=model, batch_size=16, shard_size=25)
    job |= {"kills": 25, "seconds_alive": 4}
    assert kill_builds(job)["kills"] == 25
    assert_all_equal(tmp_path / "out", uninterrupted(tmp_path, job))
