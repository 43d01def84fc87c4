"""The parts of accelerate that split samples, in one process: our order is whole there, and split elsewhere."""

import itertools

import pytest
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard, SkipBatchSampler, SkipDataLoader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

import relabel_datasets as rd
from relabel_datasets.data import frameworks
from tests.data.test_stream import NUM_SAMPLES, folder, number_of, numbers, stream_of  # noqa: F401

LENGTHS = (5, 3, 5)


@pytest.fixture(autouse=True)
def second_of_two_ranks(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")


class Wrapped(IterableDataset):
    """A dataset of a user, around a stream."""

    def __init__(self, stream):
        self.stream = stream

    def __iter__(self):
        return (number + 100 for number in self.stream)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("batch_size", "split_batches"), [(2, False), (4, True)])
def test_a_shard_of_a_stream_has_the_samples_of_its_process_in_equal_batches(
    folder, num_workers, batch_size, split_batches  # noqa: F811
):  # fmt: skip
    order = list(stream_of(folder, rank=0, world_size=1))
    seen = []
    for process in (0, 1):
        shard = IterableDatasetShard(
            stream_of(folder), batch_size, num_processes=2, process_index=process, split_batches=split_batches
        )
        batches = [batch.tolist() for batch in DataLoader(shard, 2, num_workers=num_workers)]
        assert len(batches) == -(-NUM_SAMPLES // 4)
        seen.append(batches)
    together = [number for both in zip(*seen, strict=True) for batch in both for number in batch]
    assert together[:NUM_SAMPLES] == order  # and then samples that fill up the last batches


def test_a_shard_of_a_users_dataset_around_a_stream_is_whole(folder):  # noqa: F811
    shards = [IterableDatasetShard(Wrapped(stream_of(folder)), 1, num_processes=2, process_index=i) for i in (0, 1)]
    assert {number for shard in shards for number in shard} == set(range(100, 100 + NUM_SAMPLES))
    assert len(list(Wrapped(stream_of(folder)))) == NUM_SAMPLES // 2


def test_a_shard_of_a_sampler_is_whole():
    def batches(process):
        sampler = BatchSampler(rd.RelabelSampler(LENGTHS), 2, drop_last=False)
        assert len(sampler) == 3  # of this rank alone
        shard = BatchSamplerShard(sampler, num_processes=2, process_index=process, even_batches=False)
        return len(shard), list(shard)

    (length, first), (other_length, second) = batches(0), batches(1)
    assert (length, other_length) == (len(first), len(second)) == (4, 3)
    order = list(rd.RelabelSampler(LENGTHS, rank=0, world_size=1))
    pairs = itertools.zip_longest(first, second, fillvalue=[])
    assert [row for pair in pairs for batch in pair for row in batch] == order


def test_an_order_that_is_split_already_is_refused(folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(frameworks, "num_accelerate_processes", lambda: 2)
    stream = stream_of(folder, rank=1, world_size=2)
    with pytest.raises(ValueError, match="remove rank= and world_size="):
        next(iter(IterableDatasetShard(stream, 1, num_processes=2)))
    sampler = rd.RelabelSampler(LENGTHS, rank=0, world_size=2)
    with pytest.raises(ValueError, match="rank=0, world_size=2"):
        list(BatchSamplerShard(BatchSampler(sampler, 1, False), num_processes=2))
    monkeypatch.setattr(frameworks, "num_accelerate_processes", lambda: 1)  # it splits nothing
    assert len(list(BatchSamplerShard(BatchSampler(sampler, 1, False)))) == sum(LENGTHS) // 2


def test_skipping_splits_nothing_and_needs_the_epoch(folder):  # noqa: F811
    stream, sampler = stream_of(folder), rd.RelabelSampler(LENGTHS)
    loaders = {
        stream: lambda: SkipDataLoader(stream, skip_batches=1, batch_size=2),
        sampler: lambda: SkipBatchSampler(BatchSampler(sampler, 2, False), skip_batches=1),
    }
    for order, loader in loaders.items():
        with pytest.raises(RuntimeError, match=r"call set_epoch\(epoch\)"):
            list(loader())
        order.set_epoch(4)
        whole = list(order)
        order.set_epoch(4)
        assert [number for batch in loader() for number in (batch if order is sampler else batch.tolist())] == whole[2:]
