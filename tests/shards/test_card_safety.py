"""A card executes no code and shows no other file, and values of a manifest are escaped in it."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import ModuleAnnotator
from relabel_datasets.shards.card import find_restricted_images, write_card
from relabel_datasets.shards.card_template import (
    code,
    marked_template,
    package_templates,
    python_literal,
    read_template,
)
from relabel_datasets.storage.folders import MAX_CARD_BYTES, card_configs
from tests.bad_names import change_manifest
from tests.conftest import ROOT, ColourNet, picture

MARK = "<!-- Made by relabel_datasets from the template {}: edit the template, not this text. -->"
YAML = "---\nlicense: mit\n---\n"
RUN = "{{{{ cycler.__init__.__globals__.os.system('touch {}') }}}}"
NASTY = {
    "script": "</script><script>alert(1)</script>",
    "expression": "{{ 7 * 7 }}",
    "statement": "{% raw %}",
    "fence of YAML": "---",
    "fence of YAML in lines": "a\n---\nb",
    "backtick": "`",
    "backticks": "``a`b```",
    "pipe": "a | b",
    "escaped pipe": "a \\| b",
    "final backslash": "a\\",
    "our mark": MARK.format("default"),
    "open comment": "<!--",
    "link": "[x](javascript:alert(1))",
    "URL": "https://host.example/",
    "picture": "![x](http://host.example/x.png)",
    "heading": "\n# title\n",
    "code block": "\n```python\nimport os\n```\n",
    "table": "\n| a |\n| --- |\n",
    "emphasis": "*a* _b_ ~~c~~",
    "HTML": "<b onclick=alert(1)>&amp;",
    "math": "$x$",
    "YAML tag": "!!python/object/apply:os.system [id]",
    "YAML alias": "*x",
    "YAML anchor": "&x",
    "YAML key": "a: b",
    "YAML comment": "a # b",
    "YAML null": "null",
    "YAML number": "1e3",
    "YAML boolean": "yes",
    "quotes": "'\"",
    "escape sequence": "\x1b[31m",
    "NUL": "\x00",
    "bell": "\x07",
    "line separator": "a\u2028b",
    "right to left": "a\u202eb",
    "byte order mark": "\ufeffa",
    "carriage return": "a\rb",
    "spaces": "  a  ",
    "empty": "",
    "long": "x" * 5000,
    "other letters": "日本語",
}


@pytest.fixture(scope="module")
def _made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    for i, name in enumerate(("cat", "dog", "emu")):
        (root / "images" / name).mkdir(parents=True)
        picture(i).save(root / "images" / name / f"photo_{i}.jpg")
    _build(root)
    return root


def _build(root, split="train", **arguments):
    annotator = ModuleAnnotator(ColourNet(), (48, 64), classes=("cat", "dog", "emu"), name="colours")
    rd.build(
        rd.data.ImageFolderSource(root / "images"), root / "data", annotator, split=split, progress=False, **arguments
    )


@pytest.fixture
def root(_made, tmp_path, monkeypatch):
    """Folder with images and a dataset built from them, which is the working directory."""
    shutil.copytree(_made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def evil(root):
    """A template in the dataset's folder that would create a file, and the path of that file."""
    template, canary = root / "data" / "evil.md", root / "canary"
    template.write_text(f"---\n{{{{ card_data }}}}\n---\n{{{{ mark }}}}\n{RUN.format(canary)}\n")
    return template, canary


# Ways in which a card could name a template that is not one of the package's.
MARKED = {
    "absolute": lambda root: str(root / "data" / "evil.md"),
    "in the current folder": lambda root: "data/evil.md",
    "from a folder above": lambda root: f"../{root.name}/data/evil.md",
    "without extension": lambda root: str(root / "data" / "evil"),
    "below a template of ours": lambda root: f"default/../../{root}/data/evil.md",
    "file of the system": lambda root: "/etc/hostname",
    "part of our templates": lambda root: "shared",
    "extension of ours": lambda root: "default.md",
    "capitals": lambda root: "DEFAULT",
    "empty": lambda root: "",
    "expression": lambda root: RUN.format(root / "canary"),
    "line": lambda root: f"default: edit the template, not this text. --> {RUN.format(root / 'canary')} <!--",
}


@pytest.mark.parametrize("name", MARKED.values(), ids=MARKED)
@pytest.mark.parametrize("how", ["write_card", "build", "verify"])
def test_a_card_cannot_name_a_template_outside_of_the_package(root, evil, name, how):
    text = f"{MARK.format(name(root))}\n# Mine\n{RUN.format(evil[1])}\n"
    card = root / "data" / "README.md"
    card.write_text(YAML + text)
    {
        "write_card": lambda: write_card(root / "data"),
        "build": lambda: _build(root, split="validation"),
        "verify": lambda: rd.verify(root / "data", num_workers=0, progress=False),
    }[how]()
    assert not evil[1].exists()
    assert card.read_text().endswith(text)  # kept as it was
    assert how == "verify" or card_configs(card.read_bytes(), "card") == ["colours"]


