"""Small kernels of pooling run in the calling thread, and nothing else does."""

import threading

import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.labels import threads
from relabel_datasets.labels.threads import in_one_thread

BATCH, NUM_CLASSES = 256, 1000
pytestmark = pytest.mark.skipif(threads._library() is None, reason="torch has no OpenMP whose symbols can be found")


@pytest.fixture(params=[2, 4])
def num_threads(request):
    """Number of threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _threads_of_other_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_only_the_calling_thread_has_one_thread_and_only_inside(num_threads):
    with in_one_thread(1):
        assert torch.get_num_threads() == 1
        assert _threads_of_other_thread() == num_threads  # also one that starts now
    assert torch.get_num_threads() == num_threads


def test_the_number_is_restored_after_an_error(num_threads):
    with pytest.raises(ZeroDivisionError), in_one_thread(1):
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == num_threads
    library = threads._library()
    if hasattr(library, "MKL_Set_Num_Threads_Local"):
        local = library.MKL_Set_Num_Threads_Local(num_threads)
        assert local == num_threads


def test_large_tensors_keep_all_threads(num_threads):
    with in_one_thread(threads.MAX_ELEMENTS + 1):
        assert torch.get_num_threads() == num_threads


@pytest.mark.parametrize("encoding", ["heatmaps", "topk"])
@pytest.mark.parametrize("output_size", [1, 2])
@pytest.mark.parametrize("label_weight", [0.0, 0.1])
def test_labels_have_the_same_bits_with_any_number_of_threads(
    encoding, output_size, label_weight, num_threads, monkeypatch
):
    generator = torch.manual_seed(0)
    logits = torch.randn(BATCH, 5, 9, 7, generator=generator)
    first = torch.randint(NUM_CLASSES, (BATCH, 1, *((1, 1) if encoding == "heatmaps" else (9, 7))), generator=generator)
    classes = (first + torch.arange(5)[:, None, None]) % NUM_CLASSES
    boxes = torch.rand(BATCH, 2, 2, generator=generator).sort(1).values.flatten(1)
    base = torch.randn(BATCH, NUM_CLASSES, generator=generator) if encoding == "heatmaps" else None

    def pool():
        return rd.pool_labels(
            logits, classes, boxes, num_classes=NUM_CLASSES, base=base, output_size=output_size,
            labels=torch.arange(BATCH), label_weight=label_weight,
        )  # fmt: skip

    labels = pool()
    monkeypatch.setattr(threads, "MAX_ELEMENTS", 0)
    assert torch.equal(labels, pool())
    assert torch.get_num_threads() == num_threads
