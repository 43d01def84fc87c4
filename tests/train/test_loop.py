"""Runs of a few steps: results, files and errors."""

import argparse
import copy
import csv
import dataclasses
import math

import pytest
import timm
import torch
from torch.nn import functional as nnf
from tqdm import tqdm

import relabel_datasets as rd
from relabel_datasets.annotate.remake import remake_annotator
from relabel_datasets.compatibility import safe_globals
from relabel_datasets.demo.annotator import WEIGHTS
from relabel_datasets.train import loop
from relabel_datasets.train.checkpoints import load_checkpoint
from relabel_datasets.train.classifier import make_student
from relabel_datasets.train.recipe import LABELS
from tests.train.tiny import MODEL_ARGS


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def losses_of(folder):
    return [float(row["loss"]) for row in rows_of(folder / "steps.csv")]


@pytest.fixture(scope="module")
def teacher(scenes):
    description = rd.load_dataset(scenes, split="train").label_maps.manifest.annotator
    return remake_annotator(description, checkpoint=WEIGHTS, input_size=64, device="cpu")


@pytest.mark.parametrize(
    "step",
    [{}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "0"}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}],
    ids=["batch script", "srun --ntasks=1", "torchrun --nproc-per-node=1"],
)
def test_one_process_of_a_slurm_job_of_several_tasks_trains_alone(fit, monkeypatch, step):
    job = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    for name, value in {**job, **step}.items():
        monkeypatch.setenv(name, value)
    assert len(losses_of(fit(epochs=1, validation=False).folder)) == 3


@pytest.mark.parametrize("labels", LABELS)
def test_each_kind_of_labels_trains_and_is_logged(fit, labels, teacher):
    trained = fit(labels=labels, annotator=teacher if labels == "distilled" else None)
    steps, epochs = (rows_of(trained.folder / name) for name in ("steps.csv", "epochs.csv"))
    assert [(row["epoch"], row["step"]) for row in steps] == [("0", "1"), ("0", "2"), ("0", "3")]
    losses = [float(row["loss"]) for row in steps]
    parts = 1.5 if labels == "tokens" else 1  # the loss of tokens has weight 0.5
    assert losses[0] == pytest.approx(parts * math.log(12), abs=0.8)
    assert float(epochs[0]["loss"]) == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert {"top1", "top5", "ece"} == set(trained.metrics)
    for name, value in trained.metrics.items():
        assert float(epochs[0][name]) == pytest.approx(value)
    assert trained.best == trained.metrics["top1"]
    assert trained.seconds == pytest.approx(float(epochs[0]["seconds"]), rel=1e-6)
    assert sorted(path.name for path in trained.folder.iterdir()) == [
        "checkpoint-0.pth.tar", "epochs.csv", "last.pth.tar", "model_best.pth.tar", "steps.csv"
    ]  # fmt: skip


def test_the_annotator_of_distillation_is_given_crops_that_are_not_enlarged(fit, teacher, monkeypatch):
    shapes = []
    label = loop.Objective.loss

    def loss(objective, student, images, targets):
        shapes.append(tuple(images.shape))
        return label(objective, student, images, targets)

    monkeypatch.setattr(loop.Objective, "loss", loss)
    fit(labels="distilled", annotator=teacher, validation=False)
    assert set(shapes) == {(16, 3, 64, 64)}


