"""No stage of a build waits at the end of a shard, and decoding in processes changes no byte."""

import errno
import multiprocessing
import os
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.annotate import prefetch
from relabel_datasets.annotate.annotator import ModuleAnnotator
from relabel_datasets.annotate.pipeline import _Pipeline
from relabel_datasets.annotate.ray_actors import _Worker
from relabel_datasets.annotate.work import Work
from relabel_datasets.storage.output import LocalOutput
from tests.annotate.test_kill import tree_of
from tests.conftest import ColourNet

forks = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
CLASSES = ("cat", "dog", "emu")
WAIT_S = 60  # for what must happen, so that a failing test ends


def open_loader(source, annotator):
    return prefetch.Loader(
        source, annotator, batch_size=2, num_workers=2, max_crops=1, max_unreleased=1, keep_data=False
    )


def build(source, out, annotator, **build_config):
    config = rd.annotate.BuildConfig(**{"batch_size": 2, "num_threads": 2, **build_config})
    return rd.build(source, out, annotator, shard_size=4, build_config=config, progress=False)


class Calls(ModuleAnnotator):
    """Annotator that calls a function with the number of each batch."""

    def __init__(self, function):
        super().__init__(ColourNet(), (48, 64), classes=CLASSES, name="colours", device="cpu")
        self._on_batch, self._number = function, 0

    def __call__(self, images):
        self._on_batch(self._number)
        self._number += 1
        return super().__call__(images)


def test_a_shard_is_stored_while_the_next_one_is_annotated(tmp_path, image_folder, monkeypatch):
    is_next_annotated, waited = threading.Event(), []
    store = Work.store

    def store_later(work, number, annotated):
        if number == 0:
            waited.append(is_next_annotated.wait(WAIT_S))
        store(work, number, annotated)

    monkeypatch.setattr(Work, "store", store_later)
    annotator = Calls(lambda number: is_next_annotated.set() if number == 2 else None)  # shards have two batches
    build(rd.data.ImageFolderSource(image_folder), tmp_path / "out", annotator)
    assert waited == [True]


def test_the_next_shard_is_decoded_while_a_shard_is_annotated(tmp_path, image_folder):
    num_read, is_next_decoded, waited = [], threading.Event(), []

    class Source(rd.data.ImageFolderSource):
        def read(self, index):
            num_read.append(index)
            if len(num_read) > 4:
                is_next_decoded.set()
            return super().read(index)

    annotator = Calls(lambda number: waited.append(is_next_decoded.wait(WAIT_S)) if number == 0 else None)
    build(Source(image_folder), tmp_path / "out", annotator)
    assert waited == [True]


def test_shards_that_were_annotated_are_stored_after_an_error(tmp_path, image_folder, annotator):
    def fail(number):
        if number == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build(rd.data.ImageFolderSource(image_folder), tmp_path / "out", Calls(fail))
    assert [path.name for path in tmp_path.glob("out/*/*.tar*")] == ["train-00000-of-00004.tar"]
    assert not list(tmp_path.glob("out/*/.*.tmp"))


def test_rows_without_an_image_repeat_another_row(image_folder, annotator):
    (image_folder / "cat" / "photo_00.jpg").write_bytes(b"no image")
    source = rd.data.ImageFolderSource(image_folder)
    broken = source.keys.index("photo_00")
    others = [index for index in range(13) if index != broken]
    stages = [prefetch.Stage("one", [others[0], broken, *others[1:4]], None), prefetch.Stage("two", [broken], None)]
    stages.append(prefetch.Stage("three", [others[5], broken, others[6]], 2))
    batches = []
    with prefetch.Loader(
        source, annotator, batch_size=3, num_workers=2, max_crops=2, max_unreleased=1, keep_data=False
    ) as loader:
        for batch in loader.batches(stages):
            pixels = batch.pixels.clone() if batch.pixels is not None else None
            positions = [getattr(image, "position", None) for image in batch.images]
            batches.append((batch.stage.owner, positions, pixels, batch.is_last))
            loader.release()
    assert [(owner, positions, is_last) for owner, positions, _, is_last in batches] == [
        ("one", [others[0], None, others[1]], False),
        ("one", [others[2], others[3]], True),
        ("two", [None], True),
        ("three", [others[5]], False),  # and the first crop of an image that cannot be read
        ("three", [None, others[6]], True),
    ]
    one, end, nothing, crops, last = (pixels for _, _, pixels, _ in batches)
    assert nothing is None
    assert torch.equal(one[1], one[2])
    assert torch.equal(end[2], end[1])
    assert torch.equal(crops[2], crops[1])
    assert torch.equal(last[0], last[2])
    assert not torch.equal(last[1], last[2])
    expected = [annotator.preprocess(rd.decode_image(source.read(i))) for i in (others[0], others[1])]
    assert torch.equal(one[[0, 2]], torch.stack(expected))


