"""Annotators for builds that are killed, in a module that other processes can import."""

import os
import time

from relabel_datasets.annotate.annotator import ModuleAnnotator
from relabel_datasets.annotate.timm_annotator import TimmAnnotator
from tests.conftest import ColourNet


class SlowNet(ColourNet):
    """Network that is slow enough to be killed in the middle of a build."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, images):
        time.sleep(self.seconds)
        return super().forward(images)


class EndsProcess(ColourNet):
    """Network that ends its process at the first batch."""

    def forward(self, images):
        if len(images) > 1:
            os._exit(1)
        return super().forward(images)


def sign_in(folder):
    import ray

    (folder / f"{ray.get_runtime_context().get_node_id()}-{os.getpid()}").touch()


def signed_in_timm_annotator(folder, name, options):
    annotator = TimmAnnotator(name, **options)
    sign_in(folder)
    return annotator


def slow_annotator(seconds=0.0, folder=None):
    """Return an annotator like the fixture, and create a file in the folder that names its Ray node and process."""
    if folder is not None:
        sign_in(folder)
    return ModuleAnnotator(SlowNet(seconds), (48, 64), classes=("cat", "dog", "emu"), name="colours")


def ending_annotator():
    return ModuleAnnotator(EndsProcess(), (48, 64), classes=("cat", "dog", "emu"), name="colours")


def failing_annotator():
    raise ValueError("no such checkpoint")
