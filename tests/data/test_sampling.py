"""Properties of the order of an epoch, over a grid of shards x ranks x windows x remainders x epochs x stop points."""

import itertools
import json
import pickle

import numpy as np
import pytest
import torch

from relabel_datasets.data.sampling import REMAINDERS, Order, Progress, RelabelSampler

SHARDS = [(5, 3, 8, 1), (1,) * 7, (13,), (0, 4, 0, 9), (6, 6, 6, 6, 6)]
WORLDS = (1, 2, 3, 7)


def orders(remainders=REMAINDERS):
    for lengths, window, remainder in itertools.product(SHARDS, (1, 2, None), remainders):
        yield Order(shard_lengths=lengths, seed=3, window=window, remainder=remainder)


def rows_of_ranks(order, world_size, progress=Progress()):
    return [order.rows(progress, world_size, rank).tolist() for rank in range(world_size)]


@pytest.mark.parametrize("world_size", WORLDS)
def test_ranks_are_disjoint_complete_and_equal(world_size):
    for order, epoch in itertools.product(orders(), range(3)):
        ranks = rows_of_ranks(order, world_size, Progress(epoch))
        everything, seen = set(range(sum(order.shard_lengths))), list(itertools.chain(*ranks))
        lengths = [len(rank) for rank in ranks]
        assert lengths == [order.num_samples(world_size, rank) for rank in range(world_size)]
        if order.remainder == "uneven":
            assert sorted(seen) == sorted(everything)
            assert max(lengths) - min(lengths) <= 1
            continue
        assert len(set(lengths)) == 1
        if order.remainder == "drop":
            assert len(seen) == len(set(seen))
            assert len(everything - set(seen)) < world_size
        else:
            assert set(seen) == everything
            assert len(seen) - len(everything) < world_size


@pytest.mark.parametrize("world_size", WORLDS)
def test_an_epoch_resumes_exactly_at_every_sample_any_number_of_times(world_size):
    for order, epoch in itertools.product(orders(), (0, 4)):
        for rank, whole in enumerate(rows_of_ranks(order, world_size, Progress(epoch))):
            for stop in range(len(whole) + 1):
                progress = Progress(epoch).after(stop, world_size)
                assert order.rows(progress, world_size, rank).tolist() == whole[stop:]
                again = progress.after(1, world_size)
                assert order.rows(again, world_size, rank).tolist() == whole[stop + 1 :]
                assert len(again.stages) == 1


