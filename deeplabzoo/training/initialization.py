"""Initial weights of a run: building the model of a recipe, transfer from other weights, batch norm recalibration."""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from deeplabzoo.checkpoints.load import read_weights
from deeplabzoo.data.dataset import SegmentationDataset
from deeplabzoo.data.transforms import normalize_images
from deeplabzoo.device import eval_mode
from deeplabzoo.errors import DataError, DeepLabZooError, ImageError, TrainingError, WeightsError
from deeplabzoo.hub.factory import load, load_encoder
from deeplabzoo.log import logger
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.encoder_table import short_name
from deeplabzoo.models.heads import ASPP, V3Head, V3PlusHead
from deeplabzoo.models.layers import Classifier, ConvNormAct, SeparableConvNormAct, scale_atrous_rates
from deeplabzoo.models.names import ModelName, parse_name
from deeplabzoo.processing.preprocessing import resized_hw
from deeplabzoo.training.dataloader import Batch, BatchDataset
from deeplabzoo.training.optim import BATCH_NORM_TYPES
from deeplabzoo.training.recipe import Recipe
from deeplabzoo.training.run_dir import TrainingState


@torch.no_grad()
def transfer_weights(source: DeepLab, net: DeepLab) -> str:
    """Copy the weights of `source` into `net` as far as they fit, in place.

    Same architecture: every tensor, and a classifier row for every class of the same name. V3 into V3+: the new parts are set
    so that the outputs of both agree. The ASPP's new atrous branches start with weight 0 in its projection, the decoder passes
    the ASPP's output through (a ReLU leaves non-negative values) and ignores the low-level feature; and since bilinear
    upsampling commutes with a linear classifier, logits agree, exactly where the grids are nested (align_corners and sides of
    the form stride x n + 1). All of it trains from the first step on, the new branches from the second.

    Args:
        source: The model whose weights are taken.
        net: The model that receives them.

    Returns:
        What was done, as one phrase for the log.

    Raises:
        WeightsError: The two have different encoders or widths.
    """
    if source.config.encoder != net.config.encoder:
        ours, theirs = short_name(net.config.encoder), short_name(source.config.encoder)
        raise WeightsError(f"The initial weights are of encoder {theirs}, but the recipe's model has {ours}.")
    _copy(source.encoder, net.encoder, "encoder")
    same_head = type(source.head) is type(net.head)
    _transfer_aspp(source.head.aspp, net.head.aspp)
    if same_head:
        parts = [name for name in ("refine", "low_level", "decoder") if hasattr(net.head, name)]
        for name in parts:
            _copy(getattr(source.head, name), getattr(net.head, name), f"head.{name}")
        done = "every layer transferred"
    elif isinstance(source.head, V3Head) and isinstance(net.head, V3PlusHead) and isinstance(source.head.refine, nn.Identity):
        _init_pass_through(net.head, source.config.head_channels)
        done = "decoder and new branches added without changing the output"
    else:
        return "encoder and ASPP transferred, the rest randomly initialized"
    rows = _transfer_classifier(source.head.classifier, source.classes, net.head.classifier, net.classes)
    if source.aux_head is not None and net.aux_head is not None:
        _copy(source.aux_head.block, net.aux_head.block, "aux_head.block")
        _transfer_classifier(source.aux_head.classifier, source.classes, net.aux_head.classifier, net.classes)
    return f"{done}, classifier kept for {rows} of {net.num_classes} classes"


def _copy(source: nn.Module, target: nn.Module, name: str) -> None:
    ours, theirs = target.state_dict(), source.state_dict()
    wrong = sorted(key for key in ours if key not in theirs or theirs[key].shape != ours[key].shape)
    if wrong:
        raise WeightsError(
            f"The initial weights do not fit: {len(wrong)} tensors of {name} are missing or of another shape ({wrong[0]}); "
            "leave the recipe's network fields at their defaults."
        )
    target.load_state_dict({key: theirs[key] for key in ours})