def test_a_step_equals_that_of_torch(scenes, fit, tiny, cpu):
    trained = fit(validation=False, labels="relabel", batch_size=48, learning_rate=0.05)
    dataset = rd.load_dataset(scenes, split="train")
    loader, _ = loop.train_loader(
        dataset,
        tiny.changed(batch_size=48),
        interpolation="bicubic",
        rank=0,
        world_size=1,
        num_workers=0,
        window=cpu.window,
    )
    ((images, targets),) = loader
    model = make_student(tiny, 12).train()
    before = copy.deepcopy(model.state_dict())
    mean, std = (torch.tensor(model.default_cfg[name])[:, None, None] for name in ("mean", "std"))
    loss = nnf.cross_entropy(model((images / 255 - mean) / std), targets)
    assert losses_of(trained.folder) == [pytest.approx(float(loss.detach()), rel=1e-4)]
    loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=0)
    optimizer.step()
    weights = load_checkpoint(trained.folder / "last.pth.tar")["state_dict"]
    torch.testing.assert_close(weights["fc.bias"], model.fc.bias.detach(), rtol=1e-3, atol=1e-5)  # biases do not decay
    assert not torch.equal(weights["fc.weight"], before["fc.weight"])


def test_the_learning_rate_warms_up_and_follows_a_half_cosine(fit):
    trained = fit(epochs=4, warmup_epochs=1, learning_rate=0.2, validation=False)
    rates = [float(row["learning_rate"]) for row in rows_of(trained.folder / "steps.csv")]
    warm = [1e-6 + step / 3 * (0.2 - 1e-6) for step in range(3)]
    falling = [0.1 * (1 + math.cos(math.pi * step / 12)) for step in range(3, 12)]
    assert rates == pytest.approx(warm + falling, rel=1e-6)


def test_mixing_is_off_in_the_final_epochs(fit, monkeypatch):
    seen = []
    plain = loop.Objective.loss

    def loss(self, student, images, targets):
        seen.append(self.mixing)
        return plain(self, student, images, targets)

    monkeypatch.setattr(loop.Objective, "loss", loss)
    fit(epochs=3, cutmix=1.0, mix_off_epochs=2, validation=False)
    assert seen == [True] * 3 + [False] * 6
    mixed, plain_losses = losses_of(fit("mixed", cutmix=1.0, validation=False).folder), losses_of(fit("plain").folder)
    assert mixed != plain_losses


def test_the_moving_average_is_validated(fit, scenes):
    trained = fit(ema_decay=0.5, epochs=2)
    state = load_checkpoint(trained.folder / "last.pth.tar")
    assert state["state_dict"].keys() == state["state_dict_ema"].keys()
    difference = (state["state_dict"]["fc.weight"] - state["state_dict_ema"]["fc.weight"]).abs().max()
    assert difference > 0
    classifier = rd.train.load_classifier(trained.folder / "last.pth.tar", device="cpu")
    again = rd.train.evaluate(classifier, rd.load_dataset(scenes, split="validation"))
    assert again == pytest.approx(dict(trained.metrics))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_losses_in_half_precision_are_close_to_full_precision(fit, dtype):
    half, full = fit("half", dtype=dtype, clip_grad=1.0), fit("full", clip_grad=1.0)
    assert losses_of(half.folder) == pytest.approx(losses_of(full.folder), abs=0.05)
    assert losses_of(half.folder) != losses_of(full.folder)
    assert ("amp_scaler" in load_checkpoint(half.folder / "last.pth.tar")) is (dtype == "float16")


def test_timm_loads_the_checkpoints(fit):
    trained = fit(ema_decay=0.5)
    model = timm.create_model("resnet10t", num_classes=12, **MODEL_ARGS)
    with safe_globals([argparse.Namespace]):  # timm itself allows it with torch 2.5 or later
        timm.models.load_checkpoint(model, str(trained.folder / "model_best.pth.tar"))
    state = load_checkpoint(trained.folder / "model_best.pth.tar")
    assert torch.equal(model.fc.weight, state["state_dict_ema"]["fc.weight"])
    assert len(state["args"].classes) == 12


def test_a_complete_run_returns_the_same_result_and_writes_nothing(fit):
    first = fit(epochs=2)
    before = {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir() if path.suffix == ".tar"}
    again = fit(epochs=2)
    assert again == first
    assert before == {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir() if path.suffix == ".tar"}


