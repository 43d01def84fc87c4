import io
import os
import pickle
import tarfile

import datasets
import pytest
import webdataset

import relabel_datasets as rd
from relabel_datasets.data.sources import source_sha256
from tests.conftest import jpeg, picture, write_tar

# webdataset leaves its tars to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def samples(source):
    return {key: (label, source.read(i)) for i, (key, label) in enumerate(zip(source.keys, source.labels, strict=True))}


def test_an_image_folder(image_folder):
    source = rd.data.ImageFolderSource(image_folder)
    assert source.classes == ("cat", "dog", "emu")
    assert (source.key_rule, source.extension) == ("stem", "jpg")
    found = samples(source)
    assert len(found) == 13
    for path in image_folder.glob("*/*"):
        assert found[path.stem] == (source.classes.index(path.parent.name), path.read_bytes())
    assert str(image_folder) in source.name(0)


@pytest.mark.parametrize("name", ["tars", "my [1] t?rs *"])
def test_webdataset_tars_and_a_folder_or_glob_of_them(tmp_path, name):
    folder = tmp_path / name  # characters of patterns in the name of a folder stand for themselves
    folder.mkdir()
    for shard in range(2):
        members = [(f"k{shard}{i}.{field}", data) for i in range(3) for field, data in
                   (("jpg", jpeg(i)), ("cls", str(i).encode()), ("json", b"{}"))]  # fmt: skip
        write_tar(folder / f"s-{shard}.tar", members)
    assert len(rd.data.open_source(folder / "s-0.tar").keys) == 3
    for images in (folder, folder / "s-*.tar"):
        source = rd.data.open_source(images)
        assert isinstance(source, rd.data.WebDatasetSource)
        assert samples(source) == {f"k{s}{i}": (i, jpeg(i)) for s in range(2) for i in range(3)}
    assert source.extension == "jpg"
    assert "s-1.tar" in source.name(5)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"x")], r"s\.tar: no sample has a class index in \.cls"),
        ([("a.cls", b"0")], r"no sample with an image: first .*a has no image, only \.cls"),
        (
            [("a.jpg", b"x"), ("a.png", b"y"), ("a.cls", b"0")],
            r"a has several images, \.jpg, \.png: choose one with image_column=, such as 'jpg'",
        ),
        ([("a.jpg", b"x"), ("a.cls", b"zero")], r"a\.cls must be a class index, got b'zero'"),
    ],
)
def test_samples_without_one_image_and_a_class_are_named(tmp_path, members, message):
    write_tar(tmp_path / "s.tar", members)
    with pytest.raises(rd.DatasetError, match=message):
        _ = rd.data.WebDatasetSource([tmp_path / "s.tar"]).labels


def test_repeated_keys_are_named(tmp_path):
    write_tar(tmp_path / "1.tar", [("a.jpg", b"x"), ("a.cls", b"0")])
    write_tar(tmp_path / "2.tar", [("a.jpg", b"x"), ("a.cls", b"0")])
    with pytest.raises(rd.DatasetError, match="'a'"):
        rd.data.WebDatasetSource([tmp_path / "1.tar", tmp_path / "2.tar"])
    write_tar(tmp_path / "3.tar", [("a.jpg", b"x"), ("a.jpg", b"y"), ("a.cls", b"0")])
    with pytest.raises(rd.DatasetError, match=r"a\.jpg is repeated"):
        rd.data.WebDatasetSource([tmp_path / "3.tar"])


def test_a_truncated_tar_is_rejected(tmp_path):
    path = tmp_path / "s.tar"
    write_tar(path, [(f"k{i}.{field}", data) for i in range(3) for field, data in (("jpg", jpeg(i)), ("cls", b"0"))])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = [member.offset_data + -(-member.size // 512) * 512 for member in tar]
    for cut in [*ends, ends[2] + 256, ends[3] - 100, 100]:
        path.write_bytes(whole[:cut])
        with pytest.raises(rd.DatasetError, match=r"s\.tar"):
            rd.data.WebDatasetSource([path])


def test_a_tar_with_a_corrupt_header_is_rejected(tmp_path):
    """tarfile would stop at the header without an error."""
    path = tmp_path / "s.tar"
    write_tar(path, [(f"k{i}.jpg", jpeg(i)) for i in range(4)])
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    for header in headers[1:]:
        damaged = bytearray(path.read_bytes())
        damaged[header + 3] ^= 1
        (tmp_path / "damaged.tar").write_bytes(damaged)
        with pytest.raises(rd.DatasetError, match=rf"damaged\.tar is truncated or corrupt at byte {header}"):
            rd.data.WebDatasetSource([tmp_path / "damaged.tar"])


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_format_with_long_names_folders_and_links(tmp_path, tar_format):
    keys = ["a/k0", "größe/k1", f"{'folder/' * 20}k2", "k3"]
    with tarfile.open(tmp_path / "s.tar", "w", format=tar_format) as tar:
        tar.addfile(_member("a", tarfile.DIRTYPE))
        for i, key in enumerate(keys):
            for name, data in ((f"{key}.jpg", jpeg(i)), (f"{key}.cls", b"%d" % i)):
                member = tarfile.TarInfo(name)
                member.size, member.mtime = len(data), 1.5  # half a second needs an extra header in PAX
                tar.addfile(member, io.BytesIO(data))
            tar.addfile(_member(f"link{i}.jpg", tarfile.SYMTYPE, linkname="a/k0.jpg"))
    assert samples(rd.data.WebDatasetSource([tmp_path / "s.tar"])) == {key: (i, jpeg(i)) for i, key in enumerate(keys)}


def _member(name, kind, **attributes):
    member = tarfile.TarInfo(name)
    member.type = kind
    for attribute, value in attributes.items():
        setattr(member, attribute, value)
    return member


def test_tars_that_webdataset_wrote_and_keys_as_it_reads_them(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "s.tar")) as writer:
        for i in range(3):
            writer.write({"__key__": f"train/k{i}", "jpg": jpeg(i), "cls": i})
    source = rd.data.WebDatasetSource([tmp_path / "s.tar"])
    read = [sample["__key__"] for sample in webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False)]
    assert list(source.keys) == read == ["train/k0", "train/k1", "train/k2"]
    assert list(source.labels) == [0, 1, 2]


