"""Configuration of a training run as plain values, and the presets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from ..cpus import num_cpus
from ..extras import check_extra
from ..keywords import check_keywords

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class LabelConfig:
    """Targets of a student.

    Attributes:
        pooled: Whether targets are pooled from label maps. Default: False, which uses the class index.
        localized: Whether label maps are pooled under the crop instead of over the whole image. Default: True.
        multi_label: Whether targets contain all classes of the pooled label instead of only the best. Default: True.
        smoothing: Label smoothing of class indices, 0 to 1. Default: 0.
        distilled: Whether targets are the output of the annotator on each crop, computed during training. Default: False.
        tokens: Whether each token has a target in addition to the crop. Default: False.
        temperature: Divisor of the logits of soft labels before their softmax. Default: 1.
        label_weight: Weight of the original class label in the target of a crop, 0 to 1. Default: 0.
        calibrated: Whether labels pooled from label maps are calibrated. Default: False.
    """

    pooled: bool = False
    localized: bool = True
    multi_label: bool = True
    smoothing: float = 0.0
    distilled: bool = False
    tokens: bool = False
    temperature: float = 1.0
    label_weight: float = 0.0
    calibrated: bool = False

    @property
    def soft(self) -> bool:
        """Whether targets come from label maps or from the annotator, not only from class labels."""
        return self.pooled or self.distilled


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
    """Training recipe. The defaults are those of the paper for ResNet-50 on ImageNet.

    Attributes:
        labels: Targets of the student, a name in `LABELS`: the class index (`single`, `smoothed`), the pooled label map
            (`relabel`), an ablation of it (`global-multi`, `localized-single`, `global-single`), the output of the annotator on
            each crop (`distilled`), or labels of crops and tokens (`tokens`). Default: "relabel".
        temperature: Divisor of the logits of label maps, or of the annotator for `distilled`, before the softmax that makes the
            soft label. Values above 1 soften it. The loss is the cross-entropy with the student's logits at temperature 1,
            without a factor of the squared temperature. Default: 1.
        label_weight: Weight w of the original class label, 0 to 1: the target is `(1 - w) * soft label + w * one-hot label`.
            Labels of tokens are not blended. Default: 0.
        calibrated: Whether to apply the gains of the dataset to labels pooled from label maps, see `LabelPooling`. Default: False.
        num_crops: Number of different stored crops of each image that a batch has, see `RandomStoredCrop`. The image is decoded
            once for all of them, and an epoch has `num_crops` times as many steps. Above 1, the dataset must have stored crops,
            and `batch_size` must be a multiple of it. Default: 1.
        model: Name of a timm model. Default: "resnet50".
        model_kwargs: Additional keyword arguments of `timm.create_model`. Default: none.
        image_size: Side of a training crop in pixels. Default: 224.
        eval_size: Side of a validation image in pixels. Default: None, which uses `image_size`.
        crop_pct: Share of each side that the center crop of a validation image keeps, above 0 to 1. Default: 0.875.
        min_area: Minimum share of the image area that a training crop shows, above 0 to 1. Default: 0.08.
        color_jitter: Strength of color jitter. 0 disables it. Default: 0.
        auto_augment: Policy of timm's RandAugment and similar, such as "rand-m9-mstd0.5-inc1". Default: none.
        random_erasing: Probability of random erasing, 0 to 1. Default: 0.
        mixup: Alpha of mixup. 0 disables it. Default: 0.
        cutmix: Alpha of CutMix, or of MixToken for labels of tokens. 0 disables it. If mixup is enabled too, one of the two is
            drawn for each batch with equal probability. Default: 0.
        mix_off_epochs: Number of final epochs without mixup and CutMix. Default: 5.
        epochs: Number of passes over the training images. Default: 300.
        batch_size: Crops per step over all ranks. Default: 1024.
        optimizer: Name of a timm optimizer. Default: "sgd".
        learning_rate: Maximum learning rate, at this batch size. Default: 0.1.
        momentum: Momentum of the optimizer, if it has one. Default: 0.9.
        weight_decay: Weight decay of all weights except biases and norms. Default: 1e-4.
        warmup_epochs: Number of epochs in which the learning rate rises from 1e-6. Default: 5.
        clip_grad: Maximum norm of the gradients. Default: None, which disables clipping.
        ema_decay: Decay of the moving average of the weights, which is then validated and saved. Default: None, no average.
        drop_path: Rate of stochastic depth. Default: None, which uses the default of the model.
        dtype: Precision of the forward pass under autocast. Default: "float32".
        seed: Seed of the weights, the order, the crops and the mixing. Default: 0.

    Raises:
        ValueError: A value is out of range or unknown.
    """

    labels: str = "relabel"
    temperature: float = 1.0
    label_weight: float = 0.0
    calibrated: bool = False
    num_crops: int = 1
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
            raise ValueError(f"labels= must be one of {list(LABELS)}, got {self.labels!r}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype= must be float32, bfloat16 or float16, got {self.dtype!r}")
        for name in ("num_crops", "image_size", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}= must be at least 1, got {getattr(self, name)}")
        for name in ("mixup", "cutmix", "mix_off_epochs", "warmup_epochs", "random_erasing", "color_jitter"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}= must be at least 0, got {getattr(self, name)}")
        for name in ("min_area", "crop_pct"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}= must be above 0 and at most 1, got {getattr(self, name)}")
        for name in ("learning_rate", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}= must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.label_weight <= 1:
            raise ValueError(f"label_weight= must be from 0 to 1, got {self.label_weight}")
        self._check_blending()
        if self.epochs <= self.warmup_epochs:
            raise ValueError(
                f"epochs={self.epochs} must be more than warmup_epochs={self.warmup_epochs}: raise epochs= or lower "
                "warmup_epochs="
            )
        if self.label_config.tokens and self.mixup:
            raise ValueError(
                f"labels={self.labels} cannot be combined with mixup={self.mixup}: set mixup=0. Labels of tokens are mixed with "
                "cutmix="
            )

    def _check_blending(self) -> None:
        for name, neutral in (("temperature", 1), ("label_weight", 0), ("calibrated", False), ("num_crops", 1)):
            if getattr(self, name) != neutral and not self.uses(name):
                reason = "are one-hot"
                if name == "num_crops":
                    reason = "are not those of stored crops"
                elif LABELS[self.labels].soft and name == "calibrated":
                    reason = "are not pooled from label maps"
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect on labels={self.labels}, which {reason}: leave out {name}=, or "
                    "choose other labels="
                )

    def uses(self, name: str) -> bool:
        """Return whether the targets of the recipe can depend on a value.

        Args:
            name: Name of an attribute. Only `temperature`, `label_weight`, `calibrated` and `num_crops` are without effect on some
                labels.
        """
        config = LABELS[self.labels]
        if name == "temperature":
            return config.soft and config.multi_label
        if name == "num_crops":
            return config.pooled and config.localized and config.multi_label and not config.tokens
        if name == "calibrated":
            return config.pooled and config.multi_label
        return config.soft if name == "label_weight" else True

    @property
    def label_config(self) -> LabelConfig:
        """Targets of the student."""
        return replace(
            LABELS[self.labels],
            temperature=self.temperature,
            label_weight=self.label_weight,
            calibrated=self.calibrated,
        )

    def changed(self, **values: Any) -> Recipe:
        """Return a copy of the recipe with other values.

        Args:
            values: New values by name of the attribute.

        Returns:
            The new recipe.

        Raises:
            TypeError: A recipe has no such attribute.
            ValueError: A value is out of range or unknown.

        Example:
            >>> PRESETS["relabel"].changed(model="resnet18", epochs=20)
        """
        check_keywords("Recipe.changed", values, [field.name for field in fields(self)])
        return replace(self, **values)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Use of the machine by a run. Only `window` changes the result, apart from rounding.

    Attributes:
        device: Device such as "cuda" or "cpu". Default: None, the current CUDA device, or the CPU if there is none. Under
            torchrun, each rank uses its own device.
        num_workers: Worker processes per rank that load crops. Default: 4, but at most one per CPU.
        channels_last: Whether images and weights have the channels-last memory format. Default: True.
        compile: Whether to compile the student with torch.compile. Default: False.
        window: Number of shards that the shuffle mixes at a time, see `RelabelStream`. None mixes all. Default: 8.
        save_every: Steps between checkpoints within an epoch. 0 saves only after each epoch. Default: 1000.
        validate_every: Epochs between validations, at least 1. The last epoch is always validated. Default: 1.
        log_every: Steps between rows of `steps.csv`, at least 1. Each row has the mean loss since the row above. Default: 50.
        tensorboard: Whether to also log to TensorBoard. Default: False.
        progress: Whether to show a progress bar on stderr. Default: True.

    Raises:
        ValueError: A number of steps or epochs is out of range.
        MissingExtraError: (an ImportError) `tensorboard` is True and TensorBoard is not installed.
    """

    device: str | None = None
    num_workers: int = min(4, num_cpus())
    channels_last: bool = True
    compile: bool = False
    window: int | None = 8
    save_every: int = 1000
    validate_every: int = 1
    log_every: int = 50
    tensorboard: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name, minimum in (("save_every", 0), ("validate_every", 1), ("log_every", 1)):
            if getattr(self, name) < minimum:
                raise ValueError(f"{name}= must be at least {minimum}, got {getattr(self, name)}")
        if self.tensorboard:
            check_extra("tensorboard", "tensorboard=True")


# Small: for images of about 64 pixels, or a few thousand images of any size, on one GPU or CPU.
# ReLabel: Yun et al., 2021, section 4.1. Tokens: Jiang et al., "All Tokens Matter", 2021, section 4.1 (LV-ViT's settings on DeiT-S).
# Both publications have temperature 1 and no weight of the class label, so no preset changes these.
PRESETS = {
    "small": Recipe(model="resnet18", image_size=64, epochs=100, batch_size=64, learning_rate=0.025),
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
