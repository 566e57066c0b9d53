"""A recipe: everything that decides a training run, as one frozen dataclass; fields that change no result are not in its hash.

A function in `training/recipes` returns a Recipe, and `--set field=value` overrides fields of it; there is no other
configuration.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from deeplabzoo.data.transforms import Augmentation
from deeplabzoo.errors import UsageError
from deeplabzoo.training.schedule import PhasedSchedule, Schedule, ScheduleKind

_MAX_STEPS, _MAX_EPOCHS = 10**12, 10**6
"""Upper limits: larger numbers are mistakes, and learning rates are computed in floating point."""


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The constants of the losses; the defaults are those of the papers named beside them."""

    focal_gamma: float = 2.0
    """Focusing power (Lin et al., arXiv:1708.02002, section 3.2)."""
    top_k: float = 0.2
    """Share of an image's valid pixels that `top_k` keeps (detectron2's DeepLab projects keep the hardest 20 %)."""
    ohem_threshold: float = 0.7
    """`ohem` keeps pixels whose true class is given less probability than this."""
    ohem_keep: float = 0.0625
    """... and at least this share of an image's valid pixels."""
    lovasz_stride: int = 1
    """`lovasz_batch` looks at every n-th row and column."""
    dice_smooth: float = 1.0
    """Added to numerator and denominator of every class, in pixels."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Fields of DeepLabConfig that a recipe decides; None leaves what the initial weights have, or else the default."""

    output_stride: int | None = None
    atrous_rates: tuple[int, ...] | None = None
    multi_grid: tuple[int, ...] | None = None
    norm: Literal["batch", "group"] | None = None
    dropout: float | None = None
    aux_head: bool | None = None
    head_channels: int | None = None
    aspp_separable: bool | None = None
    pooling_norm: bool | None = None
    refine_conv: bool | None = None
    decoder_channels: int | None = None
    decoder_low_level_channels: int | None = None
    align_corners: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run with its own crop, scale or learning rate; None takes the recipe's. The schedule restarts in it."""

    share: float
    """Of the run's steps; the stages' shares are scaled to add up to 1."""
    lr: float | None = None
    schedule: ScheduleKind | None = None
    warmup_steps: int | None = None
    crop: tuple[int, int] | None = None
    scale: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. Sizes are (height, width) in pixels; `batch` is the global batch of one optimizer step."""

    # model and data
    name: str
    model: str
    """Architecture and encoder by name, e.g. `deeplabv3plus_mobilenetv2`; a dataset at its end has no effect."""
    data: str
    """The dataset's name, as `build_dataset` takes it, or `shapes`, which is generated."""
    train_split: str = "train"
    """A name, or parts of splits as in `build_dataset`: `train+val`, or `train[!20%]` with `val_split=train[20%]`."""
    val_split: str = "val"
    test_split: str | None = None
    """Evaluated once, at the end, with the best weights; skipped, with a log line, where the dataset has no such split."""
    classes: tuple[str, ...] | None = None
    """Class names of a `folder` that has no classes.txt."""
    network: ModelOptions = ModelOptions()
    init: str | None = None
    """Initial weights: `name.tag` of the registry or a file; the classifier is kept for classes of the same name. A file that
    holds an encoder only is used as `encoder_init`."""
    encoder_init: bool | str = False
    """True: ImageNet weights of the encoder; "auto": those if available, else random ones with a warning; or a file."""
    recalibrate_norms: int = 0
    """Measure the statistics of batch norms on this many training samples first (for encoders with folded ones)."""
    input_resize: Literal["none", "longest", "shortest"] | None = None
    """How images are resized to `input_size` before the model sees them; saved with the weights. None: the model's default."""
    input_size: tuple[int, int] | None = None
    input_pad: bool | None = None
    """Whether the model's input is padded to `input_size`; None: the model's default."""

    # how long, with which batches
    steps: int | None = None
    epochs: float | None = None
    """Instead of `steps`."""
    batch: int = 16
    accumulate: int = 1
    """Number of pieces that gradients of a batch are accumulated over."""
    seed: int = 0
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(crop=(513, 513)))
    """Its scale is relative to the size at which the model sees images in evaluation."""
    stages: tuple[Stage, ...] = ()

    # optimization
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.007
    momentum: float = 0.9
    weight_decay: float = 1e-4
    encoder_lr_factor: float = 1.0
    head_lr_factor: float = 1.0
    schedule: ScheduleKind = "poly"
    power: float = 0.9
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    lr_floor: float = 0.0
    warmup_steps: int = 0
    clip_norm: float = 0.0
    """Limit of the gradient norm; 0: none."""
    ema: float = 0.0
    """Decay of the EMA of the weights, which is then what is evaluated and saved; 0: none."""
    freeze_norms: Literal["none", "encoder", "all"] = "none"
    """Batch norms that keep their statistics, scale and shift."""
    freeze_stages: int = 0
    """So many features of the encoder, counted from the stem, are frozen: 2 is all up to stride 4, 3 up to stride 8."""
    sync_norms: bool = True
    """With several processes, batch norms see the whole global batch."""

    # loss
    loss: tuple[tuple[str, float], ...] = (("ce", 1.0),)
    loss_options: LossOptions = LossOptions()
    class_weights: str | tuple[float, ...] = "none"
    """none, median_frequency, enet, inverse_sqrt (from the training labels), or one number per class."""
    aux_weight: float = 0.4
    """Of the auxiliary head's loss, where there is one (PSPNet, arXiv:1612.01105, section 4.1)."""
    teacher: str | None = None
    """A model (name.tag or file) whose probabilities on the crop are distilled, pixel by pixel."""
    distill_weight: float = 1.0
    teacher_scales: tuple[float, ...] = (0.75, 1.0, 1.25)
    """The teacher sees the crop at these scales, and mirrored."""

    # execution
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """auto: bf16 or fp16 where the GPU has it, off elsewhere; bf16 is slower than off on most CPUs."""
    channels_last: bool = True
    compile: bool = False
    deterministic: bool = False
    """Use deterministic operations only, also on a GPU."""
    device: str = "auto"
    workers: int = 2
    unreadable: Literal["stop", "skip"] = "stop"
    """A training image or mask that cannot be read stops the run; or is replaced by the next one of the epoch, logged and
    counted. An unreadable val or test image always stops: the score would be of other images."""
    cache: Literal["none", "memory", "disk"] = "none"
    """Cache decoded images: in memory that the workers share, or in the cache folder on disk, for later runs, too."""
    cache_gb: float = 4.0
    """At most this much, in units of 10^9 bytes, for training and val images together."""
    save_every: int = 500
    """Steps between two states to resume from; one is also saved at every evaluation."""
    evaluations: int = 10
    """On the val split, evenly over the run; the last one at its end."""
    evaluation_images: int | None = None
    """At most this many, evenly spaced; None: all. The final report always measures all."""
    evaluation_output_stride: int | None = None
    """Of the final report; during training the model is evaluated at the stride that it is trained at."""
    crop_val: int | None = None
    """During training, evaluate on the central square, resized to this side: faster, and no score to publish. The final report
    is always of whole images."""

    # logging
    log_every: int = 20
    pictures: int = 4
    """Predictions beside ground truth that are logged at each evaluation."""
    tensorboard: bool = False
    wandb: str | None = None
    """A Weights & Biases project."""
    allow_change: bool = False
    """Let this --resume go on although recipe or data were changed; it is not saved."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UsageError(f"Recipe '{self.name}' needs either steps or epochs, not {self.steps!r} and {self.epochs!r}.")
        positive = {"steps": self.steps, "epochs": self.epochs, "batch": self.batch, "accumulate": self.accumulate}
        positive |= {"save_every": self.save_every, "evaluations": self.evaluations, "log_every": self.log_every}
        positive |= {"cache_gb": self.cache_gb}
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise UsageError(f"{name} must be above 0, not {value!r}.")
        if (self.steps or 0) > _MAX_STEPS or (self.epochs or 0) > _MAX_EPOCHS:
            raise UsageError(f"A run has at most {_MAX_STEPS:,} steps, and at most {_MAX_EPOCHS:,} epochs.")
        if self.batch % self.accumulate:
            raise UsageError(f"A batch of {self.batch} cannot be cut into {self.accumulate} equal pieces; change accumulate.")
        if not 0 <= self.ema < 1:
            raise UsageError(f"ema must be in [0, 1), not {self.ema!r}.")
        if any(stage.share <= 0 for stage in self.stages):
            raise UsageError("Every stage needs a share of the steps above 0.")

    def with_total_steps(self, samples: int) -> "Recipe":
        """Return the recipe with its length in steps, for a training set of `samples` images."""
        if self.epochs is None:
            return self
        return dataclasses.replace(self, steps=max(1, math.ceil(self.epochs * samples / self.batch)), epochs=None)

    @property
    def stage_steps(self) -> tuple[int, ...]:
        """Steps of each stage; they add up to `steps`, which `with_total_steps` has set. A stage may be left without any."""
        assert self.steps is not None
        shares = [stage.share for stage in self.stages] or [1.0]
        ends = [round(self.steps * sum(shares[: number + 1]) / sum(shares)) for number in range(len(shares))]
        return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))

    @property
    def lr_schedule(self) -> PhasedSchedule:
        """The learning rate, a function of the step."""
        stages = self.stages or (Stage(share=1.0),)
        pairs = [(stage, steps) for stage, steps in zip(stages, self.stage_steps, strict=True) if steps]
        return PhasedSchedule(tuple(self._schedule(stage, steps) for stage, steps in pairs))

    def _schedule(self, stage: Stage, steps: int) -> Schedule:
        return Schedule(
            kind=self.schedule if stage.schedule is None else stage.schedule,
            lr=self.lr if stage.lr is None else stage.lr,
            steps=steps,
            power=self.power,
            milestones=self.milestones,
            gamma=self.gamma,
            floor=self.lr_floor,
            warmup_steps=self.warmup_steps if stage.warmup_steps is None else stage.warmup_steps,
        )

    def augmentation_at(self, step: int) -> Augmentation:
        """Return the augmentation of `step`: the recipe's, with the stage's crop and scale."""
        stages = [stage for stage, steps in zip(self.stages, self.stage_steps, strict=False) if steps]
        if not stages:
            return self.augmentation
        stage = stages[self.lr_schedule.at(step)[0]]
        crop = self.augmentation.crop if stage.crop is None else stage.crop
        scale = self.augmentation.scale if stage.scale is None else stage.scale
        return dataclasses.replace(self.augmentation, crop=crop, scale=scale)

    def should_evaluate(self, done: int) -> bool:
        """Whether an evaluation follows after `done` steps."""
        assert self.steps is not None
        times = min(self.evaluations, self.steps)
        return done * times // self.steps > (done - 1) * times // self.steps

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def digest(self) -> str:
        """Return the SHA-256 of the fields that decide the result: runs with the same digest train the same weights."""
        decisive = {name: value for name, value in self.to_dict().items() if name not in NON_DETERMINING_FIELDS}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def differences(self, other: "Recipe") -> list[str]:
        """Return one `field: before -> after` for each deciding field in which `other` differs."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [
            f"{key}: {mine[key]} -> {theirs[key]}"
            for key in mine
            if key not in NON_DETERMINING_FIELDS and mine[key] != theirs[key]
        ]


NON_DETERMINING_FIELDS = frozenset(
    {"device", "workers", "unreadable", "cache", "cache_gb", "save_every"}
    | {"log_every", "pictures", "tensorboard", "wandb", "allow_change"}
)
"""Fields that do not change the trained weights (`unreadable`: a run that ends under "stop" had no image to skip)."""