def test_pixels_of_another_shape_than_the_first_are_refused(tmp_path, image_folder):
    class Odd(Calls):
        def preprocess(self, image):
            pixels = super().preprocess(image)
            return pixels if image.size == (64, 64) else pixels[:, :40]  # as the first, of a blank image, or not

    with pytest.raises(
        ValueError, match=r"photo_.*preprocess returned pixels of shape \[3, 40, 64\], expected \[3, 48, 64\]"
    ):
        build(rd.data.ImageFolderSource(image_folder), tmp_path / "out", Odd(lambda _number: None))


@pytest.fixture
def in_processes(monkeypatch):
    monkeypatch.setattr(prefetch, "uses_processes", lambda: True)


@forks
@pytest.mark.parametrize("encoding", [{"encoding": "heatmaps"}, {"encoding": "crops", "num_crops": 3}])
def test_processes_write_the_bytes_of_threads(tmp_path, image_folder, annotator, monkeypatch, encoding):
    (image_folder / "cat" / "photo_03.jpg").write_bytes(b"no image")
    source = rd.data.ImageFolderSource(image_folder)
    build(source, tmp_path / "threads", annotator, **encoding)
    reading = []

    class Source(rd.data.ImageFolderSource):
        def read(self, index):
            reading.append(os.getpid())
            return super().read(index)

    monkeypatch.setattr(prefetch, "uses_processes", lambda: True)
    build(Source(image_folder), tmp_path / "processes", annotator, **encoding)
    assert not reading  # in this process
    assert tree_of(tmp_path / "processes") == tree_of(tmp_path / "threads")


@forks
def test_a_limit_of_the_machine_in_a_process_keeps_its_number(tmp_path, image_folder, annotator, in_processes):
    class Source(rd.data.ImageFolderSource):
        def read(self, index):
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with pytest.raises(OSError, match="memory") as caught:
        build(Source(image_folder), tmp_path / "out", annotator)
    assert caught.value.errno == errno.ENOMEM


@forks
def test_a_process_that_ends_stops_the_build(tmp_path, image_folder, annotator, in_processes):
    class Source(rd.data.ImageFolderSource):
        def read(self, index):
            os._exit(1)

    with pytest.raises(ChildProcessError, match=r"a process that decodes images has ended: .* Rerun the same command"):
        build(Source(image_folder), tmp_path / "out", annotator)


@forks
@pytest.mark.parametrize("is_thread", [False, True])
def test_processes_use_one_thread_each_since_others_are_not_forked(image_folder, in_processes, is_thread):
    class Counts(Calls):
        def preprocess(self, image):
            return torch.full((3, 2, 2), torch.get_num_threads(), dtype=torch.uint8)

    def load():
        with open_loader(rd.data.ImageFolderSource(image_folder), Counts(None)) as loader:
            return next(loader.batches([prefetch.Stage(None, [0, 1], None)])).pixels.clone()

    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1) as pool:  # actors of Ray annotate in a thread
            pixels = pool.submit(load).result() if is_thread else load()
    finally:
        torch.set_num_threads(num_threads)
    assert pixels.unique().tolist() == [1]


class Cudart:
    """Stand-in of `torch.cuda.cudart()`."""

    cudaError = type("cudaError", (), {"success": 0})

    def __init__(self, result):
        self.result, self.calls = result, []

    def cudaHostRegister(self, pointer, num_bytes, _flags):
        self.calls.append(("register", pointer, num_bytes, len(multiprocessing.active_children())))
        return self.result

    def cudaHostUnregister(self, pointer):
        self.calls.append(("unregister", pointer))


@forks
def test_memory_is_pinned_after_processes_are_forked_and_until_they_end(image_folder, annotator, monkeypatch):
    cudart = Cudart(0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    with open_loader(rd.data.ImageFolderSource(image_folder), annotator) as loader:
        pixels = next(loader.batches([prefetch.Stage(None, [0, 1], None)])).pixels
        start, num_batches = pixels.data_ptr(), 5  # one in use, and four ahead
        assert cudart.calls == [("register", start, num_batches * pixels.numel(), 2)]
    assert cudart.calls[1:] == [("unregister", start)]
    assert not multiprocessing.active_children()


@forks
def test_an_error_of_pinning_is_reported_and_not_raised_by_the_next_kernel(
    image_folder, annotator, monkeypatch, caplog
):
    cudart, kernels = Cudart(2), []

    def launch(*_size, device):
        kernels.append(device)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch, "ones", launch)
    with open_loader(rd.data.ImageFolderSource(image_folder), annotator) as loader:
        assert next(loader.batches([prefetch.Stage(None, [0, 1], None)])).pixels is not None
    assert kernels == ["cuda"]
    assert [name for name, *_ in cudart.calls] == ["register"]
    assert "bytes of memory cannot be pinned: copies to the GPU are slower" in caplog.text


