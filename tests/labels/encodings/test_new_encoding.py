"""An encoding is added by its own file and one entry of the registry: everything else asks the registered object."""

import pickle

import pytest
import torch
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.annotate import BuildConfig
from relabel_datasets.data.sources import ImageFolderSource
from relabel_datasets.labels import codec
from relabel_datasets.labels.encodings import ENCODINGS, find_entry, get_encoding

from ..samples import random_dense
from .throwaway import ENTRY


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setitem(ENCODINGS, ENTRY.name, ENTRY)


@pytest.fixture
def dataset(tmp_path, image_folder, annotator):
    config = BuildConfig(encoding="plain", batch_size=4)
    rd.build(ImageFolderSource(image_folder), tmp_path / "out", annotator, build_config=config, progress=False)
    return tmp_path / "out"


def test_its_stored_name_selects_it():
    label_map = rd.LabelMap.from_logits(random_dense(), "plain", canvas_size=(17, 11))
    blob = label_map.to_safetensors()
    assert b'\\"encoding\\":\\"plain\\"' in blob
    again = rd.LabelMap.from_safetensors(blob)
    assert again.encoding == "plain"
    torch.testing.assert_close(again.dense(), label_map.dense(), rtol=1e-3, atol=1e-3)


def test_a_name_that_is_not_registered_is_refused(monkeypatch):
    label_map = rd.LabelMap.from_logits(random_dense(), "plain")
    blob = label_map.to_safetensors()
    codec._parse_header.cache_clear()
    monkeypatch.delitem(ENCODINGS, "plain")
    with pytest.raises(
        rd.errors.LabelMapError,
        match="encoding 'plain' is unknown, only heatmaps, topk, multiscale, crops: update relabel_d",
    ):
        rd.LabelMap.from_safetensors(blob)
    for refused in (find_entry, get_encoding):
        with pytest.raises(
            ValueError, match=r"encoding must be one of \['crops', 'heatmaps', 'multiscale', 'topk'\], got 'plain'"
        ):
            refused("plain")
    with pytest.raises(ValueError, match=r"encoding must be one of \['heatmaps', 'multiscale', 'topk'\], got 'plain'"):
        rd.LabelMap.from_logits(random_dense(), "plain")


def test_copies_keep_it():
    label_map = rd.LabelMap.from_logits(random_dense(), "plain", label=3)
    for copied in (pickle.loads(pickle.dumps(label_map)), label_map.clone(), label_map.to(torch.float64)):
        assert copied.encoding == "plain"
    batch = rd.collate([label_map] * 3)
    assert torch.equal(pickle.loads(pickle.dumps(batch)).pool(), batch.pool())


def test_a_dataset_of_it_is_built_loaded_pooled_verified_analyzed_and_reported(dataset, tmp_path):
    assert rd.verify(dataset, num_workers=0).problems == []
    crop = v2.Compose([v2.CenterCrop((20, 30)), rd.LabelPooling()])
    loaded = rd.load_dataset(dataset, split="train", transforms=crop)
    pooled = torch.stack([loaded[i][1] for i in range(len(loaded))])
    torch.testing.assert_close(pooled.sum(1), torch.ones(len(loaded)))
    together = torch.stack([sample[1] for sample in loaded.__getitems__(list(range(len(loaded))))])
    torch.testing.assert_close(together, pooled)
    analysis = rd.analysis.analyze(dataset, num_crops=48, progress=False)
    assert analysis.tables
    report = rd.report.write_report(dataset, tmp_path / "report.html", num_crops=48, progress=False)
    assert report.stat().st_size > 10_000
