"""Starting weights: what an earlier network knows, carried into a new one, and batch norms that know their own statistics."""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from deeplabzoo.data.dataset import SegmentationDataset
from deeplabzoo.data.transforms import normalize_images
from deeplabzoo.errors import DeepLabZooError, TrainingError, WeightsError
from deeplabzoo.hub.factory import load, load_encoder
from deeplabzoo.log import logger
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.encoder_table import short_name
from deeplabzoo.models.heads import ASPP, V3Head, V3PlusHead
from deeplabzoo.models.layers import ConvNormAct, SeparableConvNormAct, scale_atrous_rates
from deeplabzoo.models.names import ModelName, parse_name
from deeplabzoo.training.dataloader import Batch, BatchDataset
from deeplabzoo.training.optim import BATCH_NORM_TYPES
from deeplabzoo.training.recipe import Recipe
from deeplabzoo.training.run_dir import TrainingState


@torch.no_grad()
def transfer_weights(source: DeepLab, net: DeepLab) -> str:
    """Put everything that `source` knows and `net` has room for into `net`; returns what was done, as one phrase.

    Same architecture: every tensor; a classifier row for every class of the same name. V3 into V3+: the new parts are set so
    that the network starts with the old one's answer. The ASPP's new atrous branches get no say in its projection at first,
    the decoder passes the ASPP's output through (a ReLU leaves what is not negative) and ignores the low level; and since
    bilinear upsampling commutes with a linear classifier, logits agree, exactly where the grids are nested (align_corners and
    sides of the form stride x n + 1). All of it learns from the first step on, the new branches from the second.
    Raises WeightsError where the two have different encoders or widths.
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
        done = "every layer taken over"
    elif isinstance(source.head, V3Head) and isinstance(net.head, V3PlusHead) and isinstance(source.head.refine, nn.Identity):
        _init_pass_through(net.head, source.config.head_channels)
        done = "decoder and new branches added without changing the answer"
    else:
        return "encoder and ASPP taken over, the rest untrained"
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
            "leave the recipe's network fields as the weights have them."
        )
    target.load_state_dict({key: theirs[key] for key in ours})


def _transfer_aspp(source: ASPP, target: ASPP) -> None:
    """Copy the branches that both have; what else the target has starts with no weight in the projection."""
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
    """Return where each branch's channels lie in the projection's input."""
    names = [str(index) for index in range(len(aspp.branches))]
    names.insert(0 if aspp.pooling_first else len(names), "pool")
    width = aspp.pool.conv.out_channels
    return {name: slice(place * width, (place + 1) * width) for place, name in enumerate(names)}


def _init_pass_through(head: V3PlusHead, width: int) -> None:
    """Let the decoder hand on the first `width` channels, which are not negative, and ignore the low-level feature."""
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
    """Make a block's first `width` outputs its inputs from `start` on; a depthwise one hands on every channel."""
    weight = block.conv.weight
    middle = weight.shape[-1] // 2
    if block.conv.groups > 1:
        weight.zero_()
        weight[:, :, middle, middle] = 1
    elif weight.shape[0] < width:
        raise WeightsError(f"The decoder has {weight.shape[0]} channels, fewer than the {width} that it is to hand on.")
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
    """Copy the rows of classes that both know; in a wider target the further inputs start at 0. Returns how many."""
    assert source.bias is not None
    assert target.bias is not None
    known = source.weight.shape[1]
    if known > target.weight.shape[1]:
        raise WeightsError(f"The classifier reads {target.weight.shape[1]} channels, the initial weights' {known}.")
    rows = 0
    for ours, name in enumerate(target_classes):
        if name in source_classes:
            theirs = list(source_classes).index(name)
            target.weight[ours] = 0
            target.weight[ours, :known] = source.weight[theirs]
            target.bias[ours] = source.bias[theirs]
            rows += 1
    return rows


