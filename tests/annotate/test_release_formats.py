import pytest
import torch

import relabel_datasets as rd
from tests.annotate.crop_releases import write_fkd, write_plus
from tests.annotate.releases import pack, publish, random_map, save, write_release


def write(root, image_folder, release_format):
    if release_format == "fkd":
        write_fkd(root / "train", image_folder)
    elif release_format == "imagenet-plus":
        write_plus(root, image_folder)
    else:
        write_release(root, image_folder, lambda i, _: publish(random_map(i), source_format=release_format))


@pytest.mark.parametrize("release_format", ["relabel", "tokenlabeling", "fkd", "imagenet-plus"])
def test_a_release_is_recognized_in_a_folder_and_in_a_tar(tmp_path, image_folder, release_format):
    write(tmp_path / "release", image_folder, release_format)
    (tmp_path / "release" / ".hidden.pt").write_bytes(b"of macOS")
    (tmp_path / "release" / "README.txt").write_bytes(b"text")
    assert rd.annotate.find_format(tmp_path / "release") == release_format
    assert rd.annotate.find_format(pack(tmp_path / "release", tmp_path / "release.tar")) == release_format


def test_other_files_are_refused(tmp_path, image_folder):
    with pytest.raises(FileNotFoundError, match=r"no release of soft labels at .*nowhere: expected <class>/<name>.pt"):
        rd.annotate.find_format(tmp_path / "nowhere")
    with pytest.raises(rd.DatasetError, match="images has no files of a known release"):
        rd.annotate.find_format(image_folder)
    with pytest.raises(rd.DatasetError, match=r"Decompress a .tar.gz first"):
        rd.annotate.find_format(pack(image_folder, tmp_path / "images.tar.gz", mode="w:gz"))
    for name, content, message in (
        ("int.pt", save(torch.zeros(3, dtype=torch.int64)), "in float32 or float16, got torch.int64"),
        ("list.pt", save([1]), "in float32 or float16, got list"),
        ("damaged.pt", b"", "damaged"),
    ):
        (tmp_path / name[:-3]).mkdir()
        (tmp_path / name[:-3] / name).write_bytes(content)
        with pytest.raises(rd.errors.LabelMapError, match=rf"{name}: .*{message}"):
            rd.annotate.find_format(tmp_path / name[:-3])