def test_sources_survive_pickling(tmp_path, image_folder):
    write_tar(tmp_path / "s.tar", [("a.jpg", jpeg(0)), ("a.cls", b"4")])
    for source in (rd.data.WebDatasetSource([tmp_path / "s.tar"]), rd.data.ImageFolderSource(image_folder)):
        assert samples(pickle.loads(pickle.dumps(source))) == samples(source)


def test_file_names_that_are_not_unicode_are_read(image_folder):
    name = os.fsdecode("grö\xdfe.jpg".encode("latin-1"))
    (image_folder / "cat" / "photo_00.jpg").rename(image_folder / "cat" / name)
    source = rd.data.ImageFolderSource(image_folder)
    place = list(source.keys).index("gr%F6%DFe")  # Latin-1, percent-encoded
    assert source.read(place) == (image_folder / "cat" / name).read_bytes()
    assert source.name(place).endswith(name)


def test_keys_by_a_given_rule(image_folder):
    source = rd.data.open_source(image_folder, key_rule="path")
    assert (source.key_rule, source.keys[0]) == ("path", "cat/photo_00")
    (image_folder / "dog" / "photo_00.jpg").write_bytes(jpeg(0))
    assert list(rd.data.ImageFolderSource(image_folder, "stem").keys).count("photo_00") == 2


def test_a_hugging_face_dataset_in_memory_and_from_disk(tmp_path, image_folder):
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(image_folder), split="train", cache_dir=str(tmp_path / "cache")
    )
    folder = samples(rd.data.ImageFolderSource(image_folder))
    source = rd.data.HFSource(loaded)
    assert source.classes == ("cat", "dog", "emu")
    assert samples(source) == folder
    loaded.save_to_disk(tmp_path / "saved")
    saved = rd.data.open_source(tmp_path / "saved")
    assert isinstance(saved, rd.data.HFSource)
    assert sorted(value for value in samples(saved).values()) == sorted(folder.values())


def test_rows_of_a_hugging_face_dataset_that_were_selected_keep_their_names():
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": jpeg(i), "path": f"p{i}.jpg"} for i in range(6)], "label": [0, 1] * 3}
    loaded = datasets.Dataset.from_dict(rows, features=features)
    everything = samples(rd.data.HFSource(loaded))
    assert everything == {f"p{i}": (i % 2, jpeg(i)) for i in range(6)}
    assert samples(rd.data.HFSource(loaded.shuffle(seed=1))) == everything
    assert samples(rd.data.HFSource(loaded.with_format("torch"))) == everything
    chosen = loaded.select([4, 1]).add_column("more", [0, 0])
    assert samples(rd.data.HFSource(chosen)) == {f"p{i}": (i % 2, jpeg(i)) for i in (4, 1)}


def test_splits_of_a_saved_hugging_face_dataset(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": jpeg(0), "path": "p.jpg"}], "label": [1]}
    loaded = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"validation": loaded}).save_to_disk(tmp_path / "saved")
    assert samples(rd.data.open_source(tmp_path / "saved", "val")) == {"p": (1, jpeg(0))}
    with pytest.raises(rd.DatasetError, match=r"saved has no split 'train', only \['validation'\]"):
        rd.data.open_source(tmp_path / "saved")


def test_a_hugging_face_dataset_without_file_names_has_row_numbers_as_keys():
    features = datasets.Features({"img": datasets.Image(), "y": datasets.Value("int32"), "z": datasets.Image()})
    rows = {"img": [picture(i) for i in range(3)], "y": [2, 0, 1], "z": [picture(0)] * 3}
    loaded = datasets.Dataset.from_dict(rows, features=features)
    source = rd.data.HFSource(loaded, image_column="img", label_column="y")
    assert list(source.keys) == ["00000000", "00000001", "00000002"]
    assert (list(source.labels), source.classes, source.key_rule) == ([2, 0, 1], None, None)
    assert rd.decode_image(source.read(1)).tobytes() == picture(1).tobytes()
    with pytest.raises(ValueError, match=r"several columns could be the image column: \['img', 'z'\]"):
        rd.data.HFSource(loaded)
    with pytest.raises(
        ValueError, match=r"no column has the type ClassLabel. Pass the name .* label_column=.*y \(int32\)"
    ):
        _ = rd.data.HFSource(loaded, image_column="img").labels
    with pytest.raises(ValueError, match="no label column 'nope'"):
        rd.data.HFSource(loaded, image_column="img", label_column="nope")


def test_an_unknown_kind_of_folder_is_rejected(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        rd.data.open_source(tmp_path / "nowhere")


def test_the_hash_of_a_source_changes_with_keys_labels_and_order(image_folder):
    source = rd.data.ImageFolderSource(image_folder)
    hashes = {source_sha256(source)}
    source.labels = [*source.labels[:-1], 0]
    hashes.add(source_sha256(source))
    source.keys = source.keys[::-1]
    hashes.add(source_sha256(source))
    assert len(hashes) == 3