@torch.no_grad()
def recalibrate_batch_norm(net: nn.Module, images: Iterable[torch.Tensor]) -> int:
    """Make batch norms' running statistics those of `images`, without changing what the network computes in eval mode.

    Encoders that come with norms folded into their convolutions have no statistics: identity norms are exact in eval mode but
    distort everything in training mode (rms 160-450 % off). Here the mean and variance of each norm's input are measured, and
    scale and shift make up for the change; training mode then equals eval mode on such images. `images` are normalize_images
    batches B x C x H x W, on the network's device. Returns the number of norms that were set.
    """
    sums: dict[nn.Module, list[torch.Tensor]] = {}

    def measure(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].double()
        axes = [axis for axis in range(x.ndim) if axis != 1]
        count = x.new_tensor(float(x.numel() // x.shape[1]))
        found = [x.sum(axes), x.square().sum(axes), count]
        sums[module] = [a + b for a, b in zip(sums[module], found, strict=True)] if module in sums else found

    norms = [module for module in net.modules() if isinstance(module, BATCH_NORM_TYPES) and module.running_mean is not None]
    hooks = [module.register_forward_pre_hook(measure) for module in norms]
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
    for module in norms:
        if module in sums:
            total, squares, count = sums[module]
            _set_running_stats(module, total / count, (squares / count - (total / count).square()).clamp_min(0))
    return len(sums)


def _set_running_stats(norm: nn.modules.batchnorm._BatchNorm, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """Set running statistics and change scale and shift so that the same function is computed; all in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    before = (norm.running_var.double() + norm.eps).sqrt()
    after = (variance + norm.eps).sqrt()
    weight, bias = norm.weight.double(), norm.bias.double()
    norm.bias.copy_(bias + weight * (mean - norm.running_mean.double()) / before)
    norm.weight.copy_(weight * after / before)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)


# The network that a recipe trains: its configuration, its classes, and its first weights.


_BAND_PIXELS = 4


def build_model(recipe: Recipe, data: SegmentationDataset) -> DeepLab:
    """Return the recipe's network with its initial weights, for the classes of `data`; the random part depends on the seed.

    Raises UnknownNameError, UsageError, WeightsError and DownloadError, each in one sentence.
    """
    name = parse_name(recipe.model)
    start = load_weights(recipe.init) if recipe.init else None
    config = _config(recipe, name, start, len(data.classes))
    torch.manual_seed(recipe.seed)
    net, told = _new_model(recipe, config, data) if start is None else (_build_random_init(config, data), "")
    if start is not None:
        told = f"from {recipe.init}: {transfer_weights(start, net)}"
        net.preprocessing = start.preprocessing
    elif isinstance(recipe.encoder_init, str) and recipe.encoder_init != "auto":
        told = load_encoder(net, recipe.encoder_init)
    own = {"size": recipe.input_size, "resize": recipe.input_resize, "pad": recipe.input_pad}
    for field, value in own.items():
        if value is not None:
            net.preprocessing = Preprocessing.from_dict({**net.preprocessing.to_dict(), field: value})
    millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    shape = f"{millions:.2f} M parameters, {len(data.classes)} classes, output stride {net.output_stride}"
    logger.info(f"model: {recipe.model}, {shape}; {told}")
    return net


def _new_model(recipe: Recipe, config: DeepLabConfig, data: SegmentationDataset) -> tuple[DeepLab, str]:
    """Return a network with ImageNet weights in the encoder, where the recipe wants them, and what it starts from."""
    if recipe.encoder_init not in (True, "auto"):
        return _build_random_init(config, data), "untrained"
    try:
        net = DeepLab(config, classes=data.classes, palette=data.palette, encoder_pretrained=True)
    except DeepLabZooError as error:
        if recipe.encoder_init is True:
            raise
        torch.manual_seed(recipe.seed)
        return _build_random_init(config, data), f"untrained, as no ImageNet weights could be had ({error})"
    return net, "encoder with ImageNet weights"


def _build_random_init(config: DeepLabConfig, data: SegmentationDataset) -> DeepLab:
    return DeepLab(config, classes=data.classes, palette=data.palette)


def model_from_state(state: TrainingState, data: SegmentationDataset) -> DeepLab:
    """Return the network of a state, which needs no other file; raises TrainingError where it describes none."""
    try:
        described = state.facts["network"]
        config, preprocessing = DeepLabConfig.from_dict(described["config"]), described["preprocessing"]
        return DeepLab.from_weights(
            config,
            state.tensors["net"],
            classes=data.classes,
            palette=data.palette,
            preprocessing=Preprocessing.from_dict(preprocessing),
        )
    except (KeyError, TypeError, DeepLabZooError) as error:
        raise TrainingError(f"The state of step {state.step} describes no network that can be resumed: {error}") from error


def load_weights(source: str) -> DeepLab:
    """Return the model that a name, a tag, a file, a folder or an `hf-hub:` address means."""
    return load(source)


def estimate_batch_norm_stats(net: DeepLab, recipe: Recipe, data: SegmentationDataset) -> None:
    """Give batch norms the statistics of the recipe's first training samples: the same in every process."""
    pieces = -(-recipe.recalibrate_norms // _BAND_PIXELS)
    dataset = BatchDataset(data, dataclasses.replace(recipe, batch=_BAND_PIXELS, accumulate=1), net.preprocessing)
    device = next(net.parameters()).device
    batches = (dataset[piece] for piece in range(pieces))
    images = (normalize_images(_read(one).image_BCHW.to(device), net.preprocessing) for one in batches)
    count = recalibrate_batch_norm(net, images)
    logger.info(f"batch norm: statistics of {count} layers measured on {pieces * _BAND_PIXELS} training samples")


def _read(batch: Batch | DeepLabZooError) -> Batch:
    if isinstance(batch, DeepLabZooError):
        raise batch
    return batch


def _config(recipe: Recipe, name: ModelName, start: DeepLab | None, num_classes: int) -> DeepLabConfig:
    """Take the initial weights' configuration where there are any, then the recipe's own wishes."""
    base = start.config if start else DeepLabConfig(architecture=name.architecture, encoder=name.encoder)
    wishes = {key: value for key, value in dataclasses.asdict(recipe.network).items() if value is not None}
    if base.architecture != name.architecture:
        base = dataclasses.replace(base, atrous_rates=base.atrous_rates or None, aspp_separable=None)
    stride = wishes.get("output_stride", base.output_stride)
    if base.atrous_rates:
        wishes.setdefault("atrous_rates", scale_atrous_rates(base.atrous_rates, base.output_stride, stride))
    named = {"architecture": name.architecture, "encoder": name.encoder, "num_classes": num_classes}
    return DeepLabConfig.from_dict({**base.to_dict(), **wishes, **named})