def test_a_run_with_another_recipe_is_refused(fit):
    fit(validation=False)
    with pytest.raises(
        ValueError, match=r"run with another recipe: learning_rate=0.1 in that run, 0.3 now. Choose another"
    ):
        fit(learning_rate=0.3)


def test_a_run_with_other_classes_is_refused(fit, tiny, cpu, dataset_folder):
    folder = fit(validation=False, batch_size=12).folder
    other = rd.load_dataset(dataset_folder, "colours", "train")
    with pytest.raises(ValueError, match="other classes"):
        rd.train.train_student(other, folder, tiny.changed(batch_size=12), runtime=cpu)


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_loss_that_is_not_finite_stops_the_run_before_a_checkpoint(fit, cpu, log_every):
    with pytest.raises(ValueError, match=r"loss is (nan|inf) at epoch 0, step \d: lower learning_rate="):
        fit(learning_rate=1e30, runtime=dataclasses.replace(cpu, log_every=log_every))


def test_epochs_between_validations_are_trained_without_validation(fit, cpu):
    runtime = dataclasses.replace(cpu, validate_every=2)
    trained = fit(epochs=5, runtime=runtime)
    assert [bool(row["top1"]) for row in rows_of(trained.folder / "epochs.csv")] == [False, True, False, True, True]
    every = fit("every", epochs=5)
    assert losses_of(trained.folder) == losses_of(every.folder)
    assert trained.metrics == every.metrics
    best = max(float(row["top1"]) for row in rows_of(trained.folder / "epochs.csv") if row["top1"])
    assert trained.best == pytest.approx(best)


def test_each_epoch_but_the_last_logs_the_training_time_that_is_left(fit, caplog, monkeypatch):
    times = iter(range(0, 10**6, 30))  # each look at the clock takes 30 seconds
    monkeypatch.setattr("relabel_datasets.train.loop.time.perf_counter", lambda: next(times))
    caplog.set_level("INFO", "relabel_datasets.train.loop")
    trained = fit(epochs=3, validation=False)
    seconds = [float(row["seconds"]) for row in rows_of(trained.folder / "epochs.csv")]
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("epoch ")]
    assert lines[0].endswith(f", {tqdm.format_interval(2 * seconds[0])} of training left")
    assert lines[1].endswith(f", {tqdm.format_interval(seconds[1] / 2)} of training left")
    assert "left" not in lines[2]


@pytest.mark.parametrize("values", [{"save_every": -1}, {"validate_every": 0}, {"log_every": 0}])
def test_a_runtime_value_out_of_range_is_refused(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))}= must be at least"):
        rd.train.RuntimeConfig(**values)


def test_distilled_labels_without_an_annotator_are_an_error(fit):
    with pytest.raises(ValueError, match="none was given"):
        fit(labels="distilled")


def test_tensorboard_has_the_values_of_the_csv_logs(fit, cpu):
    from tensorboard.backend.event_processing import event_accumulator as accumulator

    trained = fit(runtime=dataclasses.replace(cpu, tensorboard=True))
    events = accumulator.EventAccumulator(str(trained.folder))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses_of(trained.folder))
    assert [event.value for event in events.Scalars("epoch/top1")] == pytest.approx([trained.metrics["top1"]])


@pytest.mark.parametrize("moment", ["save_epoch", "drop_steps"])
def test_a_run_killed_at_the_end_of_an_epoch_loses_no_row(fit, cpu, monkeypatch, moment):
    runtime = dataclasses.replace(cpu, save_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Checkpoints, moment, lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit("killed", epochs=2, runtime=runtime)
    killed, whole = fit("killed", epochs=2, runtime=runtime), fit("whole", epochs=2, runtime=runtime)
    for name, time in (("steps.csv", "images_per_second"), ("epochs.csv", "seconds")):
        rows = [[{**row, time: ""} for row in rows_of(run.folder / name)] for run in (killed, whole)]
        assert rows[0] == rows[1]
    assert len(rows_of(whole.folder / "epochs.csv")) == 2
