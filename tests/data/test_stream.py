"""Properties of streams and loaders, over a grid of ranks x workers x stop points, with real DataLoaders."""

import contextlib
import itertools
import pickle

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import relabel_datasets as rd
from relabel_datasets.data.sampling import REMAINDERS

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than processors
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata's loader calls it
]
NUM_SAMPLES = 13


def number_of(image, label_map):
    return int(label_map.key[-2:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A label-only dataset of 13 samples in 5 shards, and its images."""
    from relabel_datasets.annotate.annotator import ModuleAnnotator
    from relabel_datasets.annotate.builder import build
    from tests.conftest import ColourNet, picture

    root = tmp_path_factory.mktemp("stream")
    for i in range(NUM_SAMPLES):
        path = root / "images" / "abc"[i % 3] / f"photo_{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, (8, 8)).save(path)
    annotator = ModuleAnnotator(ColourNet(), (48, 64), classes=("a", "b", "c"), name="colours")
    build(rd.data.ImageFolderSource(root / "images"), root / "data", annotator, shard_size=3, progress=False)
    return root / "data"


def stream_of(folder, **arguments):
    return rd.load_dataset(folder, split="train", streaming=True, transforms=number_of, **arguments)


def test_a_stream_has_the_classes_of_its_dataset_and_shows_what_it_reads(folder):
    stream = stream_of(folder)
    assert stream.classes == stream.dataset.classes == ("a", "b", "c")
    assert repr(stream).startswith(f"Dataset RelabelStream\n    Number of datapoints: {NUM_SAMPLES}\n")


def numbers(batches):
    """Return the samples in a loader's batches."""
    return [number for batch in batches for number in batch.tolist()]


def ranks_of(folder, world_size, **arguments):
    return [stream_of(folder, rank=rank, world_size=world_size, **arguments) for rank in range(world_size)]


@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize(
    ("world_size", "num_workers"), [(1, 0), (5, 0), (1, 1), (2, 3), pytest.param(1, 7, marks=pytest.mark.slow)]
)
def test_every_rank_sees_its_samples_once_with_any_number_of_workers(folder, world_size, num_workers, remainder):
    ranks = ranks_of(folder, world_size, remainder=remainder, seed=1)
    seen = []
    for stream in ranks:
        stream.set_epoch(2)
        expected = list(stream)
        assert len(expected) == len(stream)
        stream.set_epoch(2)
        assert numbers(rd.RelabelLoader(stream, 2, num_workers=num_workers)) == expected  # the order is the same, too
        stream.set_epoch(2)
        assert numbers(DataLoader(stream, 4, num_workers=num_workers)) == expected
        seen += expected
    assert len(seen) - len(set(seen)) == {"repeat": -NUM_SAMPLES % world_size}.get(remainder, 0)
    assert NUM_SAMPLES - len(set(seen)) == {"drop": NUM_SAMPLES % world_size}.get(remainder, 0)


def test_every_epoch_has_another_order_and_the_same_one_again(folder):
    stream = stream_of(folder)
    counted = [list(stream) for _ in range(3)]
    epochs = []
    for epoch in (0, 1, 2, 0, 1, 2):
        stream.set_epoch(epoch)
        epochs.append(list(stream))
    assert epochs[:3] == epochs[3:] == counted
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(stream_of(folder, shuffle=False)) == [number_of(None, m) for m in stream.dataset.label_maps.values()]


PLAIN, STATEFUL, OURS, SAMPLED = "DataLoader", "StatefulDataLoader", "RelabelLoader", "RelabelLoader(sampler)"


def loader_of(kind, folder, batch_size=2, **arguments):
    """Return (loader, the object that set_epoch is called on)."""
    if kind == SAMPLED:
        dataset = rd.load_dataset(folder, split="train", transforms=number_of)
        sampler = rd.RelabelSampler(dataset.shard_lengths, window=8)
        return rd.RelabelLoader(dataset, batch_size, sampler=sampler, **arguments), sampler
    stream = stream_of(folder)
    types = {PLAIN: DataLoader, STATEFUL: StatefulDataLoader, OURS: rd.RelabelLoader}
    return types[kind](stream, batch_size, **arguments), stream


WORKERS = {
    "none": {"num_workers": 0},
    "forked": {"num_workers": 2},
    "persistent": {"num_workers": 2, "persistent_workers": True},
    "spawned": {"num_workers": 1, "multiprocessing_context": "spawn"},
    "spawned, persistent": {"num_workers": 2, "multiprocessing_context": "spawn", "persistent_workers": True},
}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "workers"),
    [
        *itertools.product([PLAIN, STATEFUL, OURS, SAMPLED], ["none", "forked"]),
        *itertools.product([PLAIN, OURS], ["persistent"]),
        *(slow(kind, "persistent") for kind in (STATEFUL, SAMPLED)),
        slow(OURS, "spawned"),  # alone, since every iteration starts a process that imports torch
        *(slow(kind, "spawned, persistent") for kind in (PLAIN, STATEFUL, OURS, SAMPLED)),
    ],
)
def test_each_iteration_of_any_loader_reads_the_next_epoch_unless_one_was_chosen(folder, kind, workers):
    whole = stream_of(folder)
    epochs = [list(whole) for _ in range(6)]
    loader, order = loader_of(kind, folder, **WORKERS[workers])
    assert [numbers(loader), numbers(loader)] == epochs[:2]
    iterator = iter(loader)
    assert numbers(itertools.islice(iterator, 2)) == epochs[2][:4]  # stopped after a known number of batches
    del iterator
    assert numbers(loader) == epochs[3]
    order.set_epoch(1)
    assert numbers(loader) == epochs[1]
    order.set_epoch(1)  # of the same number: again, from its beginning
    assert [numbers(loader), numbers(loader)] == epochs[1:3]
    torch.manual_seed(0)  # the seeds of workers do not count
    assert numbers(loader) == epochs[3]
    torch.manual_seed(0)
    assert numbers(loader) == epochs[4]