def test_a_published_card_is_not_rendered_and_shows_no_other_file(
    root, evil, local_hub, impatient, monkeypatch, tmp_path
):
    monkeypatch.setenv("RELABEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_user")
    secret = root / "secret.md"
    secret.write_text("my secret")
    (root / "data" / "README.md").unlink()
    for path in (evil[0], secret):  # in the repository, where another member may have put it
        local_hub.publish("org/photos", root / "data")
        local_hub.commit("org/photos", {"README.md": f"{YAML}{MARK.format(path)}\n# Theirs\n".encode()})
        rd.publish(root / "data", "org/photos", progress=False)
        card = local_hub.files("org/photos")["README.md"].decode()
        assert "# Theirs" in card
        assert "my secret" not in card
        assert "config_name: colours" in card
    assert not evil[1].exists()


def test_only_files_of_the_manifest_and_the_card_are_published(root, local_hub, impatient, monkeypatch, tmp_path):
    monkeypatch.setenv("RELABEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_user")
    for name in (
        "secret.txt",
        "colours/.env",
        "colours/notes.md",
        "colours/train-00009-of-00010.tar",
        "other/secret.tar",
    ):
        (root / "data" / name).parent.mkdir(exist_ok=True)
        (root / "data" / name).write_text("mine")
    rd.publish(root / "data", "org/photos", progress=False)
    assert set(local_hub.files("org/photos")) - {".gitattributes"} == {
        "README.md", "colours/_info.json", "colours/examples.png", "colours/train.index.safetensors",
        "colours/train-00000-of-00001.tar",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("card", "name"),
    [
        (f"{YAML}{MARK.format('default')}\n", "default"),
        (f"{YAML}\n\n{MARK.format('default')}", "default"),
        (f"\ufeff---\r\na: b\r\n---\r\n{MARK.format('default')}\r\ntext", "default"),
        (f"{MARK.format('default')}\n", "default"),
        (f"{YAML}{MARK.format('a b.md')}\n", "a b.md"),
        (f"{YAML}# Mine\n{MARK.format('default')}\n", None),
        (f"{YAML}text {MARK.format('default')}\n", None),
        (f"{YAML}> {MARK.format('default')}\n", None),
        (f"{YAML}```\n{MARK.format('default')}\n```\n", None),
        (f"{YAML}{MARK.format('default')} text\n", None),
        (f"---\na: |\n  {MARK.format('default')}\n---\ntext\n", None),
        (f"{YAML}<!-- Made by relabel_datasets -->\n", None),
        ("", None),
        ("---\n", None),
    ],
)
def test_a_mark_counts_only_as_the_first_line_of_the_text(card, name):
    assert marked_template(card) == name


def test_a_text_that_quotes_the_mark_is_kept(root):
    text = f"# Mine\n\n{MARK.format('default')}\n\nmy text\n"
    (root / "data" / "README.md").write_text(YAML + text)
    write_card(root / "data")
    assert (root / "data" / "README.md").read_text().endswith(text)


@pytest.mark.parametrize("name", package_templates())
def test_a_card_is_rendered_again_from_the_template_in_its_mark(root, name):
    (root / "data" / "README.md").unlink()
    write_card(root / "data", name)
    card = (root / "data" / "README.md").read_text()
    assert marked_template(card) == name
    write_card(root / "data")
    assert (root / "data" / "README.md").read_text() == card


def test_the_name_of_a_template_has_precedence_over_a_file(root):
    (root / "default").write_text("mine")
    assert read_template("default") == (ROOT / "cards" / "default.md").read_text()
    assert read_template("./default") == "mine"
    (root / "data" / "README.md").unlink()
    write_card(root / "data", Path("./default").absolute())
    assert "from the template default:" not in (root / "data" / "README.md").read_text()


FORBIDDEN = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "globals of a function": "{{ use.__globals__ }}",
    "globals of jinja": RUN.format("canary"),
    "import": "{{ self.__init__.__globals__ }}",
    "attr": "{{ use | attr('__globals__') }}",
    "format": "{{ '{0.__globals__}'.format(use) }}",
    "change": "{% set _ = {}.update(a=1) %}",
    "include": "{% include '/etc/hostname' %}",
    "endless range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "unknown variable": "{{ secret }}",
    "syntax": "{% for %}",
    "division": "{{ 1 / 0 }}",
}