@pytest.mark.parametrize(("first", "second", "third"), [(1, 2, 3), (3, 1, 2), (2, 3, 2), (3, 2, 7), (7, 3, 1)])
def test_other_world_sizes_resume_without_lost_or_repeated_samples(first, second, third):
    for order in orders(["uneven"]):
        count = sum(order.shard_lengths)
        for stop in range(count // first + 1):
            progress = Progress(1)
            seen = [row for rank in rows_of_ranks(order, first, progress) for row in rank[:stop]]
            progress = progress.after(stop, first)
            more = (count - len(seen)) // second // 2
            seen += [row for rank in rows_of_ranks(order, second, progress) for row in rank[:more]]
            progress = progress.after(more, second)
            seen += list(itertools.chain(*rows_of_ranks(order, third, progress)))
            assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("remainder", ["drop", "repeat"])
def test_ranks_are_equal_after_a_change_of_the_world_size(remainder):
    for order in orders([remainder]):
        count = sum(order.shard_lengths)
        for stop in range(count // 3 + 1):
            progress = Progress(1)
            seen = [row for rank in rows_of_ranks(order, 3, progress) for row in rank[:stop]]
            ranks = rows_of_ranks(order, 2, progress.after(stop, 3))
            assert len(ranks[0]) == len(ranks[1])
            rest = list(itertools.chain(*ranks))
            assert not set(seen) & set(rest)
            assert abs(len(set(seen)) + len(rest) - count) < 2
            assert len(set(seen) | set(rest)) > count - 2


def test_the_order_depends_only_on_seed_and_epoch():
    lengths = (20, 30, 25)
    order = Order(shard_lengths=lengths, seed=1, window=2, remainder="drop")
    same = Order(shard_lengths=lengths, seed=1, window=2, remainder="drop")
    other = Order(shard_lengths=lengths, seed=2, window=2, remainder="drop")
    for epoch in range(3):
        assert rows_of_ranks(order, 3, Progress(epoch)) == rows_of_ranks(same, 3, Progress(epoch))
        assert rows_of_ranks(order, 3, Progress(epoch)) != rows_of_ranks(other, 3, Progress(epoch))
        assert rows_of_ranks(order, 3, Progress(epoch)) != rows_of_ranks(order, 3, Progress(epoch + 1))


def test_the_first_rows_are_unchanged():  # otherwise a state of an older version would silently resume elsewhere
    order = Order(shard_lengths=(4, 4, 4), seed=0, window=2, remainder="drop")
    assert rows_of_ranks(order, 2, Progress(5)) == [[3, 0, 2, 1, 4, 5], [6, 7, 11, 10, 9, 8]]


def test_without_a_seed_the_order_is_that_of_the_shards():
    order = Order(shard_lengths=(3, 4), seed=None, window=1, remainder="uneven")
    assert rows_of_ranks(order, 2, Progress(9)) == [[0, 1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("window", [1, 3, 10])
def test_a_rank_reads_only_the_shards_of_its_window_at_a_time(window):
    order = Order(shard_lengths=(50,) * 40, seed=0, window=window, remainder="drop")
    for world_size in (1, 4):
        touched = []
        for rank in range(world_size):
            shards = order.rows(Progress(), world_size, rank) // 50
            first = {shard: int(np.argmax(shards == shard)) for shard in set(shards.tolist())}
            last = {shard: len(shards) - 1 - int(np.argmax(shards[::-1] == shard)) for shard in first}
            at_a_time = [sum(first[shard] <= place <= last[shard] for shard in first) for place in range(len(shards))]
            assert max(at_a_time) <= window + 1
            assert window == 1 or np.mean(at_a_time[len(shards) // 2]) > window / 2
            touched += first
        assert len(touched) == 40  # each shard is read by one rank, where they divide


def test_without_a_window_all_shards_are_mixed():
    rows = Order(shard_lengths=(100,) * 20, seed=0, window=None, remainder="drop").rows(Progress(), 1, 0)
    assert len(set((rows[:100] // 100).tolist())) > 15


def sampler(**arguments):
    return RelabelSampler((5, 3, 8, 1), **arguments)


def test_a_sampler_yields_the_rows_of_its_rank():
    ranks = [list(sampler(rank=rank, world_size=3, remainder="uneven")) for rank in range(3)]
    assert sorted(itertools.chain(*ranks)) == list(range(17))
    assert [len(sampler(rank=rank, world_size=3)) for rank in range(3)] == [5, 5, 5]
    assert list(sampler(shuffle=False)) == list(range(17))


def test_a_sampler_resumes_at_every_sample_twice_and_continues_with_the_next_epoch():
    whole = sampler(seed=1)
    epochs = list(itertools.chain(whole, whole, whole))
    for stop, more in itertools.product(range(18), (0, 1, 5)):
        first, second, third = sampler(seed=1), sampler(seed=1), sampler(seed=1)
        seen = list(itertools.islice(first, stop))
        second.load_state_dict(first.state_dict())
        seen += itertools.islice(second, more)
        third.load_state_dict(second.state_dict())
        assert len(third) == 17 - len(seen) % 17
        seen += third
        assert len(third) == 17
        seen += third
        assert len(seen) in (34, 51)
        assert seen == epochs[: len(seen)]


def test_each_iteration_reads_the_next_epoch_unless_one_was_chosen():
    chosen = sampler()
    epochs = []
    for epoch in range(5):
        chosen.set_epoch(epoch)
        assert chosen.epoch == epoch
        epochs.append(list(chosen))
    assert len(set(map(tuple, epochs))) == 5
    counting = sampler()
    assert [list(counting) for _ in range(3)] == epochs[:3]
    counting.set_epoch(1)
    counting.set_epoch(1)
    assert [list(counting) for _ in range(2)] == epochs[1:3]
    counting.set_epoch(2)  # of the same number: again, from its beginning
    assert [list(counting) for _ in range(2)] == epochs[2:4]


@pytest.mark.parametrize("stop", [0, 1, 16, 17])
def test_an_iteration_that_was_stopped_is_followed_by_the_next_epoch(stop):
    whole, stopped = sampler(), sampler()
    epochs = [list(whole) for _ in range(3)]
    iterator = iter(stopped)
    assert list(itertools.islice(iterator, stop)) == epochs[0][:stop]
    state = stopped.state_dict()
    assert (state["epoch"], state["stages"]) == ((1, []) if stop == 17 else (0, [[1, stop]] if stop else []))
    assert list(stopped) == epochs[1 if stop else 0]  # an iteration begins with its first sample


def test_set_epoch_keeps_a_resumed_epoch_and_begins_others():
    first = sampler()
    first.set_epoch(2)
    whole = list(first)
    resumed = sampler()
    resumed.load_state_dict(first.state_dict(4))
    resumed.set_epoch(2)
    assert list(resumed) == whole[4:]
    resumed.set_epoch(2)  # it was begun: now from its beginning
    assert list(resumed) == whole
    resumed.load_state_dict(first.state_dict(4))
    resumed.set_epoch(3)
    assert len(list(resumed)) == 17
    assert resumed.progress == Progress(3)
    for epoch in (-1, 2**22):
        with pytest.raises(ValueError, match="from 0 to 4194303"):
            resumed.set_epoch(epoch)


@pytest.mark.parametrize("remainder", REMAINDERS)
def test_the_state_of_a_finished_epoch_is_the_next_epoch_on_all_ranks(remainder):
    for world_size, taken in itertools.product((1, 2, 3), range(19)):
        ranks = [sampler(rank=rank, world_size=world_size, remainder=remainder) for rank in range(world_size)]
        states = [each.state_dict(taken) for each in ranks]
        assert all(state == states[0] for state in states)
        is_finished = taken >= max(map(len, ranks))
        assert states[0]["epoch"] == int(is_finished)
        assert states[0]["stages"] == ([] if is_finished or not taken else [[world_size, taken]])


def test_frameworks_that_keep_distributed_samplers_keep_it():
    there = sampler(rank=2, world_size=3, seed=4)
    assert isinstance(there, torch.utils.data.DistributedSampler)
    assert (there.rank, there.num_replicas, there.epoch, there.seed, there.shuffle) == (2, 3, 0, 4, True)
    there.set_epoch(3)
    assert there.epoch == 3


def test_the_rank_is_found_in_torchs_environment(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    there = sampler()
    assert there.rank_and_size == (2, 3)
    copy = pickle.loads(pickle.dumps(there))
    assert copy.rank_and_size == (2, 3)
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert copy.rank_and_size == (0, 1)  # another process has its own rank
    assert sampler().rank_and_size == (0, 1)


@pytest.mark.parametrize("values", [("1", None), (None, "4"), ("3", "2"), ("-1", "2"), ("x", "2"), ("0", "")])
def test_an_environment_in_which_samples_would_be_lost_is_refused(values, monkeypatch):
    for name, value in zip(("RANK", "WORLD_SIZE"), values, strict=True):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"RANK=.* and WORLD_SIZE=.*: unset both, or pass rank= and world_size="):
        len(sampler())


def test_empty_variables_of_ranks_are_those_of_one_process(monkeypatch):
    monkeypatch.setenv("RANK", "")
    monkeypatch.setenv("WORLD_SIZE", "")
    assert sampler().rank_and_size == (0, 1)


def test_the_rank_is_found_in_torch_distributed(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert sampler().rank_and_size == (0, 1)
        assert sampler(rank=1, world_size=4).rank_and_size == (1, 4)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"remainder": "pad"}, "'drop', 'repeat', 'uneven'"),
        ({"window": 0}, "at least 1 shard"),
        ({"rank": 1}, "pass both rank= and world_size=, or neither"),
        ({"rank": 3, "world_size": 3}, "3 of 3"),
        ({"rank": -1, "world_size": 3}, "-1 of 3"),
    ],
)
def test_arguments_out_of_range_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        sampler(**arguments)


def test_states_of_another_order_are_rejected_with_the_differences():
    state = sampler(seed=1, window=4).state_dict(3)
    with pytest.raises(ValueError, match=r"seed is 1 there, 0 here, window is 4 there, None here"):
        sampler().load_state_dict(state)
    with pytest.raises(ValueError, match=r"num_samples is 17 there, 5 here"):
        RelabelSampler((1, 4), seed=1, window=4).load_state_dict(state)
    with pytest.raises(ValueError, match="not a state"):
        sampler().load_state_dict({"epoch": 3})


def test_a_state_is_small_and_json():

    big = RelabelSampler([5000] * 257)
    state = big.state_dict(123_456)
    assert json.loads(json.dumps(state)) == state
    assert len(json.dumps(state)) < 300
