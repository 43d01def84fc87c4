"""The pipeline of webdataset reads the samples of the dataset, split and shuffled by webdataset."""

import json
import os
import pickle
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import webdataset
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.data import RelabelPipeline, frameworks
from relabel_datasets.errors import DatasetError, ImageError
from tests.fixtures import SHARDS

NUM_SAMPLES = 13  # in 3 shards
POOLED = v2.Compose([v2.CenterCrop(32), rd.LabelPooling(), v2.PILToTensor()])


def numbered(image, label_map):
    return int(label_map.key[-2:]), torch.from_numpy(np.array(image)), label_map.dense()


def number(image, label_map):
    return int(label_map.key[-2:])


def failing(image, label_map):
    raise ValueError("a bug in a transform")


def load(folder, transforms=number, config="colours", **arguments):
    return rd.load_dataset(folder, config, "train", transforms=transforms, **arguments)


def as_node(monkeypatch, rank, world_size=2):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


def epoch_of_all_nodes(pipeline, monkeypatch, epoch, num_workers):
    """Return the samples of each of 2 nodes in an epoch."""
    nodes = []
    for rank in range(2):
        as_node(monkeypatch, rank)
        pipeline.set_epoch(epoch)
        nodes.append(list(DataLoader(pipeline, batch_size=None, num_workers=num_workers)))
    return nodes


