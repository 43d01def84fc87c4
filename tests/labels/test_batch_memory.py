"""Batches reuse memory that no tensor refers to, and are collated without a copy."""

import gc
import os
import signal
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.labels.batch_memory import BatchMemory, rows_of, whole_of
from relabel_datasets.labels.compose import run_batch
from tests.conftest import picture

SHAPE = (4, 3, 200, 200)  # above 1 MiB in float32
PIPELINE = v2.Compose([v2.Resize((200, 200)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), rd.LabelPooling()])


def samples(first=0, count=4):
    return [
        (picture(first + i, (40, 56)), rd.LabelMap.from_logits(torch.randn(9, 4, 6), canvas_size=(40, 56)))
        for i in range(count)
    ]


def test_memory_is_used_again_when_nothing_refers_to_it():
    memory = BatchMemory()
    place = memory.empty(SHAPE, torch.float32).data_ptr()
    assert memory.empty(SHAPE, torch.float32).data_ptr() == place
    assert memory.empty(SHAPE, torch.int32).data_ptr() == place  # as many bytes


USES = {
    "batch": lambda batch: batch,
    "row": lambda batch: batch[2],
    "type": lambda batch: batch[2].as_subclass(tv_tensors.Image),
    "detached": lambda batch: batch.detach(),
    "part": lambda batch: batch[1, :, ::2].view(torch.int32),
    "array": lambda batch: batch.numpy(),
    "buffer": lambda batch: memoryview(batch.numpy())[1:],
    "dlpack": lambda batch: np.from_dlpack(batch),
    "storage": lambda batch: batch.untyped_storage(),
    "strided": lambda batch: batch.as_strided((2, 2), (5, 7)),
}


@pytest.mark.parametrize("name", USES)
def test_memory_that_is_still_used_is_not_used_again(name):
    memory = BatchMemory()
    batch = memory.empty(SHAPE, torch.float32)
    place, used = batch.data_ptr(), USES[name](batch)
    del batch
    assert memory.empty(SHAPE, torch.float32).data_ptr() != place
    del used
    gc.collect()
    assert place in {memory.empty(SHAPE, torch.float32).data_ptr(), memory.empty(SHAPE, torch.float32).data_ptr()}


def test_threads_never_share_memory():
    memory, places, barrier = BatchMemory(), [], threading.Barrier(8)
    memory.empty(SHAPE, torch.float32)

    def take():
        barrier.wait()
        places.append(memory.empty(SHAPE, torch.float32))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({batch.data_ptr() for batch in places}) == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_is_forked_while_a_thread_takes_memory_can_take_memory(monkeypatch):
    memory, is_taking, is_forked = BatchMemory(), threading.Event(), threading.Event()
    empty = np.empty

    def wait(*args):
        is_taking.set()
        assert is_forked.wait(10)
        return empty(*args)

    monkeypatch.setattr(np, "empty", wait)
    thread = threading.Thread(target=memory.empty, args=(SHAPE, torch.float32))
    thread.start()
    assert is_taking.wait(10)
    child = os.fork()
    if not child:
        signal.alarm(10)  # ends the process if it hangs
        np.empty = empty
        memory.empty(SHAPE, torch.float32)
        os._exit(0)
    is_forked.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_batches_that_are_kept_do_not_change():
    batches = [rd.collate(run_batch(PIPELINE, samples(4 * i)))[0] for i in range(5)]
    expected = [default_collate(run_batch(PIPELINE, samples(4 * i)))[0] for i in range(5)]
    for batch, same in zip(batches, expected, strict=True):
        assert type(batch) is torch.Tensor
        assert torch.equal(batch, same)


def test_a_batch_is_collated_without_a_copy():
    rows = run_batch(PIPELINE, samples())
    images, labels = rd.collate(rows)
    assert images.data_ptr() == rows[0][0].data_ptr()
    assert images.is_contiguous()
    assert labels.shape == (4, 9)


def test_other_tensors_than_the_rows_of_the_last_batch_are_copied():
    whole = torch.arange(24.0).view(4, 6)
    rows = rows_of(whole, torch.Tensor)
    assert torch.equal(whole_of(rows), whole)
    for others in (rows[::-1], rows[:3], [*rows, rows[0]], [row.clone() for row in rows], list(whole)):
        assert whole_of(others) is None
        assert rd.collate(list(others)).data_ptr() != whole.data_ptr()
    rows_of(torch.zeros(4, 6), torch.Tensor)
    assert whole_of(rows) is None


CHANGES = {
    "other data": lambda row: setattr(row, "data", torch.ones(4, 4)),
    "transposed": lambda row: row.t_(),
    "of another shape": lambda row: row.unsqueeze_(0),
}


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("name", CHANGES)
def test_rows_that_no_longer_make_up_the_batch_are_copied(name, place):
    rows = rows_of(torch.arange(64.0).view(4, 4, 4), torch.Tensor)
    CHANGES[name](rows[place])
    assert whole_of(rows) is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_has_the_batches_of_default_collate(dataset_folder, num_workers):
    def batches(**options):
        dataset = rd.load_dataset(dataset_folder, "colours", "train", transforms=PIPELINE)
        sampler = rd.RelabelSampler(dataset.shard_lengths)
        return list(rd.RelabelLoader(dataset, 4, sampler=sampler, num_workers=num_workers, **options))

    for own, expected in zip(batches(), batches(collate_fn=default_collate), strict=True):
        assert all(torch.equal(*pair) for pair in zip(own, expected, strict=True))
