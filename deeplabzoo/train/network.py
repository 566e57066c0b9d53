"""The network that a recipe trains: its configuration, its classes, and its first weights."""

import dataclasses
from pathlib import Path

import torch

from deeplabzoo.data.base import SegmentationData
from deeplabzoo.data.normalise import normalised
from deeplabzoo.errors import DeepLabZooError, TrainingError
from deeplabzoo.models.atrous import scale_rates
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.say import say
from deeplabzoo.train.init import carry_over, recalibrate_batch_norm
from deeplabzoo.train.recipe import Recipe
from deeplabzoo.train.state import State
from deeplabzoo.train.stream import Batch, Stream
from deeplabzoo.zoo.encoder_weights import load_encoder
from deeplabzoo.zoo.factory import create, load
from deeplabzoo.zoo.registry import ModelName, parse_name

_AT_ONCE = 4


def build(recipe: Recipe, data: SegmentationData) -> DeepLab:
    """Return the recipe's network with its initial weights, for the classes of `data`; the random part depends on the seed.

    Raises UnknownNameError, UsageError, WeightsError and DownloadError, each in one sentence.
    """
    name = parse_name(recipe.model)
    start = weights(recipe.init) if recipe.init else None
    config = _config(recipe, name, start, len(data.classes))
    torch.manual_seed(recipe.seed)
    net, told = _new(recipe, config, data) if start is None else (_untrained(config, data), "")
    if start is not None:
        told = f"from {recipe.init}: {carry_over(start, net)}"
        net.preprocessing = start.preprocessing
    elif isinstance(recipe.encoder_init, str) and recipe.encoder_init != "auto":
        file, changes = load_encoder(net, Path(recipe.encoder_init))
        told = "; ".join([f"encoder from {recipe.encoder_init}", *changes])
        if file.preprocessing is not None:
            net.preprocessing = _input_scale(net.preprocessing, file.preprocessing)
    own = {"size": recipe.input_size, "resize": recipe.input_resize, "pad": recipe.input_pad}
    for field, value in own.items():
        if value is not None:
            net.preprocessing = Preprocessing.from_dict({**net.preprocessing.to_dict(), field: value})
    millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    shape = f"{millions:.2f} M parameters, {len(data.classes)} classes, output stride {net.output_stride}"
    say(f"model: {recipe.model}, {shape}; {told}")
    return net


def _new(recipe: Recipe, config: DeepLabConfig, data: SegmentationData) -> tuple[DeepLab, str]:
    """Return a network with ImageNet weights in the encoder, where the recipe wants them, and what it starts from."""
    if recipe.encoder_init not in (True, "auto"):
        return _untrained(config, data), "untrained"
    try:
        net = DeepLab(config, classes=data.classes, palette=data.palette, encoder_pretrained=True)
    except DeepLabZooError as error:
        if recipe.encoder_init is True:
            raise
        torch.manual_seed(recipe.seed)
        return _untrained(config, data), f"untrained, as no ImageNet weights could be had ({error})"
    return net, "encoder with ImageNet weights"


def _untrained(config: DeepLabConfig, data: SegmentationData) -> DeepLab:
    return DeepLab(config, classes=data.classes, palette=data.palette)


def resumed(state: State, data: SegmentationData) -> DeepLab:
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


def weights(source: str) -> DeepLab:
    """Return the network that a `name`, a `name.tag` or a file holds."""
    is_file = Path(source).suffix in (".safetensors", ".tflite", ".pth", ".pt", ".bin") or Path(source).is_file()
    return load(source) if is_file else create(source, pretrained=True)


def measure_norms(net: DeepLab, recipe: Recipe, data: SegmentationData) -> None:
    """Give batch norms the statistics of the recipe's first training samples: the same in every process."""
    pieces = -(-recipe.recalibrate_norms // _AT_ONCE)
    stream = Stream(data, dataclasses.replace(recipe, batch=_AT_ONCE, accumulate=1), net.preprocessing)
    device = next(net.parameters()).device
    batches = (stream[piece] for piece in range(pieces))
    images = (normalised(_read(one).image_BCHW.to(device), net.preprocessing) for one in batches)
    count = recalibrate_batch_norm(net, images)
    say(f"batch norm: statistics of {count} layers measured on {pieces * _AT_ONCE} training samples")


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
        wishes.setdefault("atrous_rates", scale_rates(base.atrous_rates, base.output_stride, stride))
    named = {"architecture": name.architecture, "encoder": name.encoder, "num_classes": num_classes}
    return DeepLabConfig.from_dict({**base.to_dict(), **wishes, **named})


def _input_scale(own: Preprocessing, other: Preprocessing) -> Preprocessing:
    """Take over how pixels are scaled, which belongs to the encoder's weights; the size of a photo does not."""
    return dataclasses.replace(own, mean=other.mean, std=other.std, channel_order=other.channel_order)
