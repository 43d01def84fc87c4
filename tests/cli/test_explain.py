import errno
import os

import pytest
import torch

from relabel_datasets.cli import main, make_parser
from relabel_datasets.cli.explain import explain, options_of
from relabel_datasets.errors import DatasetError


def system_error(number: int, *path: str) -> OSError:
    return OSError(number, os.strerror(number), *path)


def worker_error() -> Exception:
    class Failing(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise DatasetError("shard 3 is damaged")

    try:
        next(iter(torch.utils.data.DataLoader(Failing(), num_workers=1)))
    except DatasetError as error:
        return error
    raise AssertionError


CASES = {
    "our own error": (DatasetError("x.tar is damaged: fetch it again"), "x.tar is damaged: fetch it again"),
    "several lines": (ValueError("a\n  b\n"), "a b"),
    "full disk": (system_error(errno.ENOSPC, "/out/x"), "/out/x cannot be written, the disk is full: free some space"),
    "full disk, no path": (system_error(errno.ENOSPC), "the disk is full: free some space"),
    "full disk, our message": (
        OSError(errno.ENOSPC, "the disk of /out is full: free it"),
        "the disk of /out is full: free it",
    ),
    "open files": (system_error(errno.EMFILE), "ulimit -n"),
    "open files with path": (system_error(errno.EMFILE, "x"), "ulimit -n"),
    "no file": (
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
        "x: no such file or directory: check",
    ),
    "no permission": (
        PermissionError(errno.EACCES, "Permission denied", "x"),
        "x: permission denied: check its permissions",
    ),
    "a folder": (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), "x: is a directory: give a file"),
    "memory": (MemoryError(), "out of memory: lower --batch-size"),
    "memory of torch": (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        "lower --",
    ),
    "memory of a GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried"), "the GPU is out of memory: lower"),
    "optional package": (
        ModuleNotFoundError("No module named 'ray'", name="ray"),
        'pip install "relabel-datasets[ray]"',
    ),
    "any package": (ModuleNotFoundError("No module named 'adlfs'", name="adlfs"), "pip install adlfs"),
    "network": (ConnectionRefusedError(111, "Connection refused"), "the network cannot be reached: check"),
    "third party": (KeyError("model"), "unexpected KeyError: 'model'. Run the command with --debug"),
    "no message": (ValueError(), "unexpected ValueError: no message. Run the command with --debug"),
    "decoding": (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), "unexpected UnicodeDecodeError"),
    "recursion": (RecursionError("maximum recursion depth exceeded"), "unexpected RecursionError"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_error_is_one_line_with_advice(case):
    error, expected = CASES[case]
    assert expected in explain(error)
    assert "\n" not in explain(error)


def test_an_error_in_a_worker_is_shown_as_that_error():
    assert explain(worker_error()) == "shard 3 is damaged"


def test_a_long_message_is_truncated():
    assert len(explain(ValueError("x" * 10_000))) < 2000


KEYWORDS = {  # message in Python: message on the command line
    "warmup_epochs= must be at least 0, got -1": "--warmup-epochs must be at least 0, got -1",
    "epochs=5 must be more than warmup_epochs=5: raise epochs=": "--epochs 5 must be more than --warmup-epochs 5: raise --epochs",
    "labels='tokens' (mixup=0.2) set mixup=0. Then": "--labels 'tokens' (--mixup 0.2) set --mixup 0. Then",
    "leave out `storage=` and name=": "leave out `storage=` and --config",
    "out= must be a local path, or out=x": "--out must be a local path, or --out x",
    "channels_last=True, compile=False": "--channels-last, compile=False",
    "path= is the dataset in data/split=train, s3://b?split=x and a/epochs=5/b": "PATH is the dataset in data/split=train, s3://b?split=x and a/epochs=5/b",
    "model_kwargs={'a': 1}, image_column=x": "model_kwargs={'a': 1}, --image-column x",
}


@pytest.mark.parametrize("message", KEYWORDS)
def test_keyword_arguments_are_shown_as_the_options_of_the_command(message):
    assert explain(ValueError(message), options_of(make_parser(), "train")) == KEYWORDS[message]
    assert explain(ValueError(message)) == message


COMMANDS = {  # command line: part of its error
    "--epochs 5 --warmup-epochs 5": "--epochs 5 must be more than --warmup-epochs 5: raise --epochs or lower --warmup-epochs",
    "--labels double": "--labels must be one of",
    "--min-area 0": "--min-area must be above 0 and at most 1, got 0.0",
    "--labels tokens --mixup 0.2": "--labels tokens cannot be combined with --mixup 0.2: set --mixup 0",
    "--log-every 0": "--log-every must be at least 1, got 0",
}


@pytest.mark.parametrize("arguments", COMMANDS)
def test_an_error_in_a_recipe_names_the_option(arguments, dataset_folder, tmp_path, capsys):
    command = [
        "train",
        str(dataset_folder),
        "--config",
        "colours",
        "--validation",
        "train",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*command, *arguments.split()]) == 1
    assert COMMANDS[arguments] in capsys.readouterr().err
