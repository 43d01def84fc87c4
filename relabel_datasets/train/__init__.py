"""Train students on label maps, evaluate classifiers, and use timm's transforms with label maps.

Names are imported on first use.

Example:
    >>> import relabel_datasets as rd
    >>> from relabel_datasets.train import PRESETS, train_student
    >>> dataset, validation = (rd.load_dataset("imagenette-relabel", split=split) for split in ("train", "validation"))
    >>> recipe = PRESETS["relabel-cutmix"].changed(model="resnet18", batch_size=256)
    >>> train_student(dataset, "runs/student", recipe, validation=validation).metrics["top1"]
    0.78
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._lazy import import_lazily

if TYPE_CHECKING:
    from .checkpoints import load_checkpoint
    from .classifier import Classifier, Normalize, load_classifier
    from .comparison import Comparison, ComparisonEntry, compare, score_label_maps
    from .defaults import default_recipe
    from .evaluation import LabeledImages, SourceImages, evaluate, open_images
    from .loop import TrainResult, train_student
    from .recipe import LABELS, PRESETS, LabelConfig, Recipe, RuntimeConfig
    from .timm_augmentation import TimmStoredCrops, TimmTransforms, timm_transforms
    from .tokens import MixToken, TokenLabelPooling, TokenStudent, token_label_loss

_MODULES = {
    "Classifier": "classifier",
    "Comparison": "comparison",
    "ComparisonEntry": "comparison",
    "LABELS": "recipe",
    "LabelConfig": "recipe",
    "LabeledImages": "evaluation",
    "MixToken": "tokens",
    "Normalize": "classifier",
    "PRESETS": "recipe",
    "Recipe": "recipe",
    "RuntimeConfig": "recipe",
    "SourceImages": "evaluation",
    "TimmStoredCrops": "timm_augmentation",
    "TimmTransforms": "timm_augmentation",
    "TokenLabelPooling": "tokens",
    "TokenStudent": "tokens",
    "TrainResult": "loop",
    "compare": "comparison",
    "default_recipe": "defaults",
    "evaluate": "evaluation",
    "load_checkpoint": "checkpoints",
    "load_classifier": "classifier",
    "open_images": "evaluation",
    "score_label_maps": "comparison",
    "timm_transforms": "timm_augmentation",
    "token_label_loss": "tokens",
    "train_student": "loop",
}
__all__ = [
    "LABELS",
    "PRESETS",
    "Classifier",
    "Comparison",
    "ComparisonEntry",
    "LabelConfig",
    "LabeledImages",
    "MixToken",
    "Normalize",
    "Recipe",
    "RuntimeConfig",
    "SourceImages",
    "TimmStoredCrops",
    "TimmTransforms",
    "TokenLabelPooling",
    "TokenStudent",
    "TrainResult",
    "compare",
    "default_recipe",
    "evaluate",
    "load_checkpoint",
    "load_classifier",
    "open_images",
    "score_label_maps",
    "timm_transforms",
    "token_label_loss",
    "train_student",
]


def __getattr__(name: str) -> Any:
    return import_lazily(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return __all__
