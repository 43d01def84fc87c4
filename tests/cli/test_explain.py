import errno
import os
import signal
import threading

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


def killed_worker_error(number: int) -> Exception:
    """Return torch's error for a worker that a signal has killed."""

    class Killed(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            os.kill(os.getpid(), number)

    try:
        next(iter(torch.utils.data.DataLoader(Killed(), num_workers=1)))
    except RuntimeError as error:
        return error
    raise AssertionError


def thread_error() -> Exception:
    """Return Python's error for a thread that the system does not start."""
    before = threading.stack_size(1 << 46)  # more than there is
    try:
        threading.Thread(target=int).start()
    except RuntimeError as error:
        return error
    finally:
        threading.stack_size(before)
    raise AssertionError


KILLED = {signal.SIGBUS: "out of shared memory: enlarge /dev/shm", signal.SIGKILL: "out of memory: lower --batch-size"}
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
    "shared memory": (
        RuntimeError("unable to write to file </torch_7_8_9>: No space left on device (28)"),
        "out of shared memory: enlarge /dev/shm",
    ),
    "worker": (
        RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
        "a DataLoader worker was killed, usually because memory or shared memory ran out: lower --num-workers",
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


@pytest.mark.parametrize("number", KILLED)
def test_a_killed_worker_is_explained(number):
    assert KILLED[number] in explain(killed_worker_error(number))


def test_a_thread_that_does_not_start_is_explained():
    assert "starts no more threads: raise the limit (ulimit -u" in explain(thread_error())


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
