"""Builds on Ray: a cluster that the engine starts, and one of two nodes with one CPU each, besides the node of the driver."""

import gc
import os
import secrets
import signal
import subprocess
import threading
import time
from contextlib import suppress
from functools import partial
from random import Random

import fsspec
import pytest
import timm
import torch
from safetensors.torch import save_file

import relabel_datasets as rd
from tests.annotate.slow_annotators import (
    ending_annotator,
    failing_annotator,
    signed_in_timm_annotator,
    slow_annotator,
    waiting_annotator,
)
from tests.annotate.test_builder import Interrupted, StopsAfter, annotator_of, files_of
from tests.annotate.test_kill import real_images, tree_of
from tests.conftest import picture
from tests.servers import s3_server

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings in the code of Ray

MEMORY = 80 << 20  # of the object store of each node, in bytes


@pytest.fixture(scope="module", autouse=True)
def ray():
    """Ray with a token, which keeps other users out and does not change files of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        ray = pytest.importorskip("ray")  # reads the variables
        yield ray
        ray.shutdown()
        _wait_for_killed_processes()
        gc.collect()  # what Ray left open warns here, where warnings are ignored


def _wait_for_killed_processes():
    """Wait for processes that Ray has killed. A `Popen` that nobody waited for warns when it is deleted, in any later test."""
    for process in [thing for thing in gc.get_objects() if isinstance(thing, subprocess.Popen)]:
        process.wait(60)


@pytest.fixture(scope="module")
def cluster(ray):
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def nodes(cluster):
    """Two nodes with one CPU each."""
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=MEMORY) for _ in range(2)]
    cluster.wait_for_nodes()
    yield nodes
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node)


def run(source, root, make, engine="local", **more):
    arguments = {"shard_size": 2, "build_config": rd.annotate.BuildConfig(batch_size=1), "progress": False, **more}
    return rd.build(source, root, make, engine=engine, **arguments)


def build_in_thread(*arguments, **more):
    result = {}

    def target():
        try:
            result["manifest"] = run(*arguments, **more)
        except Exception as error:  # noqa: BLE001  checked by the test
            result["error"] = error

    thread = threading.Thread(target=target)
    thread.start()
    return thread, result


def wait_until(condition, what, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture
def many_images(tmp_path):
    for i in range(60):
        path = tmp_path / "many" / ("cat", "dog", "emu")[i % 3] / f"photo_{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return tmp_path / "many"


@pytest.fixture
def one_thread():
    """Use one thread, as an actor does, so that the logits have the same last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("encoding", [{"encoding": "heatmaps"}, {"encoding": "crops", "num_crops": 4}])
def test_an_engine_that_starts_ray_writes_the_shards_of_the_local_engine(
    tmp_path, many_images, one_thread, ray, encoding
):
    """Must be the first of these tests, because the engine would use the cluster of the others."""
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("mobilenetv2_035", num_classes=3).state_dict(), weights)
    network = {"checkpoint": str(weights), "input_size": 64, "num_classes": 3, "classes": ("cat", "dog", "emu")}
    make = partial(rd.TimmAnnotator, "mobilenetv2_035", device="cpu", **network)
    source = rd.data.ImageFolderSource(many_images)
    options = {"shard_size": 17, "build_config": rd.annotate.BuildConfig(batch_size=16, images=False, **encoding)}
    run(source, tmp_path / "local", make, **options)
    run(source, tmp_path / "ray", make, engine=rd.annotate.RayEngine(num_actors=2), **options)
    assert not ray.is_initialized()  # it ends with the build
    assert tree_of(tmp_path / "ray") == tree_of(tmp_path / "local")


def test_losing_an_actor_and_a_node_costs_only_their_current_shards(tmp_path, many_images, cluster, nodes):
    source = rd.data.ImageFolderSource(many_images)
    run(source, tmp_path / "local", slow_annotator)
    data, actors = tmp_path / "data" / "colours", tmp_path / "actors"
    actors.mkdir()
    needed = tmp_path / "needed"
    needed.write_bytes(b"##")
    make = partial(waiting_annotator, actors)
    thread, result = build_in_thread(source, tmp_path / "data", make, engine=rd.annotate.RayEngine())
    wait_until(lambda: len(list(actors.iterdir())) == 2, "an actor on each node")
    assert len({path.name.split("-")[0] for path in actors.iterdir()}) == 2
    wait_until(lambda: list(data.glob("*.tar")), "a shard")
    needed.write_bytes(b"####")
    os.kill(int(next(actors.iterdir()).name.split("-")[1]), signal.SIGKILL)
    wait_until(lambda: len(list(actors.iterdir())) == 3, "another actor")
    cluster.remove_node(nodes[1], allow_graceful=False)
    cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    assert not (data / "_info.json").exists()  # the build must still be running
    wait_until(lambda: len(list(actors.iterdir())) == 4, "an actor on the node that joined")
    thread.join(900)
    assert "manifest" in result, result
    assert files_of(data) == files_of(tmp_path / "local" / "colours")
    assert (tmp_path / "data" / "README.md").read_bytes() == (tmp_path / "local" / "README.md").read_bytes()


