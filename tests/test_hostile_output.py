"""Output of commands for a dataset whose names contain terminal control characters."""

import json

import PIL.Image
import pytest

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import ModuleAnnotator
from relabel_datasets.cli import main
from relabel_datasets.shards.card import write_card
from relabel_datasets.shards.manifest import Manifest
from tests.conftest import ColourNet

ESCAPES = "\x1b[2J\x1b]0;owned\x07\u202e\u200b\x9b"
CLASSES = (f"cat{ESCAPES}", "dog\nrelabel: all is well\r", "emu\u2028")


@pytest.fixture
def hostile(tmp_path, image_folder):
    """Dataset with control characters in its classes and in the name of its annotator. Keys cannot contain them."""
    root = tmp_path / "hostile"
    annotator = ModuleAnnotator(ColourNet(), (48, 64), classes=("cat", "dog", "emu"), name="colours")
    rd.build(rd.data.ImageFolderSource(image_folder), root, annotator, config="colours", shard_size=5, progress=False)
    path = root / "colours"
    content = json.loads((path / "_info.json").read_text())
    content["classes"] = list(CLASSES)
    content["annotator"]["name"] = f"net{ESCAPES}\nline"
    del content["checksum"]
    Manifest(**{**content, "splits": Manifest.load(path).splits}).save(path)
    write_card(root)
    return root


SUCCEED = {"inspect", "inspect a shard", "verify", "analyze", "pictures", "report", "compare"}  # the others return 1
COMMANDS = {
    "inspect": ["{root}"],
    "inspect a shard": ["{root}/colours/train-00000-of-00003.tar"],
    "verify": ["{root}", "--num-workers", "0"],
    "verify a damaged one": ["{damaged}", "--num-workers", "0"],
    "analyze": ["{root}", "--num-crops", "26"],
    "pictures": ["{root}", "--count", "2", "--out", "{tmp}/pictures"],
    "pictures of no class": ["{root}", "--class", f"cta{ESCAPES}", "--out", "{tmp}/pictures"],
    "pictures of no key": ["{root}", "--key", f"x{ESCAPES}\n", "--out", "{tmp}/pictures"],
    "report": ["{root}", "--num-crops", "26", "--out", "{tmp}/report.html"],
    "compare": ["{root}"],
    "evaluate": ["test_resnet", "{root}", "--split", "train", "--device", "cpu", "--num-workers", "0", "--image-size", "64"],
    "build": ["{images}", "{tmp}/out", "--annotator", f"net{ESCAPES}"],
    "train": [f"{{root}}{ESCAPES}", "--out", "{tmp}/run"],
    "publish": [f"{{tmp}}/{ESCAPES}\n", "org/name"],
    "import": [f"{{tmp}}/{ESCAPES}\n", "{tmp}/out", "--format", "relabel", "--order", "hw"],
    "annotators": [f"{ESCAPES}*"],
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_no_command_prints_control_characters(case, hostile, image_folder, tmp_path, capfd):
    damaged = hostile
    if "damaged" in case:
        shard = next(hostile.rglob("*.tar"))
        shard.write_bytes(shard.read_bytes().replace(b"photo_", b"ph\x1b[2J"))
    values = {"root": hostile, "damaged": damaged, "images": image_folder, "tmp": tmp_path}
    capfd.readouterr()
    code = main([case.partition(" ")[0], *(argument.format(**values) for argument in COMMANDS[case])])
    assert code == (case not in SUCCEED)
    out, err = capfd.readouterr()
    bad = [
        character
        for text in (out, err.replace("\x1b[A", "").replace("\r", ""))
        for character in text
        if character not in "\n\t" and not character.isprintable()
    ]
    assert not bad
    lines = (out + err).splitlines()
    assert "relabel: all is well" not in lines
    if case.startswith("inspect"):
        assert "\\x1b[2J" in out
    if code:
        assert err.splitlines()[-1].startswith(f"relabel {case.partition(' ')[0]}: ") or case.startswith("verify")


def test_tables_hold_no_control_characters(hostile, tmp_path):
    assert main(["analyze", str(hostile), "--num-crops", "26", "--out", str(tmp_path / "tables")]) == 0
    tables = {path.stem: path.read_text() for path in (tmp_path / "tables").glob("*.csv")}
    assert {"classes", "confused", "suspects"} <= tables.keys()
    for name, text in tables.items():
        assert all(line.isprintable() for line in text.split("\n")), name
    assert "cat\\x1b[2J" in tables["classes"]


def test_file_names_that_are_not_utf8_do_not_crash_the_output(tmp_path, capfd):
    folder = tmp_path / "images" / "cat"
    folder.mkdir(parents=True)
    name = b"photo_\xff.jpg".decode("utf-8", "surrogateescape")
    PIL.Image.new("RGB", (32, 32)).save(folder / name)
    (folder / b"bad_\xfe.jpg".decode("utf-8", "surrogateescape")).write_bytes(b"no image")
    code = main(["build", str(tmp_path / "images"), str(tmp_path / "out"), "--annotator", "nothing:nowhere"])
    assert code == 1
    code = main(["inspect", str(tmp_path / b"out_\xff".decode("utf-8", "surrogateescape"))])
    assert code == 1
    assert "out_\\udcff" in capfd.readouterr().err