@pytest.mark.parametrize("kind", ["local", "http", "joined"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_nodes_read_each_sample_exactly_once_and_as_the_dataset_does(
    kind, num_workers, served_folder, request, tmp_path, monkeypatch
):
    expected = load(served_folder, numbered)
    if kind == "http":
        dataset = request.getfixturevalue("http").load(tmp_path, transforms=numbered)
    elif kind == "joined":
        dataset = load(served_folder, numbered, "labels-only", images=served_folder.parent / "images")
    else:
        dataset = expected
    nodes = epoch_of_all_nodes(RelabelPipeline(dataset), monkeypatch, 3, num_workers)
    assert all(nodes)
    samples = {sample[0]: sample for node in nodes for sample in node}
    assert len(samples) == sum(map(len, nodes)) == NUM_SAMPLES
    for index in range(NUM_SAMPLES):
        own, image, dense = expected[index]
        assert torch.equal(samples[own][1], image)
        assert torch.equal(samples[own][2], dense)


def test_without_shuffling_the_order_is_that_of_the_dataset(served_folder):
    dataset = load(served_folder)
    assert list(RelabelPipeline(dataset, shuffle=0)) == list(dataset)


def test_without_transforms_samples_are_images_with_label_maps(served_folder):
    image, label_map = next(iter(RelabelPipeline(load(served_folder, None), shuffle=0)))
    assert image.size == (label_map.canvas_size[1], label_map.canvas_size[0])
    assert label_map.key == load(served_folder).keys[0]


def test_left_out_samples_stay_out(served_folder, tmp_path):
    shutil.copytree(served_folder.parent / "images", tmp_path / "images")
    (tmp_path / "images" / "dog" / "photo_04.jpg").unlink()
    dataset = load(served_folder, config="labels-only", images=tmp_path / "images", unmatched="skip")
    assert sorted(RelabelPipeline(dataset)) == [i for i in range(NUM_SAMPLES) if i != 4]


def test_each_epoch_has_another_order_and_the_same_one_again(served_folder):
    pipeline = RelabelPipeline(load(served_folder))
    counted = [list(pipeline) for _ in range(3)]
    assert all(sorted(epoch) == list(range(NUM_SAMPLES)) for epoch in counted)
    assert len(set(map(tuple, counted))) == 3
    again = RelabelPipeline(load(served_folder)).batched(2, collation_fn=list)
    for epoch in (2, 0, 1):
        again.set_epoch(epoch)
        assert [number for batch in again for number in batch] == counted[epoch]
    assert list(RelabelPipeline(load(served_folder), seed=1)) != counted[0]


@pytest.mark.parametrize("is_persistent", [False, True])
def test_epochs_advance_in_workers_and_can_be_chosen(served_folder, is_persistent):
    pipeline = RelabelPipeline(load(served_folder))
    loader = DataLoader(pipeline, batch_size=None, num_workers=2, persistent_workers=is_persistent)
    counted = [list(loader) for _ in range(3)]
    assert all(sorted(epoch) == list(range(NUM_SAMPLES)) for epoch in counted)
    assert len(set(map(tuple, counted))) == 3
    pipeline.set_epoch(1)
    assert [list(loader), list(loader)] == counted[1:]


def test_a_node_has_other_shards_in_other_epochs(served_folder, monkeypatch):
    pipeline = RelabelPipeline(load(served_folder))
    shares = [frozenset(epoch_of_all_nodes(pipeline, monkeypatch, epoch, 0)[0]) for epoch in range(6)]
    assert len(set(shares)) > 1


def test_a_resampled_pipeline_is_endless_with_other_shards_in_each_worker_and_epoch(served_folder):
    pipeline = RelabelPipeline(load(served_folder), resampled=True).with_epoch(40)
    epochs = [list(DataLoader(pipeline, batch_size=None, num_workers=2)) for _ in range(2)]
    assert [len(epoch) for epoch in epochs] == [80, 80]  # 40 per worker
    assert epochs[0] != epochs[1]
    assert epochs[0][::2] != epochs[0][1::2]
    assert set(epochs[0]) == set(range(NUM_SAMPLES))
    assert max(Counter(epochs[0]).values()) > 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_web_loader_over_it_mixes_workers_and_cuts_epochs_to_a_length(served_folder, num_workers):
    pipeline = RelabelPipeline(load(served_folder, POOLED)).batched(2)
    loader = webdataset.WebLoader(pipeline, batch_size=None, num_workers=num_workers)
    loader = loader.unbatched().shuffle(8).batched(4).with_epoch(5)
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == 5
        for images, soft_labels in batches:
            assert images.shape[1:] == (3, 32, 32)
            assert soft_labels.shape == (len(images), 3)
            torch.testing.assert_close(soft_labels.sum(1), torch.ones(len(images)))


def test_batches_have_the_soft_labels_of_the_dataset(served_folder):
    dataset = load(served_folder, POOLED)
    batch = next(iter(RelabelPipeline(dataset, shuffle=0).batched(NUM_SAMPLES)))
    images, soft_labels = torch.utils.data.default_collate([dataset[index] for index in range(NUM_SAMPLES)])
    torch.testing.assert_close(batch, (images, soft_labels))


def test_a_pickled_pipeline_reads_the_same_samples(served_folder):
    pipeline = RelabelPipeline(load(served_folder)).batched(2, collation_fn=tuple)
    copy = pickle.loads(pickle.dumps(pipeline))
    assert list(copy) == list(pipeline)
    copy.set_epoch(7)  # does not reach the original
    assert list(copy) != list(pipeline)


@pytest.mark.slow
def test_spawned_workers_read_each_sample_once_per_epoch(served_folder):
    pipeline = RelabelPipeline(load(served_folder))
    loader = DataLoader(pipeline, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    epochs = [list(loader), list(loader)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(NUM_SAMPLES))] * 2
    assert epochs[0] != epochs[1]


@pytest.fixture
def damaged(served_folder, tmp_path):
    """A copy of the dataset in which the image `photo_05` is no JPEG, and the name of its sample."""
    folder = tmp_path / "dataset"
    shutil.copytree(served_folder, folder)
    dataset = load(folder)
    row = list(dataset.keys).index("photo_05")
    offset, _ = dataset.label_maps.index.extent(row, "image")
    shard = int(np.searchsorted(np.cumsum(dataset.shard_lengths), row, "right"))
    with (folder / "colours" / SHARDS[shard]).open("r+b") as file:
        file.seek(offset)
        file.write(b"not a JPEG file")
    return folder


def test_a_corrupt_image_is_an_error_unless_a_handler_skips_it(damaged):
    with pytest.raises(ImageError, match="photo_05"):
        list(RelabelPipeline(load(damaged)))
    with pytest.warns(UserWarning, match="photo_05") as caught:
        seen = list(RelabelPipeline(load(damaged), handler=webdataset.warn_and_continue))
    assert len(caught) == 1
    assert sorted(seen) == [i for i in range(NUM_SAMPLES) if i != 5]
    order = list(RelabelPipeline(load(damaged), shuffle=0, handler=webdataset.ignore_and_continue))
    stopped = list(RelabelPipeline(load(damaged), shuffle=0, handler=webdataset.ignore_and_stop))
    assert stopped == order[: len(stopped)]
    assert stopped == [int(key[-2:]) for key in load(damaged).keys][: len(stopped)]
    assert len(stopped) < len(order)


@pytest.mark.parametrize("kind", ["missing", "short"])
def test_a_shard_that_cannot_be_read_is_an_error_unless_a_handler_skips_it(kind, served_folder, tmp_path):
    folder = tmp_path / "dataset"
    shutil.copytree(served_folder, folder)
    dataset = load(folder)
    path = folder / "colours" / SHARDS[1]
    if kind == "missing":
        path.unlink()
    else:
        os.truncate(path, 1000)
    with pytest.raises((FileNotFoundError, DatasetError), match=SHARDS[1]):
        list(RelabelPipeline(dataset))
    errors = []
    pipeline = RelabelPipeline(dataset, handler=lambda error: errors.append(error) is None)
    assert len(list(pipeline)) == NUM_SAMPLES - dataset.shard_lengths[1]
    assert len(errors) == 1  # for the shard, not for each sample


def test_an_error_in_a_transform_is_not_left_to_the_handler(served_folder):
    with pytest.raises(ValueError, match="a bug in a transform"):
        list(RelabelPipeline(load(served_folder, failing), handler=webdataset.ignore_and_continue))


def test_a_shard_on_a_server_is_read_with_retries_and_verified(http, quick, tmp_path):
    pipeline = RelabelPipeline(http.load(tmp_path, transforms=number))
    http.server.fail("flip", SHARDS[1], times=1)
    assert sorted(pipeline) == list(range(NUM_SAMPLES))


def test_secrets_of_a_url_are_in_no_error_and_no_stage(http, quick, tmp_path):
    url = http.url.replace("http://", "http://user:secret-word@") + "?signature=secret-word"
    dataset = rd.load_dataset(url, "colours", "train", cache_dir=tmp_path, transforms=number)
    pipeline = RelabelPipeline(dataset)
    http.server.fail("404", SHARDS[1], times=None)
    with pytest.raises(FileNotFoundError, match=SHARDS[1]) as caught:
        list(pipeline)
    assert "secret-word" not in str(caught.value)
    assert "secret-word" not in json.dumps(list(pipeline._stages.shards()))


def test_a_node_without_shards_is_an_error_that_says_what_to_do(served_folder, monkeypatch):
    as_node(monkeypatch, rank=3, world_size=4)
    with pytest.raises(
        ValueError, match=r"rank 3 of 4 has no shard, .* has 3: pass resampled=True, or read a RelabelStream"
    ):
        list(RelabelPipeline(load(served_folder)))
    resampled = RelabelPipeline(load(served_folder), resampled=True).with_epoch(5)
    assert len(list(resampled)) == 5


def test_accelerate_may_not_split_the_samples_again(served_folder, monkeypatch):
    monkeypatch.setattr(frameworks, "num_accelerate_processes", lambda: 2)
    shard = IterableDatasetShard(RelabelPipeline(load(served_folder)), 1, num_processes=2, process_index=0)
    with pytest.raises(RuntimeError, match="accelerate splits the samples among its processes"):
        list(shard)


WRONG = {
    "a path": (lambda data: RelabelPipeline("path/to/dataset"), TypeError, "must be a RelabelDataset, .* got str"),
    "a stream": (lambda data: RelabelPipeline(rd.RelabelStream(data)), TypeError, "got RelabelStream"),
    "a negative buffer": (lambda data: RelabelPipeline(data, shuffle=-1), ValueError, "shuffle must be .*, got -1"),
    "a flag": (lambda data: RelabelPipeline(data, shuffle=True), ValueError, "shuffle must be .*, got True"),
    "shardshuffle": (lambda data: RelabelPipeline(data, shardshuffle=9), TypeError, "'shardshuffle': pass shuffle="),
    "an epoch": (lambda data: RelabelPipeline(data).set_epoch(-1), ValueError, "epoch must be from 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_when_the_pipeline_is_made(case, served_folder):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call(load(served_folder))


def test_shards_of_the_shuffle_buffer_must_fit_into_the_cache(http, tmp_path, files):
    dataset = http.load(tmp_path, cache_limit=max(file.num_bytes for file in files) * 2)
    with pytest.raises(DatasetError, match="the shuffle buffer of the pipeline"):
        RelabelPipeline(dataset)