@pytest.mark.parametrize(
    ("kind", "workers", "is_exhausted"),
    [
        *itertools.product([PLAIN, OURS, SAMPLED], ["none", "forked"], [False, True]),
        *(slow(kind, "persistent", is_exhausted) for kind in (PLAIN, OURS, SAMPLED) for is_exhausted in (False, True)),
        slow(OURS, "spawned", False),
    ],
)
def test_the_epoch_after_a_resumed_one_is_whole(folder, kind, workers, is_exhausted):
    whole = stream_of(folder)
    epochs = [list(whole) for _ in range(5)]
    loader, order = loader_of(kind, folder, **WORKERS[workers])
    resume = (loader if kind in (OURS, SAMPLED) else order).load_state_dict
    resume({**stream_of(folder).state_dict(6), "epoch": 2})
    assert len(loader) == 4
    if is_exhausted:
        assert numbers(loader) == epochs[2][6:]
    else:
        assert numbers(itertools.islice(loader, 4)) == epochs[2][6:]
    if kind in (OURS, SAMPLED):
        assert (loader.state_dict()["epoch"], loader.state_dict()["stages"]) == (3, [])
    assert len(loader) == 7
    assert [numbers(loader), numbers(loader)] == epochs[3:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_iterators_of_one_loader_read_two_whole_epochs(folder, num_workers):
    whole = stream_of(folder)
    epochs = [list(whole) for _ in range(3)]
    loader, _ = loader_of(PLAIN, folder, num_workers=num_workers)
    first, second = zip(*zip(loader, loader, strict=True), strict=True)
    assert [numbers(first), numbers(second), numbers(loader)] == epochs


def test_a_copy_of_a_stream_continues_independently(folder):
    whole = stream_of(folder)
    epochs = [list(whole) for _ in range(3)]
    loader, stream = loader_of(PLAIN, folder, num_workers=1)
    assert numbers(loader) == epochs[0]
    stream.dataset.transforms = None
    copy = pickle.loads(pickle.dumps(stream))
    stream.dataset.transforms = copy.dataset.transforms = number_of
    assert [list(copy), list(copy)] == epochs[1:]
    assert list(stream) == epochs[1]


def test_lengths_are_of_the_iteration_that_runs_or_begins_next(folder):
    loader, stream = loader_of(OURS, folder, 4, drop_last=True)
    assert (len(loader), len(stream)) == (3, 13)
    loader.load_state_dict(stream_of(folder).state_dict(4))
    assert (len(loader), len(stream)) == (2, 9)
    batches = iter(loader)
    next(batches)
    assert (len(loader), loader.epoch) == (2, 0)
    next(batches)
    assert (len(loader), loader.epoch, loader.state_dict()["epoch"]) == (3, 0, 1)  # one sample fills no batch
    assert len(list(loader)) == 3
    assert loader.epoch == 1


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_follow_set_epoch(folder, persistent):
    stream = stream_of(folder)
    expected = []
    for epoch in range(3):
        stream.set_epoch(epoch)
        expected.append(list(stream))
    loader = rd.RelabelLoader(stream, 2, num_workers=2, persistent_workers=persistent)
    for epoch in range(3):
        loader.set_epoch(epoch)
        assert numbers(loader) == expected[epoch]
        loader.set_epoch(epoch)
        assert numbers(loader) == expected[epoch]


def test_a_stream_resumes_at_every_sample_twice_in_a_row(folder):
    whole = stream_of(folder)
    epochs = list(itertools.chain(whole, whole, whole))
    for stop, more in itertools.product(range(NUM_SAMPLES + 1), (0, 1, 4)):
        first, second, third = (stream_of(folder) for _ in range(3))
        seen = list(itertools.islice(first, stop))
        second.load_state_dict(first.state_dict())
        seen += itertools.islice(second, more)
        third.load_state_dict(second.state_dict())
        assert len(third) == NUM_SAMPLES - len(seen) % NUM_SAMPLES
        seen += third
        seen += third  # and then a whole epoch
        assert seen == epochs[: len(seen)]
        assert len(seen) % NUM_SAMPLES == 0


@pytest.mark.parametrize("kind", ["stream", pytest.param("sampler", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("before", "after", "batch_size"),
    [
        (0, 0, 1),
        (0, 0, 4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, 3, 4), (2, 2, 4), (3, 0, 4)]),
    ],
)
def test_a_loader_resumes_at_every_batch_with_another_number_of_workers(folder, kind, before, after, batch_size):
    def loader(num_workers):
        if kind == "stream":
            return rd.RelabelLoader(stream_of(folder), batch_size, num_workers=num_workers)
        dataset = rd.load_dataset(folder, split="train", transforms=number_of)
        sampler = rd.RelabelSampler(dataset.shard_lengths)
        return rd.RelabelLoader(dataset, batch_size, sampler=sampler, num_workers=num_workers)

    first = loader(0)
    first.set_epoch(3)
    epochs = numbers(itertools.chain(first, first, first))
    for stop in range(len(first) + 1):
        first = loader(before)
        first.set_epoch(3)
        seen = numbers(itertools.islice(first, stop))
        second = loader(after)
        second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
        assert len(second) == (len(first) - stop or len(first))
        assert second.epoch == (4 if stop == len(first) else 3)
        second.set_epoch(second.epoch)
        seen += numbers(itertools.islice(second, 1))
        third = loader(before)
        third.load_state_dict(second.state_dict())
        assert seen + numbers(itertools.chain(third, third)) == epochs[: len(seen) // NUM_SAMPLES * NUM_SAMPLES + 26]
        third.set_epoch(3)
        assert numbers(third) == epochs[:NUM_SAMPLES]


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_a_loader_resumes_on_other_ranks(folder, before, after):
    for first_size, second_size in ((1, 3), (3, 2)):
        seen, states = [], []
        for stream in ranks_of(folder, first_size, remainder="uneven", window=2):
            loader = rd.RelabelLoader(stream, 2, num_workers=before)
            seen += numbers(itertools.islice(iter(loader), 2))
            states.append(loader.state_dict())
        assert states[0]["stages"] == states[-1]["stages"] == [[first_size, 4]]
        for stream in ranks_of(folder, second_size, remainder="uneven", window=2):
            loader = rd.RelabelLoader(stream, 2, num_workers=after)
            loader.load_state_dict(states[-1])
            seen += numbers(loader)
        assert sorted(seen) == list(range(NUM_SAMPLES))


@pytest.mark.parametrize(
    ("num_workers", "batch_size"),
    [(0, 1), (0, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, 3), (3, 1)])],
)
def test_torchdatas_loader_resumes_at_every_batch(folder, num_workers, batch_size):
    def loader():
        return StatefulDataLoader(stream_of(folder), batch_size, num_workers=num_workers)

    whole = numbers(loader())
    assert sorted(whole) == list(range(NUM_SAMPLES))
    num_batches = -(-NUM_SAMPLES // batch_size)
    for stop in range(0, num_batches - 1, 3 if batch_size == 1 else 1):
        first = loader()
        seen = numbers(itertools.islice(iter(first), stop))
        second = loader()
        second.load_state_dict(first.state_dict())
        seen += numbers(itertools.islice(iter(second), 1))
        third = loader()
        third.load_state_dict(second.state_dict())
        assert seen + numbers(third) == whole
        if stop > num_workers:
            continue
        # With another number of workers, the state goes into the stream, and from there into any loader.
        stream = stream_of(folder)
        stream.load_state_dict(second.state_dict())
        assert seen + numbers(rd.RelabelLoader(stream, 2, num_workers=4 - num_workers)) == whole


def test_torchdatas_loader_without_batches_of_the_streams_size_resumes_with_the_same_workers_only(folder):
    def loader():
        return StatefulDataLoader(stream_of(folder, batch_size=3), batch_size=None, num_workers=2)

    first = loader()
    seen = list(itertools.islice(first, 4))
    second = loader()
    second.load_state_dict(first.state_dict())
    assert sorted(seen + list(second)) == list(range(NUM_SAMPLES))
    with pytest.raises(ValueError, match="pass batch_size= to the loader"):
        stream_of(folder).load_state_dict(first.state_dict())


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_torchdatas_loader_resumes_a_sampler(folder, num_workers):
    dataset = rd.load_dataset(folder, split="train", transforms=number_of)

    def loader():
        sampler = rd.RelabelSampler(dataset.shard_lengths, seed=1)
        return StatefulDataLoader(dataset, 2, sampler=sampler, num_workers=num_workers)

    whole = numbers(loader())
    for stop in range(7):
        first, second = loader(), loader()
        seen = numbers(itertools.islice(iter(first), stop))
        second.load_state_dict(first.state_dict())
        assert seen + numbers(second) == whole


def test_a_states_number_of_samples_may_be_given(folder):
    reference = stream_of(folder)
    _, whole = list(reference), list(reference)
    stream = stream_of(folder)
    batches = DataLoader(stream, 2, num_workers=2)
    assert len(numbers(batches)) == NUM_SAMPLES
    seen = numbers(itertools.islice(iter(batches), 3))
    with pytest.raises(RuntimeError, match="use RelabelLoader"):
        stream.state_dict()
    resumed = stream_of(folder)
    resumed.load_state_dict(stream.state_dict(num_samples=6))
    assert seen + list(resumed) == whole


@pytest.mark.slow  # torch waits ten seconds for workers that raised
def test_a_state_that_persistent_workers_cannot_see_is_refused(folder):
    stream = stream_of(folder)
    loader = DataLoader(stream, 2, num_workers=2, persistent_workers=True)
    assert len(numbers(loader)) == NUM_SAMPLES
    stream.load_state_dict(stream_of(folder).state_dict(5))
    with pytest.raises(RuntimeError, match="before the first iteration"):
        numbers(loader)


def test_our_loader_begins_new_workers_for_a_state(folder):
    ours = rd.RelabelLoader(stream_of(folder), 2, num_workers=2, persistent_workers=True)
    whole, following = numbers(ours), numbers(ours)
    ours.load_state_dict(stream_of(folder).state_dict(5))
    assert numbers(ours) == whole[5:]
    assert numbers(ours) == following


@pytest.mark.slow  # starts a process that imports torch
def test_a_spawned_worker_knows_its_rank(folder):
    stream = stream_of(folder, rank=1, world_size=2)
    expected = list(stream)
    stream.set_epoch(0)
    loader = rd.RelabelLoader(stream, 2, num_workers=1, multiprocessing_context="spawn")
    assert numbers(loader) == expected


def test_an_error_names_what_is_wrong(folder):
    stream = stream_of(folder)
    with pytest.raises(ValueError, match="not a state of a RelabelStream"):
        stream.load_state_dict({"steps": 3})
    with pytest.raises(ValueError, match="needs sampler="):
        rd.RelabelLoader(stream.dataset, 2)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        stream_of(folder, batch_size=0)
    with pytest.raises(TypeError, match="streaming=True"):
        rd.load_dataset(folder, split="train", seed=3)
    state = StatefulDataLoader(stream_of(folder), 2, num_workers=2, snapshot_every_n_steps=2)
    batches = iter(state)
    for _ in range(3):
        next(batches)
    with pytest.raises(ValueError, match="snapshot_every_n_steps=1"):
        stream.load_state_dict(state.state_dict())


def test_samples_go_through_pooling(folder):
    from torchvision.transforms import v2

    transforms = v2.Compose([v2.RandomResizedCrop(8), rd.LabelPooling(), v2.ToImage(), v2.ToDtype(torch.float32)])
    stream = rd.load_dataset(folder, split="train", streaming=True, transforms=transforms)
    images, labels = next(iter(rd.RelabelLoader(stream, 4, num_workers=2)))
    assert images.shape == (4, 3, 8, 8)
    torch.testing.assert_close(labels.sum(1), torch.ones(4))
    assert set(rd.load_dataset(folder, streaming=True)) == {"train"}


def test_an_error_in_a_sample_ends_the_iteration_of_a_stream_but_not_the_loader(folder):
    is_bad = False

    def transforms(image, label_map):
        if is_bad:
            raise ValueError("bad sample")
        return number_of(image, label_map)

    stream = rd.load_dataset(folder, split="train", streaming=True, transforms=transforms, shuffle=False, batch_size=3)
    loader = rd.RelabelLoader(stream, 3)
    batches = iter(loader)
    assert len(next(batches)) == 3
    is_bad = True
    with pytest.raises(ValueError, match="bad sample"):
        next(batches)
    assert loader.state_dict()["stages"] == [[1, 3]]  # a run that resumes reads the sample again
    assert list(batches) == []
    is_bad = False
    assert len(numbers(loader)) == NUM_SAMPLES


def fails_at_4(image, label_map):
    number = number_of(image, label_map)
    if number == 4:
        raise OSError("damaged")
    return number


def taken_from(batches):
    """Return the batches of an iterator from which the caller takes the next batch after an error."""
    taken = []
    while True:
        try:
            taken.append(next(batches).tolist())
        except StopIteration:
            return taken
        except OSError:
            taken.append("error")


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}], ids=str)
def test_after_an_error_in_a_sample_a_loader_of_a_dataset_returns_the_next_batch_as_in_torch(folder, options):
    dataset = rd.load_dataset(folder, split="train", transforms=fails_at_4)
    theirs, ours = (rd.RelabelSampler(dataset.shard_lengths) for _ in range(2))
    loader, expected = (
        rd.RelabelLoader(dataset, 2, sampler=ours, **options),
        DataLoader(dataset, 2, sampler=theirs, **options),
    )
    for _ in range(2):
        batches = taken_from(iter(loader))
        assert batches.count("error") == 1
        assert len(batches) == 7
        assert batches == taken_from(iter(expected))
    assert loader.state_dict() == ours.state_dict()  # the beginning of the next epoch


def test_a_state_repeats_a_failed_batch_until_the_next_batch_was_taken(folder):
    dataset = rd.load_dataset(folder, split="train", transforms=fails_at_4)
    sampler = rd.RelabelSampler(dataset.shard_lengths, shuffle=False)
    loader = rd.RelabelLoader(dataset, 2, sampler=sampler)
    batches = iter(loader)
    with contextlib.suppress(OSError):
        while True:
            before = loader.state_dict()
            next(batches)
    assert loader.state_dict() == before
    rest = [next(batches).tolist(), *taken_from(batches)]
    resumed = rd.RelabelLoader(dataset, 2, sampler=rd.RelabelSampler(dataset.shard_lengths, shuffle=False))
    resumed.load_state_dict(before)
    assert taken_from(iter(resumed)) == ["error", *rest]


def test_after_an_error_in_a_worker_a_stream_ends_instead_of_losing_the_other_samples_of_the_worker(folder):
    stream = rd.load_dataset(folder, split="train", streaming=True, transforms=fails_at_4)
    batches = taken_from(iter(rd.RelabelLoader(stream, 2, num_workers=2)))
    assert batches.index("error") == len(batches) - 1
