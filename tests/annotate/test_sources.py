import io
import tarfile

import datasets
import pytest

import relabel_datasets as rd
from relabel_datasets.annotate.sources import source_sha256
from tests.conftest import picture


def jpeg(seed):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def samples(source):
    return {key: (label, source.read(i)) for i, (key, label) in enumerate(zip(source.keys, source.labels, strict=True))}


def test_an_image_folder(image_folder):
    source = rd.ImageFolderSource(image_folder)
    assert source.classes == ("cat", "dog", "emu")
    assert (source.key_rule, source.extension) == ("stem", "jpg")
    found = samples(source)
    assert len(found) == 13
    for path in image_folder.glob("*/*"):
        assert found[path.stem] == (source.classes.index(path.parent.name), path.read_bytes())
    assert str(image_folder) in source.name(0)


def test_webdataset_tars_and_a_folder_or_glob_of_them(tmp_path):
    for shard in range(2):
        members = [(f"k{shard}{i}.{field}", data) for i in range(3) for field, data in
                   (("jpg", jpeg(i)), ("cls", str(i).encode()), ("json", b"{}"))]  # fmt: skip
        write_tar(tmp_path / f"s-{shard}.tar", members)
    for images in (tmp_path, tmp_path / "s-*.tar"):
        source = rd.open_source(images)
        assert isinstance(source, rd.WebDatasetSource)
        assert samples(source) == {f"k{s}{i}": (i, jpeg(i)) for s in range(2) for i in range(3)}
    assert source.extension == "jpg"
    assert "s-1.tar" in source.name(5)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"x")], r"'a' must have one image and a \.cls"),
        ([("a.cls", b"0")], "'a' must have one image"),
        ([("a.jpg", b"x"), ("a.png", b"y"), ("a.cls", b"0")], "'a' must have one image"),
        ([("a.jpg", b"x"), ("a.cls", b"zero")], r"a\.cls must hold a class index, it holds b'zero'"),
    ],
)
def test_samples_that_are_not_image_and_class_are_named(tmp_path, members, message):
    write_tar(tmp_path / "s.tar", members)
    with pytest.raises(rd.DatasetError, match=message):
        rd.WebDatasetSource([tmp_path / "s.tar"])


def test_keys_that_stand_twice_are_named(tmp_path):
    write_tar(tmp_path / "1.tar", [("a.jpg", b"x"), ("a.cls", b"0")])
    write_tar(tmp_path / "2.tar", [("a.jpg", b"x"), ("a.cls", b"0")])
    with pytest.raises(rd.DatasetError, match="'a'"):
        rd.WebDatasetSource([tmp_path / "1.tar", tmp_path / "2.tar"])
    write_tar(tmp_path / "3.tar", [("a.jpg", b"x"), ("a.jpg", b"y"), ("a.cls", b"0")])
    with pytest.raises(rd.DatasetError, match=r"a\.jpg stands twice"):
        rd.WebDatasetSource([tmp_path / "3.tar"])


def test_a_tar_that_is_cut_off_is_refused_wherever_it_is_cut(tmp_path):
    path = tmp_path / "s.tar"
    write_tar(path, [(f"k{i}.{field}", data) for i in range(3) for field, data in (("jpg", jpeg(i)), ("cls", b"0"))])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = [member.offset_data + -(-member.size // 512) * 512 for member in tar]
    for cut in [*ends, ends[2] + 256, ends[3] - 100, 100]:
        path.write_bytes(whole[:cut])
        with pytest.raises(rd.DatasetError, match=r"s\.tar"):
            rd.WebDatasetSource([path])


def test_a_hugging_face_dataset_in_memory_and_from_disk(tmp_path, image_folder):
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(image_folder), split="train", cache_dir=str(tmp_path / "cache")
    )
    folder = samples(rd.ImageFolderSource(image_folder))
    source = rd.HFSource(loaded)
    assert source.classes == ("cat", "dog", "emu")
    assert samples(source) == folder
    loaded.save_to_disk(tmp_path / "saved")
    saved = rd.open_source(tmp_path / "saved")
    assert isinstance(saved, rd.HFSource)
    assert sorted(value for value in samples(saved).values()) == sorted(folder.values())


def test_a_hugging_face_dataset_without_file_names_gets_running_numbers():
    features = datasets.Features({"img": datasets.Image(), "y": datasets.Value("int32"), "z": datasets.Image()})
    rows = {"img": [picture(i) for i in range(3)], "y": [2, 0, 1], "z": [picture(0)] * 3}
    loaded = datasets.Dataset.from_dict(rows, features=features)
    source = rd.HFSource(loaded, image="img", label="y")
    assert source.keys == ["00000000", "00000001", "00000002"]
    assert (source.labels, source.classes, source.key_rule) == ([2, 0, 1], None, None)
    assert rd.decode_image(source.read(1)).tobytes() == picture(1).tobytes()
    with pytest.raises(ValueError, match=r"name the image column: \['img', 'z'\]"):
        rd.HFSource(loaded)
    with pytest.raises(ValueError, match="label='nope'"):
        rd.HFSource(loaded, image="img", label="nope")


def test_a_folder_that_is_nothing_of_these_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        rd.open_source(tmp_path / "nowhere")


def test_the_hash_of_a_source_changes_with_keys_labels_and_order(image_folder):
    source = rd.ImageFolderSource(image_folder)
    hashes = {source_sha256(source)}
    source.labels = [*source.labels[:-1], 0]
    hashes.add(source_sha256(source))
    source.keys = source.keys[::-1]
    hashes.add(source_sha256(source))
    assert len(hashes) == 3
