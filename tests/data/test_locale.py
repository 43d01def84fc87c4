"""Names that are not ASCII, in a locale whose encoding of file names is not UTF-8."""

import json
import os
import subprocess
import sys

import pytest

import relabel_datasets as rd
from tests.conftest import ROOT, jpeg, write_tar

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PROGRAM = """
import json, pathlib, sys
import relabel_datasets as rd
from relabel_datasets.data.flat_folder import FlatFolder
from tests.conftest import colours
folder = pathlib.Path(sys.argv[1])
source = rd.data.open_source(folder / "photos.tar")
rd.build(source, folder / "dataset", colours(), progress=False)
refused = []
for name, open_folder in (("photos", rd.data.ImageFolderSource), ("flat", lambda path: FlatFolder(path, "stem"))):
    try:
        open_folder(folder / name)
    except rd.DatasetError as error:
        refused.append(str(error))
dataset = rd.load_dataset(folder / "dataset", split="train")
print(json.dumps([sys.getfilesystemencoding(), list(source.keys), list(dataset.keys), rd.verify(folder / "dataset").ok, refused]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has UTF-8 names in every locale")
def test_keys_do_not_depend_on_the_locale(tmp_path):
    names = ["gr\xf6\xdfe", "\u732b", "plain", "caf\xe9 " + "long" * 30]
    write_tar(
        tmp_path / "photos.tar",
        [(f"{name}.{end}", data) for name in names for end, data in (("jpg", jpeg(0)), ("cls", b"1"))],
    )
    for path in (tmp_path / "photos" / "cat" / "\xe9.jpg", tmp_path / "flat" / "\xe9.jpg"):
        path.parent.mkdir(parents=True)
        path.write_bytes(jpeg(0))
    environment = {**os.environ, **ASCII, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    encoding, keys, stored, ok, refused = json.loads(finished.stdout)
    assert encoding == "ascii"
    assert (sorted(keys), sorted(stored), ok) == (sorted(names), sorted(names), True)
    assert len(refused) == 2
    assert all(
        "encoding of file names is ascii in this locale" in message and "PYTHONUTF8 to 1" in message
        for message in refused
    )
    assert sorted(rd.load_dataset(tmp_path / "dataset", split="train").keys) == sorted(names)
