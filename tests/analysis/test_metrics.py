import json
import subprocess
import sys

import pytest
import torch

from relabel_datasets.analysis.metrics import Metrics, mean_average_precision, real_labels
from tests.conftest import ROOT

NUM_IMAGES, NUM_CLASSES = 61, 11


@pytest.fixture
def logits():
    return 2 * torch.randn(NUM_IMAGES, NUM_CLASSES)


@pytest.fixture
def labels():
    return torch.randint(NUM_CLASSES, (NUM_IMAGES,))


@pytest.fixture
def present():
    """0 to 3 classes per image; class 10 is in no image."""
    return [torch.randperm(NUM_CLASSES - 1)[: i % 4].tolist() for i in range(NUM_IMAGES)]


def reference(logits, labels, present, num_bins=15):
    """Compute the metrics in plain loops, image by image."""
    probabilities = [row.double().softmax(0).tolist() for row in logits]
    rankings = [sorted(range(len(row)), key=lambda index: -row[index]) for row in probabilities]
    top1 = [ranking[0] == label for ranking, label in zip(rankings, labels.tolist(), strict=True)]
    top5 = [label in ranking[:5] for ranking, label in zip(rankings, labels.tolist(), strict=True)]
    confidences = [max(row) for row in probabilities]
    ece = 0.0
    for m in range(num_bins):
        inside = [i for i, value in enumerate(confidences) if m / num_bins < value <= (m + 1) / num_bins]
        if inside:
            accuracy = sum(top1[i] for i in inside) / len(inside)
            confidence = sum(confidences[i] for i in inside) / len(inside)
            ece += len(inside) / len(labels) * abs(accuracy - confidence)
    known = [i for i, classes in enumerate(present) if classes]
    correct = [rankings[i][0] in present[i] for i in known]
    recall = [len({*present[i]} & {*rankings[i][: len(present[i])]}) / len(present[i]) for i in known]
    precisions = []
    for index in range(logits.shape[1]):
        ranked = [index in present[i] for i in sorted(known, key=lambda i: -probabilities[i][index])]
        if any(ranked):
            at_hits = [sum(ranked[: n + 1]) / (n + 1) for n, hit in enumerate(ranked) if hit]
            precisions.append(sum(at_hits) / len(at_hits))
    return {
        "top1": sum(top1) / len(top1),
        "top5": sum(top5) / len(top5),
        "ece": ece,
        "multi_label": sum(correct) / len(correct),
        "set_recall": sum(recall) / len(recall),
        "map": sum(precisions) / len(precisions),
    }


def counted(logits, labels, present, **kwargs):
    metrics = Metrics(logits.shape[1], **kwargs)
    metrics.update(logits, labels, present)
    return metrics


@pytest.mark.parametrize("num_bins", [1, 4, 15])
@pytest.mark.parametrize("scale", [0.1, 1, 10])
def test_all_metrics_equal_a_reference_in_plain_loops(logits, labels, present, num_bins, scale):
    logits = scale * logits
    metrics = counted(logits, labels, present, num_bins=num_bins)
    assert metrics.compute() == pytest.approx(reference(logits, labels, present, num_bins), abs=1e-6)


def test_batches_and_merged_metrics_equal_a_single_update(logits, labels, present):
    in_batches, other = Metrics(NUM_CLASSES), Metrics(NUM_CLASSES)
    start = 0
    for size in (1, 20, 0, 13, 27):
        part = slice(start, start + size)
        (in_batches if start < 30 else other).update(logits[part], labels[part], present[part])
        start += size
    in_batches.merge(other)
    assert in_batches.compute() == pytest.approx(counted(logits, labels, present).compute(), abs=1e-12)


def test_separate_updates_add_up(logits, labels, present):
    metrics = Metrics(NUM_CLASSES)
    metrics.update(logits, labels)
    metrics.update(logits, present=present)
    assert metrics.compute() == counted(logits, labels, present).compute()


def test_compute_returns_only_metrics_that_have_ground_truth(logits, labels, present):
    metrics = Metrics(NUM_CLASSES)
    assert metrics.compute() == {}
    metrics.update(logits, present=[[]] * NUM_IMAGES, real=[[]] * NUM_IMAGES)
    assert metrics.compute() == {}
    metrics.update(logits, real=present)
    assert metrics.compute() == {"real": pytest.approx(reference(logits, labels, present)["multi_label"])}
    few = Metrics(5)
    few.update(logits[:, :5], labels % 5)
    assert few.compute().keys() == {"top1", "ece"}


def test_perfect_and_completely_wrong_models_have_extreme_metrics(labels):
    classes = [[label, (label + 1) % NUM_CLASSES] for label in labels.tolist()]
    confident = torch.zeros(NUM_IMAGES, NUM_CLASSES)
    confident[torch.arange(NUM_IMAGES), labels] = 50
    confident[torch.arange(NUM_IMAGES), (labels + 1) % NUM_CLASSES] = 40
    best = counted(confident, labels, classes).compute()
    assert best == {
        "top1": 1,
        "top5": 1,
        "ece": pytest.approx(0, abs=1e-4),
        "multi_label": 1,
        "set_recall": 1,
        "map": 1,
    }
    worst = counted(-confident, labels, classes).compute()
    assert worst["top1"] == worst["top5"] == worst["multi_label"] == worst["set_recall"] == 0
    assert worst["ece"] == pytest.approx(1 / (NUM_CLASSES - 2), abs=1e-4)  # the other classes share the confidence


