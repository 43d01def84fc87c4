"""Recipes: how a student is trained, as plain values, and the named ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class LabelConfig:
    """What a student is told about a crop.

    Attributes:
        pooled: the soft label of the crop, from its label map.
        localized: pooled under the crop, not over the whole image.
        multi_label: all classes of the pooled label, not the best alone.
        smoothing: of the class index, where labels are not pooled.
        distilled: the annotator's own answer to the very crop, computed as training goes.
        tokens: a label for each token beside that of the crop.
    """

    pooled: bool = False
    localized: bool = True
    multi_label: bool = True
    smoothing: float = 0.0
    distilled: bool = False
    tokens: bool = False


LABELS = {
    "single": LabelConfig(),
    "smoothed": LabelConfig(smoothing=0.1),
    "relabel": LabelConfig(pooled=True),
    "global-multi": LabelConfig(pooled=True, localized=False),
    "localized-single": LabelConfig(pooled=True, multi_label=False),
    "global-single": LabelConfig(pooled=True, localized=False, multi_label=False),
    "distilled": LabelConfig(distilled=True),
    "tokens": LabelConfig(pooled=True, tokens=True),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a student is trained. The defaults are the paper's for ResNet-50 on ImageNet.

    Attributes:
        labels: a name in `LABELS`: the class index (`single`, `smoothed`), the pooled label map (`relabel`), the paper's
            ablation of it (`global-multi`, `localized-single`, `global-single`), the annotator's answer to each crop
            (`distilled`), or labels of tokens beside that of the crop (`tokens`).
        model: name of a timm model.
        model_kwargs: more arguments of `timm.create_model`.
        image_size: pixels of a side of a training crop.
        eval_size: pixels of a side of a validation image; None: as in training.
        crop_pct: share of a side that is left of a validation image after cropping its middle.
        min_area: the least share of an image's area that a crop shows.
        color_jitter: strength; 0 is none.
        auto_augment: timm's text for RandAugment and the like, such as "rand-m9-mstd0.5-inc1".
        random_erasing: probability.
        mixup: alpha; 0 is none.
        cutmix: alpha; 0 is none. With both, each is drawn half of the time. With tokens, it is MixToken's.
        mix_off_epochs: so many epochs at the end are without either.
        epochs: passes over the training images.
        batch_size: images a step, of all ranks together.
        optimizer: timm's name for it.
        learning_rate: the highest, at this batch size.
        momentum: of the optimizer, where it has one.
        weight_decay: of all weights but biases and norms.
        warmup_epochs: in which the learning rate rises from near 0.
        clip_grad: norm that gradients are clipped to.
        ema_decay: decay of the moving average of weights that is validated and kept beside them; None: no average.
        drop_path: rate of stochastic depth.
        dtype: of the forward pass under autocast.
        seed: of weights, order, crops and whatever else is drawn.

    Raises:
        ValueError: an argument is out of range or unknown.
    """

    labels: str = "relabel"
    model: str = "resnet50"
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    image_size: int = 224
    eval_size: int | None = None
    crop_pct: float = 0.875
    min_area: float = 0.08
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_off_epochs: int = 5
    epochs: int = 300
    batch_size: int = 1024
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_epochs: int = 5
    clip_grad: float | None = None
    ema_decay: float | None = None
    drop_path: float | None = None
    dtype: Dtype = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.labels not in LABELS:
            raise ValueError(f"labels must be one of {list(LABELS)}, got {self.labels!r}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        for name in ("image_size", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("mixup", "cutmix", "mix_off_epochs", "warmup_epochs", "random_erasing", "color_jitter"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.min_area <= 1 or not 0 < self.crop_pct <= 1:
            raise ValueError(f"min_area and crop_pct must be in 0..1, got {self.min_area} and {self.crop_pct}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.epochs <= self.warmup_epochs:
            raise ValueError(
                f"{self.epochs} epochs are over before {self.warmup_epochs} of warm-up: give fewer of these"
            )
        if self.label_config.tokens and self.mixup:
            raise ValueError("labels of tokens are mixed by cutmix, which is MixToken then: give mixup=0")

    @property
    def label_config(self) -> LabelConfig:
        """What the student is told."""
        return LABELS[self.labels]

    def changed(self, **values: Any) -> Recipe:
        """Return the recipe with other values.

        Raises:
            TypeError: there is no such value.
        """
        unknown = sorted(set(values) - {each.name for each in fields(self)})
        if unknown:
            raise TypeError(f"a recipe has no {unknown}")
        return replace(self, **values)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How a run uses the machine: nothing here changes what comes out, but for rounding, and for `window`, which is part of the order.

    Attributes:
        device: such as "cuda" or "cpu"; None: a GPU where there is one. Under torchrun each rank takes its own.
        num_workers: processes a rank that make crops.
        channels_last: hold images and weights in the order of memory that convolutions prefer.
        compile: run the student through torch.compile.
        window: shards that are mixed at a time, see `RelabelStream`; None mixes all.
        save_every: steps between checkpoints within an epoch; 0: at the ends of epochs alone.
        validate_every: epochs between validations; the last epoch is always validated. At least 1.
        log_every: steps between lines of `steps.csv`, each the mean loss since the last; at least 1.
        tensorboard: whether to log for TensorBoard, too.
        progress: whether to show a progress bar on stderr.

    Raises:
        ValueError: a number of steps or epochs is out of range.
    """

    device: str | None = None
    num_workers: int = 4
    channels_last: bool = True
    compile: bool = False
    window: int | None = 8
    save_every: int = 1000
    validate_every: int = 1
    log_every: int = 50
    tensorboard: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name, least in (("save_every", 0), ("validate_every", 1), ("log_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


# ReLabel: Yun et al., 2021, section 4.1. Tokens: Jiang et al., "All Tokens Matter", 2021, section 4.1 (LV-ViT's settings on DeiT-S).
PRESETS = {
    "relabel": Recipe(),
    "relabel-cutmix": Recipe(cutmix=1.0),
    "single-label": Recipe(labels="single"),
    "label-smoothing": Recipe(labels="smoothed"),
    "global-multi-label": Recipe(labels="global-multi"),
    "localized-single-label": Recipe(labels="localized-single"),
    "global-single-label": Recipe(labels="global-single"),
    "distillation": Recipe(labels="distilled"),
    "token-labels": Recipe(
        labels="tokens", model="deit_small_patch16_224", optimizer="adamw", learning_rate=1e-3, weight_decay=0.05,
        cutmix=1.0, mix_off_epochs=0, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25, drop_path=0.1, clip_grad=5.0,
        ema_decay=0.99996,
    ),
}  # fmt: skip
