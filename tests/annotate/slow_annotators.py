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


class WaitsForActors(SlowNet):
    """Slow network that also waits until as many actors have signed in as the file `needed` next to their folder says.

    A build thus cannot end before the actors of a test have started, however slow the machine is.
    """

    def __init__(self, folder):
        super().__init__(seconds=0.1)
        self.folder = folder

    def forward(self, images):
        needed = self.folder.with_name("needed")
        is_picture = bool(
            (images.amax((2, 3)) > images.amin((2, 3))).any()
        )  # not the zeros that a new annotator is tried with
        while is_picture and len(list(self.folder.iterdir())) < len(needed.read_bytes()):
            time.sleep(0.05)
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


def slow_annotator(seconds=0.0):
    """Return an annotator like the fixture."""
    return ModuleAnnotator(SlowNet(seconds), (48, 64), classes=("cat", "dog", "emu"), name="colours")


def waiting_annotator(folder):
    """Return an annotator like the fixture, and create a file in the folder that names its Ray node and process."""
    sign_in(folder)
    return ModuleAnnotator(WaitsForActors(folder), (48, 64), classes=("cat", "dog", "emu"), name="colours")


def ending_annotator():
    return ModuleAnnotator(EndsProcess(), (48, 64), classes=("cat", "dog", "emu"), name="colours")


def failing_annotator():
    raise ValueError("no such checkpoint")