def test_equal_scores_share_one_precision():
    scores = torch.tensor([[3.0], [1], [1], [1], [0]])
    truth = torch.tensor([[True], [True], [False], [False], [True]])
    # At 3: 1 of 1; at 1: 2 of 4; at 0: 3 of 5. Each adds a third of the recall.
    expected = (1 + 2 / 4 + 3 / 5) / 3
    for order in (torch.arange(5), torch.tensor([2, 4, 1, 0, 3])):
        assert mean_average_precision(scores[order], truth[order]) == pytest.approx(expected)


def test_average_precision_without_classes_is_nan():
    assert torch.tensor(mean_average_precision(torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool))).isnan()


def test_average_precision_ranks_images_by_probability_not_by_logit(logits, labels, present):
    shifted = logits + 100 * torch.randn(NUM_IMAGES, 1)  # does not change the softmax
    assert counted(shifted, labels, present).compute() == pytest.approx(
        counted(logits, labels, present).compute(), abs=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_may_have_any_floating_point_dtype(logits, labels, present, dtype):
    rounded = logits.to(dtype)
    assert counted(rounded, labels, present).compute() == counted(rounded.float(), labels, present).compute()


def test_update_does_not_modify_its_arguments(logits, labels, present):
    before = logits.clone(), labels.clone(), [list(classes) for classes in present]
    counted(logits, labels, present)
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])
    assert present == before[2]


def test_update_keeps_no_autograd_graph(logits, labels, present):
    metrics = counted(logits.requires_grad_(), labels, present)
    assert not any(scores.requires_grad for scores in metrics._scores)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_logits_on_a_gpu_give_the_same_metrics(logits, labels, present):
    metrics = counted(logits.cuda(), labels.cuda(), present).compute()
    assert metrics == pytest.approx(counted(logits, labels, present).compute(), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 4),), "logits must be floating point"),
        ((torch.zeros(3, NUM_CLASSES, dtype=torch.long),), "logits must be floating point"),
        ((torch.full((3, NUM_CLASSES), torch.nan),), "contain NaN: the model has diverged"),
        ((torch.zeros(3, NUM_CLASSES), torch.zeros(2, dtype=torch.long)), "3 class indices, one per image"),
        ((torch.zeros(3, NUM_CLASSES), torch.zeros(3)), "3 class indices, one per image, got torch.float32"),
        ((torch.zeros(2, NUM_CLASSES), torch.tensor([0, 11])), "labels must be in 0 .. 10, got 0 .. 11"),
        ((torch.zeros(2, NUM_CLASSES), torch.tensor([-1, 1])), "labels must be in 0 .. 10"),
        ((torch.zeros(2, NUM_CLASSES), None, [[1]]), "the true classes of 2 images, got those of 1"),
        (
            (torch.zeros(2, NUM_CLASSES), torch.tensor([0, 1]), [[1], [11]]),
            "class indices must be in 0 .. 10, got 1 .. 11",
        ),
        (
            (torch.zeros(2, NUM_CLASSES), torch.tensor([0, 1]), [[1], []], [[-1], []]),
            "class indices must be in 0 .. 10, got -1 .. -1",
        ),
    ],
)
def test_invalid_batches_raise_an_error_and_change_nothing(arguments, message):
    metrics = Metrics(NUM_CLASSES)
    with pytest.raises(ValueError, match=message):
        metrics.update(*arguments)
    assert metrics.compute() == {}


def test_invalid_arguments_and_incompatible_metrics_raise_an_error():
    for arguments in ((1,), (10, 0)):
        with pytest.raises(ValueError, match="num_classes must be at least 2 and num_bins at least 1"):
            Metrics(arguments[0], num_bins=arguments[-1] if len(arguments) > 1 else 15)
    with pytest.raises(ValueError, match="cannot merge metrics of 3 classes and 15 bins into metrics of 4 classes"):
        Metrics(4).merge(Metrics(3))


RANK = """
import json, os, sys, torch
from relabel_datasets.analysis.metrics import Metrics

logits, labels, present = torch.load(sys.argv[1], weights_only=True)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
part = slice(0, 40) if rank == 0 else slice(40, None)  # of unequal size
metrics = Metrics(logits.shape[1])
metrics.update(logits[part], labels[part], present[part], present[part])
os.write(1, json.dumps(metrics.gather().compute()).encode() + b"\\n")  # one write: the ranks share stdout
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_gather_merges_all_ranks(logits, labels, present, tmp_path):
    torch.save((logits, labels, present), tmp_path / "data.pt")
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    result = subprocess.run(
        [*command, tmp_path / "rank.py", tmp_path / "data.pt"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    metrics = counted(logits, labels, present)
    metrics.update(logits, real=present)
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert all(json.loads(line) == pytest.approx(metrics.compute(), abs=1e-12) for line in lines)


def test_gather_without_torch_distributed_returns_the_same_metrics(logits, labels, present):
    metrics = counted(logits, labels, present)
    assert metrics.gather().compute() == metrics.compute()


def test_real_labels_are_looked_up_by_file_name():
    # In the authors' list, image 1 has no label that annotators agreed on; image 2 is a ski or an alp.
    keys = ["ILSVRC2012_val_00000002", "val/n01440764/ILSVRC2012_val_00000001.JPEG", "n01440764_10026"]
    keys += ["any/ILSVRC2012_val_00000002.JPEG"]
    assert real_labels(keys) == [[970, 795], [], [], [970, 795]]


def test_real_labels_are_indices_of_the_given_classes():
    keys = ["ILSVRC2012_val_00000002"]
    assert real_labels(keys, ["tench", "ski", "church"]) == [[1]]
    assert real_labels(keys, ["n09193705", "n04228054"]) == [[0, 1]]
    assert real_labels(keys, ["tench"]) == [[]]
    with pytest.raises(ValueError, match="'unicorn' is none of them"):
        real_labels(keys, ["unicorn"])