def _transfer_aspp(source: ASPP, target: ASPP) -> None:
    """Copy the branches that both have; further branches of the target start with weight 0 in the projection."""
    shared = min(len(source.branches), len(target.branches))
    if len(source.branches) > shared:
        theirs, ours = len(source.branches) - 1, len(target.branches) - 1
        raise WeightsError(
            f"The initial weights have {theirs} atrous branches, the recipe's model {ours}; leave network.atrous_rates alone."
        )
    for index in range(shared):
        _copy(source.branches[index], target.branches[index], f"head.aspp.branches.{index}")
    _copy(source.pool, target.pool, "head.aspp.pool")
    _copy(source.project.norm, target.project.norm, "head.aspp.project.norm")
    parts, old = _slices(source), source.project.conv.weight
    new = torch.zeros_like(target.project.conv.weight)
    for branch, place in _slices(target).items():
        if branch in parts:
            new[:, place] = old[:, parts[branch]]
    target.project.conv.weight.copy_(new)


def _slices(aspp: ASPP) -> dict[str, slice]:
    """Return the channels of each branch in the projection's input."""
    names = [str(index) for index in range(len(aspp.branches))]
    names.insert(0 if aspp.pooling_first else len(names), "pool")
    width = aspp.pool.conv.out_channels
    return {name: slice(place * width, (place + 1) * width) for place, name in enumerate(names)}


def _init_pass_through(head: V3PlusHead, width: int) -> None:
    """Let the decoder pass the first `width` channels, which are non-negative, and ignore the low-level feature."""
    low = head.low_level.conv.out_channels
    start = low if head.low_level_first else 0
    for block in head.decoder:
        if isinstance(block, SeparableConvNormAct):
            _identity(block.depthwise, start, width)
            _identity(block.pointwise, start, width)
        else:
            assert isinstance(block, ConvNormAct)
            _identity(block, start, width)
        start = 0


def _identity(block: ConvNormAct, start: int, width: int) -> None:
    """Make a block's first `width` outputs its inputs from `start` on; a depthwise one passes every channel."""
    weight = block.conv.weight
    middle = weight.shape[-1] // 2
    if block.conv.groups > 1:
        weight.zero_()
        weight[:, :, middle, middle] = 1
    elif weight.shape[0] < width:
        raise WeightsError(f"The decoder has {weight.shape[0]} channels, fewer than the {width} that it has to pass.")
    else:
        weight[:width] = 0
        weight[torch.arange(width), torch.arange(start, start + width), middle, middle] = 1
    if isinstance(block.norm, BATCH_NORM_TYPES):
        nn.init.ones_(block.norm.weight)
        nn.init.zeros_(block.norm.bias)
        assert block.norm.running_mean is not None
        assert block.norm.running_var is not None
        block.norm.running_mean.zero_()
        block.norm.running_var.fill_(1 - block.norm.eps)


def _transfer_classifier(
    source: nn.Conv2d, source_classes: Sequence[str], target: nn.Conv2d, target_classes: Sequence[str]
) -> int:
    """Copy the rows of classes that both have; in a wider target the further inputs start at 0. Returns how many."""
    assert source.bias is not None
    assert target.bias is not None
    weight, bias = source.weight, source.bias
    if len(weight) == 1 < len(source_classes):  # one sigmoid channel: the logit of background is 0
        weight, bias = (torch.cat([torch.zeros_like(one), one]) for one in (weight, bias))
    known = weight.shape[1]
    if known > target.weight.shape[1]:
        raise WeightsError(f"The classifier reads {target.weight.shape[1]} channels, the initial weights' {known}.")
    rows = 0
    for ours, name in enumerate(target_classes):
        if name in source_classes:
            theirs = list(source_classes).index(name)
            target.weight[ours] = 0
            target.weight[ours, :known] = weight[theirs]
            target.bias[ours] = bias[theirs]
            rows += 1
    return rows


