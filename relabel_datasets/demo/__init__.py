"""The embedded default: everything this package does, on pictures that it draws itself. No data, no network."""

from .dataset import make_scenes_relabel
from .run import DemoResult, run_demo

__all__ = ["DemoResult", "make_scenes_relabel", "run_demo"]