@pytest.mark.parametrize("fails", [False, True])
def test_a_batch_on_any_gpu_is_encoded_after_it_is_annotated_and_its_pixels_are_released_after_that(monkeypatch, fails):
    log = []

    class Stream:
        def __init__(self, device, priority=0):
            self.device = device

        def wait_event(self, event):
            log.append(("wait for event of", event.device))

        def synchronize(self):
            log.append("synchronize")

    class Event:
        def record(self, stream):
            self.device = stream.device

    class Shard:
        number = 0

        def take(self, _batch, _logits):
            log.append("encode")
            if fails:
                raise ZeroDivisionError

        def is_done(self, _batch):
            return False

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    gpu = torch.device("cuda", 1)
    pipeline = object.__new__(_Pipeline)
    pipeline._stream, pipeline._encoding, pipeline._failed = None, deque(), set()
    batch = SimpleNamespace(stage=SimpleNamespace(owner=Shard()))
    with ThreadPoolExecutor(1) as pipeline._encode_pool:
        pipeline._encode(batch, [SimpleNamespace(is_cuda=True, device=gpu)])
        ((_, future),) = pipeline._encoding
        assert isinstance(future.exception(), ZeroDivisionError if fails else type(None))
    assert log == [("wait for event of", gpu), "encode", "synchronize"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_processes_and_pinned_memory_write_the_bytes_of_threads_on_a_gpu(tmp_path, image_folder, monkeypatch):
    annotator = ModuleAnnotator(ColourNet(), (48, 64), classes=CLASSES, name="colours", device="cuda")
    source = rd.data.ImageFolderSource(image_folder)
    assert prefetch.uses_processes()
    build(source, tmp_path / "processes", annotator)
    monkeypatch.setattr(prefetch, "uses_processes", lambda: False)
    build(source, tmp_path / "threads", annotator)
    assert tree_of(tmp_path / "processes") == tree_of(tmp_path / "threads")
    with open_loader(source, annotator) as loader:
        (batch,) = loader.batches([prefetch.Stage(None, [0, 1], None)])
        assert batch.pixels.is_pinned()


def open_work(source, out):
    """Return the work of a build of shards of four images."""
    plan = {"shard_size": 4, "classes": list(CLASSES)}
    (out / "colours" / ".build-train").mkdir(parents=True)
    config = rd.annotate.BuildConfig(batch_size=2, num_threads=2, k=3, storage_dtype="uint4")
    return Work(LocalOutput(out), "colours", "train", plan, source, config)


def actor_of(work, annotator):
    actor = _Worker()
    actor._work, actor._annotator = work, annotator
    return actor


def test_an_actor_annotates_the_shards_of_several_calls_in_one_thread(tmp_path, image_folder):
    source = rd.data.ImageFolderSource(image_folder)
    build(source, tmp_path / "local", Calls(lambda _number: None))
    work, threads, released = open_work(source, tmp_path / "out"), set(), threading.Event()

    def note(_number):
        threads.add(threading.current_thread().name)
        assert released.wait(WAIT_S)

    actor = actor_of(work, Calls(note))
    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(actor.annotate, [], number) for number in (2, 0, 3, 1)]
        released.set()
        assert [len(result.result().info.rows) for result in results] == [4, 4, 1, 4]
    assert len(threads) == 1
    assert actor.progress() == {}
    for name in work.names:
        assert (tmp_path / "out/colours" / name).read_bytes() == (tmp_path / "local/colours" / name).read_bytes()
    assert len(actor.annotate([], 0).info.rows) == 4  # it is not annotated again


def test_an_actor_fails_the_shards_it_has_started_and_annotates_others(tmp_path, image_folder):
    failures = iter([True])

    def fail(_number):
        if next(failures, False):
            raise ZeroDivisionError

    actor = actor_of(open_work(rd.data.ImageFolderSource(image_folder), tmp_path / "out"), Calls(fail))
    with pytest.raises(ZeroDivisionError):
        actor.annotate([], 1)
    assert len(actor.annotate([], 1).info.rows) == 4
