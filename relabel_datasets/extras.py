"""Optional packages: the extras of the package, and one error for those that are not installed."""

from __future__ import annotations

from importlib import import_module

from .errors import MissingExtraError

# Extra of pyproject.toml: the package that it adds, by the name of its module.
EXTRAS = {
    "gcs": "gcsfs",
    "hf": "transformers",
    "plots": "matplotlib",
    "ray": "ray",
    "s3": "s3fs",
    "tensorboard": "tensorboard",
}
# Extras that need no error: without their package, everything works as before, only slower.
FASTER = {"fast": "simplejpeg"}
_OF_PROTOCOLS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}  # protocol of a URL: extra


def install_command(extra: str) -> str:
    """Return the command that installs an extra.

    Args:
        extra: Name of the extra, a key of `EXTRAS`.
    """
    return f'pip install "relabel-datasets[{extra}]"'


def is_installed(extra: str) -> bool:
    """Return whether the package of an extra can be imported.

    Args:
        extra: Name of the extra, a key of `EXTRAS`.

    Raises:
        ImportError: The package is there, but one that it needs is missing or broken.
    """
    package = EXTRAS[extra]
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        return False
    return True


def check_extra(extra: str, feature: str) -> None:
    """Raise an error unless the package of an extra is installed. Call it before any work that would be lost.

    Args:
        extra: Name of the extra, a key of `EXTRAS`.
        feature: Feature that needs the extra, for the message, such as `"engine 'ray'"`.

    Raises:
        MissingExtraError: (an ImportError) The package is not installed. The message names the extra.
    """
    if not is_installed(extra):
        raise MissingExtraError(
            f"{feature} needs the Python package {EXTRAS[extra]!r}, which is not installed: {install_command(extra)}"
        )


def check_protocol(protocol: str) -> None:
    """Raise an error unless the package for the URLs of a protocol is installed, if it is that of an extra.

    Args:
        protocol: Protocol of a URL in lower case, such as `"s3"`.

    Raises:
        MissingExtraError: (an ImportError) The package is not installed. The message names the extra.
    """
    if protocol in _OF_PROTOCOLS:
        check_extra(_OF_PROTOCOLS[protocol], f"{protocol}://")
