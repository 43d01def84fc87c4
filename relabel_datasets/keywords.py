"""Suggest the intended keyword in errors for unknown keyword arguments."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Names of our arguments in torchvision, datasets, webdataset, timm, torch and on the command line, and their old names.
_FOREIGN: dict[str, tuple[str, ...]] = {
    "amp_dtype": ("dtype",),
    "annotator_name": ("name", "config"),
    "auth_token": ("token",),
    "bs": ("batch_size",),
    "cls_mapping": ("class_mapping",),
    "config": ("name", "config"),
    "config_name": ("name", "config"),
    "data_dir": ("path", "root"),
    "data_files": ("path", "root"),
    "dataset": ("path", "root", "source"),
    "dataset_name": ("name",),
    "dtype": ("storage_dtype",),
    "folder": ("path", "root", "folder"),
    "hf_token": ("token",),
    "image_dir": ("images",),
    "image_root": ("images",),
    "img_size": ("image_size",),
    "input_size": ("image_size",),
    "lr": ("learning_rate",),
    "machine": ("runtime",),
    "model_args": ("model_kwargs",),
    "name": ("config", "name"),
    "n_workers": ("num_workers",),
    "nproc": ("num_workers", "num_threads"),
    "num_proc": ("num_workers", "num_threads"),
    "num_replicas": ("world_size",),
    "opt": ("optimizer",),
    "out": ("path", "root", "out"),
    "output_dir": ("out", "path", "root"),
    "path": ("root", "folder", "path"),
    "repo": ("repo_id", "path"),
    "repo_id": ("path", "repo_id"),
    "root": ("path", "root"),
    "root_dir": ("path", "root"),
    "settings": ("build_config",),
    "shuffle_buffer": ("window",),
    "shuffle_buffer_size": ("window",),
    "size": ("output_size", "shard_size"),
    "students": ("entries",),
    "subset": ("name", "split"),
    "t": ("temperature",),
    "target_transform": ("transforms",),
    "tau": ("temperature",),
    "train": ("split",),
    "transform": ("transforms",),
    "url": ("path", "root"),
    "use_auth_token": ("token",),
    "wd": ("weight_decay",),
    "weights": ("checkpoint",),
    "workers": ("num_workers", "num_threads"),
}


def checked_keywords(*more: str, hints: dict[str, str] | None = None) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator that raises a TypeError with a suggestion for unknown keyword arguments of a function.

    Args:
        more: Names that the function accepts in its `**kwargs`.
        hints: Advice for foreign arguments that have no counterpart here, by name.

    Returns:
        The decorator. It keeps the signature of the function.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters = inspect.signature(function).parameters.values()
        known = [parameter.name for parameter in parameters if parameter.kind in kinds and parameter.name != "self"]
        known += more
        name = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            check_keywords(name, kwargs, known, hints)
            return function(*args, **kwargs)

        return checked

    return decorate


def check_keywords(
    name: str, keywords: Iterable[str], known: Collection[str], hints: dict[str, str] | None = None
) -> None:
    """Check the keyword arguments of a call.

    Args:
        name: Name of the function.
        keywords: Keywords of the call.
        known: Keywords that the function accepts.
        hints: Advice for keywords that have no counterpart, by keyword.

    Raises:
        TypeError: The function does not accept a keyword. The message suggests a similar one.
    """
    unknown = [key for key in keywords if key not in known]
    if unknown:
        problems = "; ".join(f"{key!r}: {_advice(key, known, hints or {})}" for key in unknown)
        raise TypeError(f"{name}() has no argument {problems}")


def _advice(name: str, known: Collection[str], hints: dict[str, str]) -> str:
    if name in hints:
        return hints[name]
    foreign = next((candidate for candidate in _FOREIGN.get(name.lower(), ()) if candidate in known), None)
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    if foreign or close:
        return f"did you mean {foreign or close[0]!r}?"
    return f"its arguments are {', '.join(known)}"