@torch.no_grad()
def recalibrate_batch_norm(net: nn.Module, images: Iterable[torch.Tensor]) -> int:
    """Set running statistics of batch norms to those of `images`, without changing the outputs in eval mode.

    Weights whose batch norms were folded into the convolutions have no statistics: identity batch norms are exact in eval mode
    but distort everything in training mode (rms 160-450 %). Here the mean and variance of each batch norm's input are measured,
    and its scale and shift compensate for the change; training mode then equals eval mode on such images.

    Args:
        net: The model, changed in place.
        images: Normalized float batches, B x C x H x W, on the model's device.

    Returns:
        The number of batch norms that were set.
    """
    sums: dict[nn.Module, list[torch.Tensor]] = {}

    def measure(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].double()
        axes = [axis for axis in range(x.ndim) if axis != 1]
        count = x.new_tensor(float(x.numel() // x.shape[1]))
        found = [x.sum(axes), x.square().sum(axes), count]
        sums[module] = [a + b for a, b in zip(sums[module], found, strict=True)] if module in sums else found

    norm_layers = _batch_norms(net)
    hooks = [module.register_forward_pre_hook(measure) for module in norm_layers]
    training = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        for image_BCHW in images:
            net(image_BCHW)
    finally:
        for hook in hooks:
            hook.remove()
        for module, flag in training:
            module.training = flag
    for module in norm_layers:
        if module in sums:
            total, squares, count = sums[module]
            _set_running_stats(module, total / count, (squares / count - (total / count).square()).clamp_min(0))
    return len(sums)


def _set_running_stats(norm: nn.modules.batchnorm._BatchNorm, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """Set running statistics and compensate in scale and shift, so that the function stays the same; all in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    before = (norm.running_var.double() + norm.eps).sqrt()
    after = (variance + norm.eps).sqrt()
    weight, bias = norm.weight.double(), norm.bias.double()
    norm.bias.copy_(bias + weight * (mean - norm.running_mean.double()) / before)
    norm.weight.copy_(weight * after / before)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)


def _batch_norms(net: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [module for module in net.modules() if isinstance(module, BATCH_NORM_TYPES) and module.running_mean is not None]


def has_folded_batch_norms(net: nn.Module) -> bool:
    """Whether most batch norms have the statistics of no image: mean 0 and one variance for all channels."""
    norm_layers = _batch_norms(net)
    folded = [one for one in norm_layers if not one.running_mean.any() and one.running_var.min() == one.running_var.max()]  # type: ignore[union-attr]
    return 2 * len(folded) > len(norm_layers)


# The model that a recipe trains: its configuration, its classes, and its initial weights.

_SAMPLES_PER_PASS = 4
_FOLDED_NORMS_SAMPLES = 64
"""Training samples that folded batch norms of initial weights are recalibrated on where the recipe names no number."""
_SIZES_SAMPLED = 16


def build_model(recipe: Recipe, data: SegmentationDataset) -> DeepLab:
    """Return the recipe's model with its initial weights; random initialization depends on the seed alone.

    Args:
        recipe: Names the model, its options and its initial weights.
        data: The training split, whose classes the model gets.

    Raises:
        UnknownNameError: There is no such model or weights tag.
        UsageError: Options do not fit each other.
        WeightsError: The initial weights do not fit the model.
        DownloadError: Weights cannot be fetched.
    """
    name = parse_name(recipe.model)
    if recipe.init and _holds_only_encoder(recipe.init):
        recipe = dataclasses.replace(recipe, init=None, encoder_init=recipe.init)
    start = load_weights(recipe.init) if recipe.init else None
    config = _config(recipe, name, start, len(data.classes))
    torch.manual_seed(recipe.seed)
    net, origin = _new_model(recipe, config, data) if start is None else (_build_random_init(config, data), "")
    fresh = copy.deepcopy(_classifiers(net))
    if start is not None:
        origin = f"from {recipe.init}: {transfer_weights(start, net)}"
        net.preprocessing = start.preprocessing
    elif isinstance(recipe.encoder_init, str) and recipe.encoder_init != "auto":
        origin = load_encoder(net, recipe.encoder_init)
    own = {"size": recipe.input_size, "resize": recipe.input_resize, "pad": recipe.input_pad}
    for field, value in own.items():
        if value is not None:
            net.preprocessing = Preprocessing.from_dict({**net.preprocessing.to_dict(), field: value})
    millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    shape = f"{millions:.2f} M parameters, {len(data.classes)} classes, output stride {net.output_stride}"
    logger.info(f"model: {recipe.model}, {shape}; {origin}")
    _log_input_size(net, recipe, data)
    if start is not None and 0 < len({*start.classes} & {*net.classes}) < net.num_classes:
        _keep_better_classifier(net, fresh, recipe, data)
    return net


def _log_input_size(net: DeepLab, recipe: Recipe, data: SegmentationDataset) -> None:
    """Log at which size the model sees the images: objects of large images may be much smaller there than in the file."""
    step = -(-len(data) // _SIZES_SAMPLED)
    sizes: set[tuple[int, int]] = set()
    for index in range(0, len(data), step):
        with contextlib.suppress(ImageError, DataError):  # reported when all masks are checked, or skipped
            height, width = data.read_labels(index).shape
            sizes.add((height, width))
    if not sizes:
        return
    largest = max(sizes, key=math.prod)
    seen = resized_hw(largest, net.preprocessing)
    crop = recipe.augmentation.crop
    if seen == largest:
        size = f"images of up to {largest[1]} x {largest[0]} pixels (width x height) are seen at their own size"
    else:
        prep = net.preprocessing
        size = (
            f"images of up to {largest[1]} x {largest[0]} pixels (width x height) are resized to {seen[1]} x {seen[0]} "
            f"(input_resize={prep.resize}, input_size={prep.size[0]},{prep.size[1]}; input_resize=none keeps their own size)"
        )
    logger.info(f"input: {size}; training crops have {crop[1]} x {crop[0]} pixels")


@torch.no_grad()
def _keep_better_classifier(
    net: DeepLab, fresh: Sequence[Classifier | None], recipe: Recipe, data: SegmentationDataset
) -> None:
    """Keep the transferred classifier rows only where the run starts with a lower loss than from a new classifier.

    Rows trained against other classes can dominate randomly initialized ones: a row of `background` answers everywhere.
    """
    dataset = BatchDataset(data, dataclasses.replace(recipe, batch=_SAMPLES_PER_PASS, accumulate=1), net.preprocessing)
    batch = _read(dataset[0])
    transferred = _classifiers(net)
    losses = []
    with eval_mode(net):
        for classifiers in (transferred, fresh):
            _set_classifiers(net, classifiers)
            logits_BCHW = net(normalize_images(batch.image_BCHW, net.preprocessing))
            losses.append(float(F.cross_entropy(logits_BCHW, batch.labels_BHW.long(), ignore_index=data.ignore_index)))
    if not losses[0] > losses[1]:  # also where both are NaN: a batch without a labelled pixel
        _set_classifiers(net, transferred)
    else:
        logger.warning(
            f"model: the classifier is re-initialized, since the rows of the shared classes alone would begin at a loss of "
            f"{losses[0]:.2f}, and new rows begin at {losses[1]:.2f}"
        )


def _classifiers(net: DeepLab) -> list[Classifier | None]:
    return [head.classifier if head is not None else None for head in (net.head, net.aux_head)]


def _set_classifiers(net: DeepLab, classifiers: Sequence[Classifier | None]) -> None:
    for head, classifier in zip((net.head, net.aux_head), classifiers, strict=True):
        if head is not None and classifier is not None:
            head.classifier = classifier


def _new_model(recipe: Recipe, config: DeepLabConfig, data: SegmentationDataset) -> tuple[DeepLab, str]:
    """Return a model with ImageNet weights in the encoder where the recipe asks for them, and what it starts from."""
    if recipe.encoder_init not in (True, "auto"):
        return _build_random_init(config, data), "randomly initialized"
    try:
        net = DeepLab(config, classes=data.classes, palette=data.palette, encoder_pretrained=True)
    except DeepLabZooError as error:
        if recipe.encoder_init is True:
            raise
        torch.manual_seed(recipe.seed)
        logger.warning(f"model: the encoder is randomly initialized, since its ImageNet weights are not available ({error})")
        return _build_random_init(config, data), "randomly initialized"
    return net, "encoder with ImageNet weights"


def _build_random_init(config: DeepLabConfig, data: SegmentationDataset) -> DeepLab:
    return DeepLab(config, classes=data.classes, palette=data.palette)


def model_from_state(
    state: TrainingState, data: SegmentationDataset, tensors: Mapping[str, torch.Tensor] | None = None
) -> DeepLab:
    """Return the model of a state with the weights of its `net`, or else with `tensors`; it needs no other file.

    Raises:
        TrainingError: The state does not describe a model.
    """
    try:
        described = state.facts["network"]
        config, preprocessing = DeepLabConfig.from_dict(described["config"]), described["preprocessing"]
        return DeepLab.from_weights(
            config,
            dict(state.tensors["net"] if tensors is None else tensors),
            classes=data.classes,
            palette=data.palette,
            preprocessing=Preprocessing.from_dict(preprocessing),
        )
    except (KeyError, TypeError, DeepLabZooError) as error:
        raise TrainingError(f"The state of step {state.step} describes no model that can be resumed: {error}") from error


def load_weights(source: str) -> DeepLab:
    """Return the model that a name, a tag, a file, a folder or an `hf-hub:` address means."""
    return load(source)


def _holds_only_encoder(source: str) -> bool:
    """Whether a source is a file with an encoder and no head, such as an ImageNet classifier of a known layout."""
    if not Path(source).is_file():
        return False
    checkpoint = read_weights(Path(source))
    return checkpoint.config is None and checkpoint.encoder is not None


def estimate_batch_norm_stats(net: DeepLab, recipe: Recipe, data: SegmentationDataset) -> None:
    """Recalibrate batch norms on the first training samples where the recipe says so, or its initial weights need it.

    Needed are statistics where the initial weights' batch norms were folded into convolutions, as in TFLite files, unless all
    batch norms are frozen. Every process computes the same ones.
    """
    samples = recipe.recalibrate_norms
    from_file = recipe.init is not None or (isinstance(recipe.encoder_init, str) and recipe.encoder_init != "auto")
    if not samples and from_file and recipe.freeze_norms != "all" and has_folded_batch_norms(net.encoder):
        samples = _FOLDED_NORMS_SAMPLES
        logger.warning("batch norm: the initial weights have no statistics (folded batch norms), so they are measured now")
    if not samples:
        return
    pieces = -(-samples // _SAMPLES_PER_PASS)
    dataset = BatchDataset(data, dataclasses.replace(recipe, batch=_SAMPLES_PER_PASS, accumulate=1), net.preprocessing)
    device = next(net.parameters()).device
    batches = (dataset[piece] for piece in range(pieces))
    images = (normalize_images(_read(one).image_BCHW.to(device), net.preprocessing) for one in batches)
    count = recalibrate_batch_norm(net, images)
    logger.info(f"batch norm: statistics of {count} layers measured on {pieces * _SAMPLES_PER_PASS} training samples")


def _read(batch: Batch | DeepLabZooError) -> Batch:
    if isinstance(batch, DeepLabZooError):
        raise batch
    return batch


def _config(recipe: Recipe, name: ModelName, start: DeepLab | None, num_classes: int) -> DeepLabConfig:
    """Return the initial weights' configuration, or the default one, with the recipe's overrides."""
    base = start.config if start else DeepLabConfig(architecture=name.architecture, encoder=name.encoder)
    overrides = {key: value for key, value in dataclasses.asdict(recipe.network).items() if value is not None}
    if base.architecture != name.architecture:
        base = dataclasses.replace(base, atrous_rates=base.atrous_rates or None, aspp_separable=None)
    stride = overrides.get("output_stride", base.output_stride)
    if base.atrous_rates:
        overrides.setdefault("atrous_rates", scale_atrous_rates(base.atrous_rates, base.output_stride, stride))
    named = {"architecture": name.architecture, "encoder": name.encoder, "num_classes": num_classes}
    return DeepLabConfig.from_dict({**base.to_dict(), **overrides, **named})
