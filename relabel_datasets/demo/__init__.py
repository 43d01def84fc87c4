"""Run the whole method on drawn scenes: label maps, students, a table and a report. Needs no data.

Names are imported on first use.

Example:
    >>> from pathlib import Path
    >>> from relabel_datasets.demo import run_demo
    >>> result = run_demo(Path("relabel-demo"), seeds=1)
    >>> print(result.to_markdown())
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._lazy import import_lazily

if TYPE_CHECKING:
    from .dataset import make_scenes_relabel
    from .results import DemoResult
    from .run import run_demo
    from .scenes import Scene, SceneObject, draw_scenes, read_objects
    from .scoring import Score

_MODULES = {
    "DemoResult": "results",
    "Scene": "scenes",
    "SceneObject": "scenes",
    "Score": "scoring",
    "draw_scenes": "scenes",
    "make_scenes_relabel": "dataset",
    "read_objects": "scenes",
    "run_demo": "run",
}
__all__ = [
    "DemoResult",
    "Scene",
    "SceneObject",
    "Score",
    "draw_scenes",
    "make_scenes_relabel",
    "read_objects",
    "run_demo",
]


def __getattr__(name: str) -> Any:
    return import_lazily(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return __all__
