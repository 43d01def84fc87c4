import argparse
import subprocess
import sys

import pytest

from relabel_datasets.cli import main, make_parser, runner
from tests.conftest import ROOT


def run(code, *arguments):
    """Run the command `work`, which calls `code(args)`."""

    def parser():
        root = runner.Parser(prog="relabel")
        root.add_subparsers(dest="command").add_parser("work").set_defaults(run=code)
        return root

    return runner.run_command(parser, arguments, resumable=frozenset())


def fail(error):
    def code(args):
        raise error

    return code


class TestExitCodes:
    @pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
    def test_a_finished_command_returns_its_exit_code(self, returned, code):
        assert run(lambda args: returned, "work") == code

    @pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), TypeError("x"), MemoryError(), AssertionError()])
    def test_any_error_is_one_line_and_returns_1(self, error, capsys):
        assert run(fail(error), "work") == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("relabel work: ")
        assert shown.err.count("\n") == 1

    def test_wrong_arguments_exit_with_2(self, capsys):
        with pytest.raises(SystemExit) as caught:
            run(print, "wrong")
        assert caught.value.code == 2

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("trian data", "relabel: error: argument COMMAND: invalid choice: 'trian'"),
            ("train data", "relabel train: error: the following arguments are required: --out; see `relabel train --help`"),
            ("train data --out x --label single", "relabel train: error: unrecognized arguments: --label single: did you mean --labels?"),
            ("train data --out x --label=single", "relabel train: error: unrecognized arguments: --label=single: did you mean --labels?"),
            ("train data --out x more", "relabel train: error: unrecognized arguments: more; see `relabel train --help`"),
            ("train data --out x --preset relable", "relabel train: error: argument --preset: invalid choice: 'relable'"),
            ("--hlep", "relabel: error: unrecognized arguments: --hlep: did you mean --help?"),
        ],
    )  # fmt: skip
    def test_wrong_arguments_are_one_line_with_the_command_and_its_help(self, line, message, capsys):
        with pytest.raises(SystemExit) as caught:
            main(line.split())
        shown = capsys.readouterr().err
        assert caught.value.code == 2
        assert shown.startswith(message)
        assert shown.count("\n") == 1

    @pytest.mark.parametrize(
        ("line", "meant"), [("trian data", "train"), ("train data --out x --preset relable", "relabel")]
    )
    def test_a_misspelled_choice_is_suggested(self, line, meant, capsys):
        with pytest.raises(SystemExit):
            main(line.split())
        assert meant in capsys.readouterr().err.split("you mean")[-1]

    def test_ctrl_c_returns_130(self, capsys):
        assert run(fail(KeyboardInterrupt()), "work") == 130
        assert capsys.readouterr().err == "\nrelabel work: stopped\n"

    @pytest.mark.parametrize("redirect", ["| true", "| head -n 1", "2>&1 | head -c 1"])
    def test_a_closed_reader_is_silent(self, redirect):
        assert shell(redirect) == "141\n"

    @pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-"])
    def test_closed_streams_are_no_error_and_no_file_gets_their_descriptors(self, closed):
        assert shell(closed) == "0\n"

    def test_a_full_disk_of_stdout_is_one_line(self):
        assert shell("> /dev/full") == "relabel: the disk is full: free some space and run the same command again\n1\n"


def shell(redirect):
    """Run a command with much output, and return what it writes to stderr, followed by its exit code."""
    program = f"""
import sys, types
package = types.ModuleType("relabel_datasets")  # without torch, which takes seconds to import
package.__path__ = [{str(ROOT / "relabel_datasets")!r}]
sys.modules["relabel_datasets"] = package
from relabel_datasets.cli import runner
def work(args):
    with open(sys.executable, "rb") as file:
        assert file.fileno() > 2
    for _ in range(100_000):
        sys.stdout.write("a line\\n")
def parser():
    root = runner.Parser(prog="relabel")
    root.set_defaults(run=work)
    return root
sys.exit(runner.run_command(parser, []))
"""
    command = f'"$0" -c "$1" {redirect}; echo ${{PIPESTATUS[0]}} >&2'
    finished = subprocess.run(
        ["bash", "-c", command, sys.executable, program], capture_output=True, text=True, check=True
    )
    return finished.stderr


