"""Functions that damage a dataset, and shorthands for the reports of `verify`, for its tests."""

import io
import tarfile
from dataclasses import replace

import torch

import relabel_datasets as rd
from relabel_datasets.shards.index import make_index
from relabel_datasets.shards.manifest import Manifest
from relabel_datasets.shards.tars import ShardWriter
from relabel_datasets.storage.local import sha256_of
from tests.conftest import picture


def check(root, config=None, num_workers=0, **kwargs):
    return rd.verify(root, config, num_workers=num_workers, progress=False, **kwargs)


def named(report):
    """Return the set of (config, number of the shard, key) of the problems."""
    assert report.ok is (not report.problems)
    return {(p.config, p.shard and int(p.shard.split("-")[1]), p.key) for p in report.problems}


def texts(report, key):
    return " | ".join(problem.problem for problem in report.problems if problem.key == key)


def shard_of(folder, number):
    return folder / f"train-{number:05d}-of-00003.tar"


def keys_of(folder, number):
    with tarfile.open(shard_of(folder, number)) as tar:
        return list(dict.fromkeys(name.partition(".")[0] for name in tar.getnames()))


def members_of(folder, number):
    with tarfile.open(shard_of(folder, number)) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def positions_of(folder, number):
    with tarfile.open(shard_of(folder, number)) as tar:
        return {member.name: member for member in tar}


def write_members(folder, number, members):
    """Write a shard with arbitrary members, in the format of ShardWriter."""
    with shard_of(folder, number).open("wb") as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.write(member.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512))
        file.write(bytes(1024))


def flip(path, position, bits=0x80):
    data = bytearray(path.read_bytes())
    data[position] ^= bits
    path.write_bytes(data)


def reseal(folder, *, manifest=None, **split):
    """Write the sizes and hashes of the files on disk to the manifest, so that only the samples reveal the damage."""
    old = Manifest.load(folder)
    train = old.splits["train"]
    paths, index = [folder / name for name in train.filenames], folder / train.index
    actual = {
        "shard_bytes": [path.stat().st_size for path in paths],
        "shard_sha256": [sha256_of(path) for path in paths],
        "index_bytes": index.stat().st_size,
        "index_sha256": sha256_of(index),
    }
    replace(old, splits={"train": replace(train, **actual, **split)}, **(manifest or {})).save(folder)


def rewrite(folder, edit):
    """Write shards and index of a config again. `edit(samples)` may change the samples `[key, label, image, map]`."""
    train, images = Manifest.load(folder).splits["train"], folder.name == "colours"
    infos = []
    for number in range(3):
        members = dict(members_of(folder, number))
        samples = [
            [key, int(members[f"{key}.cls"]), members.get(f"{key}.jpg"), members[f"{key}.safetensors"]]
            for key in keys_of(folder, number)
        ]
        edit(samples)
        with ShardWriter(shard_of(folder, number), "jpg" if images else None) as writer:
            for sample in samples:
                writer.add(*sample)
            infos.append(writer.close())
    (folder / train.index).write_bytes(make_index([row for info in infos for row in info.rows], images=images))
    lengths = [len(info.rows) for info in infos]
    reseal(folder, shard_lengths=lengths, num_samples=sum(lengths))


def build(image_folder, annotator):
    root = image_folder.parent / "built"
    rd.build(rd.data.ImageFolderSource(image_folder), root, annotator, config="colours", shard_size=5, progress=False)
    return root


def jpeg(size=(40, 56)):
    buffer = io.BytesIO()
    picture(0, size).save(buffer, "JPEG")
    return buffer.getvalue()


def map_bytes(num_classes=3, map_size=(6, 8), canvas_size=(40, 56)):
    return rd.LabelMap.from_logits(torch.randn(num_classes, *map_size), canvas_size=canvas_size).to_safetensors()


def bad_sample(edit):
    """Return a function that changes one sample of a config and updates everything else."""

    def damage(folder):
        key = keys_of(folder, 1)[2]

        def edit_it(samples):
            for sample in samples:
                if sample[0] == key:
                    edit(sample)

        rewrite(folder, edit_it)
        return key

    return damage


def set_field(number, value):
    return bad_sample(lambda sample: sample.__setitem__(number, value))
