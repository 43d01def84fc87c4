import errno
import os

import pytest

import relabel_datasets as rd


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_limit_of_the_machine_stops_a_build_without_skipping_images(tmp_path, image_folder, annotator, number):
    class Source(rd.data.ImageFolderSource):
        def read(self, index):
            if index == 5:
                raise OSError(number, os.strerror(number))
            return super().read(index)

    with pytest.raises(OSError, match=r"ulimit|fs\.file-max") as caught:
        rd.build(Source(image_folder), tmp_path / "data", annotator, progress=False)
    assert caught.value.errno == number
    assert not list(tmp_path.glob("data/*/*.tar"))


def test_an_unreadable_image_is_skipped(tmp_path, image_folder, annotator):
    class Source(rd.data.ImageFolderSource):
        def read(self, index):
            if index == 5:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(index)

    manifest = rd.build(Source(image_folder), tmp_path / "data", annotator, progress=False)
    assert len(manifest.splits["train"].skipped) == 1