class TestDebug:
    @pytest.mark.parametrize("arguments", [("--debug", "work"), ("work", "--debug")])
    def test_prints_the_traceback_before_the_line(self, arguments, capsys):
        assert run(fail(ValueError("wrong")), *arguments) == 1
        shown = capsys.readouterr().err
        assert shown.startswith("Traceback")
        assert shown.endswith("ValueError: wrong\nrelabel work: wrong\n")

    def test_every_command_has_the_option(self):
        (subparsers,) = (action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
        assert len(subparsers.choices) > 10
        for parser in subparsers.choices.values():
            assert "--debug" in parser.format_help()

    def test_the_traceback_has_no_secrets_and_no_control_characters(self, capsys):
        def code(args):
            try:
                raise OSError("GET https://me:s3cr3t-pw@host/x?sig=51gnature")
            except OSError as error:
                raise KeyError("a\x1b[2Jb") from error

        assert run(code, "work", "--debug") == 1
        shown = capsys.readouterr().err
        assert "https://host/x" in shown
        assert "\\x1b[2J" in shown
        assert not [text for text in ("s3cr3t", "51gnature", "\x1b") if text in shown.replace("    raise", "")]


class TestArguments:
    URL = "https://alice:pass-W0rd@host/x?sig=51gnature"

    @pytest.mark.parametrize(
        "arguments",
        [
            ["demo"],
            ["build", "images", "out", "--annotator", "m", "--class-mapping"],
            ["build", "images", "out", "--annotator", "m", "--checkpoint"],
            ["build", "images", "out", "--annotator", "m", "--classes-file"],
            ["import", "source", "--format", "relabel", "--order", "hw"],
            ["import", "source", "out", "--format", "relabel", "--order", "hw", "--classes"],
            ["publish"],
            ["analyze", "--out"],
            ["analyze", "--boxes"],
            ["pictures", "x", "--out"],
            ["report", "x", "--out"],
            ["report", "x", "--boxes"],
            ["train", "x", "--out"],
            ["compare", "x", "--out"],
            ["evaluate", "m", "x", "--json"],
            ["evaluate", "m", "x", "--boxes"],
            ["evaluate", "m", "x", "--checkpoint"],
            ["verify", "x", "--json"],
            ["annotators", "--json"],
        ],
        ids=" ".join,
    )
    def test_a_url_in_place_of_a_local_path_is_refused_without_its_secrets(
        self, arguments, capsys, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as caught:
            main([*arguments, self.URL])
        assert caught.value.code == 2
        shown = capsys.readouterr().err
        assert "must be a local path, got the URL https://host/x" in shown
        assert not [secret for secret in ("alice", "pass-W0rd", "51gnature") if secret in shown]
        assert not list(tmp_path.iterdir())

    def test_unexpected_arguments_are_shown_safely(self, capsys):
        with pytest.raises(SystemExit):
            main(["verify", "x", self.URL, "\x1b[2J\ny"])
        shown = capsys.readouterr().err
        assert "https://host/x \\x1b[2J\\ny" in shown
        assert "pass-W0rd" not in shown

    @pytest.mark.parametrize("arguments", [["verify", "x"], ["evaluate", "m", "x"], ["annotators"]], ids=" ".join)
    def test_a_result_that_cannot_be_written_is_refused_before_the_command_runs(self, arguments, capsys):
        with pytest.raises(SystemExit):
            main([*arguments, "--json", "/nowhere/result.json"])
        assert "the folder /nowhere does not exist: create it first" in capsys.readouterr().err