def test_25_killed_actors_and_a_lost_node_with_real_images(
    tmp_path, real_data, cluster, nodes, one_thread, monkeypatch
):
    monkeypatch.setattr("relabel_datasets.annotate.ray_actors._MAX_CRASHES", 100)  # all kills may hit one shard
    images, model = real_images(real_data, tmp_path, 200)
    source, options = (
        rd.data.ImageFolderSource(images),
        {"shard_size": 10, "build_config": rd.annotate.BuildConfig(batch_size=5)},
    )
    run(source, tmp_path / "local", partial(rd.TimmAnnotator, "mobilenetv2_100", **model), **options)
    (actors := tmp_path / "actors").mkdir()
    make = partial(signed_in_timm_annotator, actors, "mobilenetv2_100", model)
    random, kills, builds = Random(0), 0, 0
    while kills < 25:
        thread, result = build_in_thread(
            source, tmp_path / f"{builds}", make, engine=rd.annotate.RayEngine(), **options
        )
        while thread.is_alive() and kills < 25:
            time.sleep(random.uniform(0.1, 1))
            if ready := sorted(actors.iterdir()):
                victim = random.choice(ready)
                victim.unlink()
                with suppress(ProcessLookupError):  # lost with its node
                    os.kill(int(victim.name.split("-")[1]), signal.SIGKILL)
                    kills += 1
            if kills == 12 and nodes[1] in cluster.worker_nodes:
                cluster.remove_node(nodes[1], allow_graceful=False)
                cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
        thread.join(900)
        assert "manifest" in result, result
        assert tree_of(tmp_path / f"{builds}") == tree_of(tmp_path / "local")
        for path in actors.iterdir():  # these actors ended with the build
            path.unlink()
        builds += 1


def test_ray_resumes_a_local_build(tmp_path, image_folder, annotator, cluster, nodes, capsys):
    source = rd.data.ImageFolderSource(image_folder)
    (image_folder / "dog" / "photo_04.jpg").write_bytes(b"")
    run(source, tmp_path / "local", annotator)
    with pytest.raises(Interrupted):
        run(source, tmp_path / "data", annotator_of(StopsAfter(5)))
    first = next((tmp_path / "data" / "colours").glob("*.tar"))
    before = first.stat().st_mtime_ns
    capsys.readouterr()
    run(source, tmp_path / "data", annotator, engine="ray", progress=True)
    assert first.stat().st_mtime_ns == before
    assert "13/13" in (error := capsys.readouterr().err)
    assert "photo_04.jpg" in error  # skipped images are reported by the driver
    assert files_of(tmp_path / "data" / "colours") == files_of(tmp_path / "local" / "colours")


def test_actors_upload_their_shards(tmp_path, image_folder, annotator, cluster, nodes):
    source = rd.data.ImageFolderSource(image_folder)
    run(source, tmp_path / "local", annotator)
    with s3_server(tmp_path / "local", "other") as address:
        options = {"key": "testing", "secret": "testing", "client_kwargs": {"endpoint_url": f"http://{address}"}}
        files = fsspec.filesystem("s3", **options)
        files.mkdir("shards")
        run(source, "s3://shards/data", annotator, engine="ray", storage_options=options)
        for path in (tmp_path / "local").rglob("*.*"):
            assert files.cat(f"shards/data/{path.relative_to(tmp_path / 'local')}") == path.read_bytes()


def test_permanent_failures_stop_the_build(tmp_path, image_folder, annotator, ray, cluster, nodes, monkeypatch):
    monkeypatch.setattr("relabel_datasets.annotate.ray_actors._MAX_CRASHES", 2)
    source = rd.data.ImageFolderSource(image_folder)
    with pytest.raises(ValueError, match="no such checkpoint"):
        run(source, tmp_path / "data", failing_annotator, engine="ray")
    with pytest.raises(ChildProcessError, match="2 actors ended at shard"):
        run(
            source,
            tmp_path / "data",
            ending_annotator,
            engine="ray",
            build_config=rd.annotate.BuildConfig(batch_size=2),
        )
    for path in image_folder.glob("*/*"):
        path.write_bytes(b"not an image")
    with pytest.raises(rd.DatasetError, match=r"no image of .* can be used \(2 images\)"):
        run(source, tmp_path / "other", annotator, engine="ray")
    wait_until(lambda: ray.available_resources().get("CPU") == 2, "no actor left")
