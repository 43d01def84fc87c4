import io
import logging
import sys

import pytest
from tqdm import tqdm

from relabel_datasets.cli.console import OutputClosedError, SafeFormatter, SafeStream, safe_output
from relabel_datasets.words import printable

HOSTILE = {  # text: escaped text
    "\x1b[2J": "\\x1b[2J",
    "\x1b]0;title\x07": "\\x1b]0;title\\x07",
    "\x9b31m": "\\x9b31m",
    "\x00\x08\x7f\x85": "\\x00\\x08\\x7f\\x85",
    "a\rb": "a\\rb",
    "a\nb": "a\\nb",
    "\u202eabc\u202c": "\\u202eabc\\u202c",
    "\u2066\u2069\u200e\u061c": "\\u2066\\u2069\\u200e\\u061c",
    "a\u200bb\u200d\u2060\ufeff": "a\\u200bb\\u200d\\u2060\\ufeff",
    "\u2028\u2029": "\\u2028\\u2029",
    "\udcff\udc80": "\\udcff\\udc80",
    "\U000e0041": "\\U000e0041",
}


@pytest.mark.parametrize(("text", "shown"), HOSTILE.items())
def test_control_characters_are_escaped(text, shown):
    assert printable(text) == shown
    assert printable(text).isprintable()


@pytest.mark.parametrize("text", ["", "tench, Tinca tinca", "猫 é ü 🐈", "a\u3000b\xa0c", "\ue000", "C:\\x"])
def test_other_texts_are_unchanged(text):
    assert printable(text) == text


def test_characters_in_keep_are_unchanged():
    assert printable("a\nb\r", keep="\n") == "a\nb\\r"


class TestStream:
    @pytest.mark.parametrize("text", [text for text in HOSTILE if "\n" not in text and not text.startswith("\x1b[")])
    def test_everything_except_newlines_is_escaped(self, text):
        file = io.StringIO()
        stream = SafeStream(file)
        print(f"x{text}", file=stream)
        stream.writelines([f"y{text}\n", "z\n"])
        assert file.getvalue() == f"x{HOSTILE[text]}\ny{HOSTILE[text]}\nz\n"

    def test_urls_and_secrets_are_redacted(self):
        file = io.StringIO()
        SafeStream(file, ["s3cret-word"]).write("s3cret-word of https://me:pw@host/x?sig=1")
        assert file.getvalue() == "*** of https://host/x"

    def test_progress_bars_are_unchanged(self):
        def draw(file):
            with tqdm(total=2, file=file, mininterval=0, bar_format="{desc}{n}", desc="a", position=0) as outer:
                tqdm.write("skipped", file=file)  # with one bar, because tqdm redraws several in an arbitrary order
                with tqdm(total=1, file=file, mininterval=0, bar_format="{n}", position=1, leave=False) as inner:
                    inner.update()
                outer.update()

        files = io.StringIO(), io.StringIO()
        draw(files[0])
        draw(SafeStream(files[1]))
        assert files[1].getvalue() == files[0].getvalue() != ""
        assert "\x1b[A" in files[1].getvalue()

    def test_colors_of_other_libraries_are_removed(self):
        file = io.StringIO()
        SafeStream(file).write("\x1b[36m(pid=1)\x1b[0m hello\n")
        assert file.getvalue() == "(pid=1) hello\n"

    @pytest.mark.parametrize("method", ["write", "flush"])
    def test_a_closed_reader_raises_output_closed_error(self, method):
        class Closed(io.StringIO):
            def write(self, text):
                raise BrokenPipeError

            def flush(self):
                raise BrokenPipeError

        with pytest.raises(OutputClosedError):
            getattr(SafeStream(Closed()), method)(*(["x"] if method == "write" else []))

    def test_other_attributes_are_those_of_the_stream(self):
        file = io.StringIO()
        assert SafeStream(file).isatty() is False
        assert SafeStream(file).getvalue() == ""


def test_a_log_message_is_one_line_and_its_traceback_keeps_its_lines():
    formatter = SafeFormatter("%(message)s")
    record = logging.LogRecord("x", logging.INFO, __file__, 1, "key %s", ("a\nb\x1b[2J",), None)
    assert formatter.format(record) == "key a\\nb\\x1b[2J"
    try:
        raise ValueError("x")
    except ValueError:
        record.exc_info = sys.exc_info()
    assert len(formatter.format(record).splitlines()) > 2


class TestSafeOutput:
    def test_hides_passwords_in_arguments_and_tokens_in_the_environment(self, capsys, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "some-token-of-a-user")
        with safe_output(["inspect", "https://me:long-password@host/x"]):
            sys.stdout.write("long-password\n")
            sys.stderr.write("some-token-of-a-user\n")
        assert tuple(capsys.readouterr()) == ("***\n", "***\n")

    def test_restores_stdout_and_stderr(self):
        before = sys.stdout, sys.stderr
        with safe_output([]):
            assert isinstance(sys.stdout, SafeStream)
        assert (sys.stdout, sys.stderr) == before