@pytest.mark.parametrize("text", FORBIDDEN.values(), ids=FORBIDDEN)
def test_a_template_of_the_user_is_sandboxed_and_named_in_its_errors(root, text):
    template = root / "mine.md"
    template.write_text(f"---\n{{{{ card_data }}}}\n---\n{text}\n")
    (root / "data" / "README.md").unlink()
    with pytest.raises(rd.DatasetError, match=r"card template .*mine\.md"):
        write_card(root / "data", template)
    assert not (root / "canary").exists()
    assert not (root / "data" / "README.md").exists()


@pytest.mark.parametrize("template", ["missing", "missing.md", "../default", "shared", ""])
def test_a_missing_template_is_an_error_and_nothing_is_written(root, template):
    before = (root / "data" / "README.md").read_bytes()
    with pytest.raises(FileNotFoundError, match="there is no card template"):
        read_template(template)
    if template:
        with pytest.raises(FileNotFoundError, match="there is no card template"):
            write_card(root / "data", template)
    assert (root / "data" / "README.md").read_bytes() == before


def _structure(card):
    """Return the structure of a card's rendered Markdown, without its texts."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(card.split("\n---\n", 1)[1])
    return [
        (token.type, token.tag, [(child.type, child.tag) for child in token.children or ()], sorted(token.attrs))
        for token in tokens
    ]


def _card_of(root, value):
    def change(content):
        content["classes"] = [value, f"dog {value}", "emu"]
        content["annotator"] |= {"name": value, "license": value or "none"}
        content["made_with"] = value

    change_manifest(root / "data" / "colours" / "_info.json", change)
    (root / "data" / "README.md").unlink(missing_ok=True)
    write_card(root / "data")
    return (root / "data" / "README.md").read_bytes().decode()


@pytest.fixture(scope="module")
def plain_structure(_made, tmp_path_factory):
    root = tmp_path_factory.mktemp("plain")
    shutil.copytree(_made, root, dirs_exist_ok=True)
    return _structure(_card_of(root, "plain"))


@pytest.mark.parametrize("value", NASTY.values(), ids=NASTY)
def test_values_of_a_manifest_change_neither_yaml_nor_markdown(root, plain_structure, value):
    card = _card_of(root, value)
    names = DatasetCard(card).data["dataset_info"][0]["features"][1]["dtype"]["class_label"]["names"]
    assert names == {"0": value, "1": f"dog {value}", "2": "emu"}
    assert yaml.safe_load(card.split("\n---\n")[0][4:]).keys() == DatasetCard(card).data.to_dict().keys()
    assert marked_template(card) == "default"
    assert _structure(card) == plain_structure


@pytest.mark.parametrize("value", NASTY.values(), ids=NASTY)
def test_values_are_one_line_of_markdown_code_and_of_python(value):
    assert code(value).isprintable()
    assert "|" not in code(value)
    literal = python_literal(value)
    assert ast.literal_eval(literal) == value
    assert "`" not in literal
    assert len(literal.splitlines()) == 1


BROKEN = {
    "not UTF-8": (b"---\nlicense: mit\n---\nGr\xfc\xdfe\n", "is not UTF-8"),
    "too large": (YAML.encode() + b"x" * MAX_CARD_BYTES, f"more than {MAX_CARD_BYTES} bytes"),
    "no YAML": (b"---\n{a: [\n---\ntext\n", "YAML cannot be parsed"),
    "Python object": (
        b"---\na: !!python/object/apply:os.system ['touch canary']\n---\ntext\n",
        "YAML cannot be parsed",
    ),
    "list": (b"---\n- a\n---\ntext\n", "YAML cannot be parsed"),
    "deep": (b"---\na: " + b"[" * 1000 + b"\n---\ntext\n", "YAML cannot be parsed"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_card_is_an_error_and_unchanged(root, content, message):
    card = root / "data" / "README.md"
    card.write_bytes(content)
    with pytest.raises(rd.DatasetError, match=f"README.md.*{message}"):
        write_card(root / "data")
    assert card.read_bytes() == content
    assert not (root / "canary").exists()
    report = rd.verify(root / "data", num_workers=0, progress=False)
    assert [problem.problem.startswith("README.md cannot be read") for problem in report.problems] == [True]
    if message.startswith("YAML"):
        with pytest.raises(rd.DatasetError, match="YAML of the dataset's card cannot be parsed"):
            find_restricted_images(content.decode(), [])


def test_nested_yaml_aliases_are_not_expanded():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    bomb = "\n".join(lines)
    with pytest.raises(rd.DatasetError, match="is not a valid config name"):
        card_configs(f"---\n{bomb}\nconfigs:\n- config_name: *a2\n---\n".encode(), "card")
    assert find_restricted_images(f"---\n{bomb}\nrestricted_images: *a11\n---\n", []) == "unknown origin"


def test_a_class_name_is_not_rendered_as_math():
    assert re.fullmatch("`.*`", code("$\\int$"))
