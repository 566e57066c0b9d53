"""From a name or a file to a network: found, fetched, loaded without a gap, and reported in one line."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.errors import UsageError
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.say import say
from deeplabzoo.zoo.encoder_weights import load_encoder
from deeplabzoo.zoo.fitting import fit
from deeplabzoo.zoo.hub import hub_obeys_switch
from deeplabzoo.zoo.manifest import released
from deeplabzoo.zoo.registry import ModelName, find_weights, parse_name
from deeplabzoo.zoo.weights_file import HUB_PREFIX, WeightsFile, read_from_hub, read_released, read_weights
from deeplabzoo.zoo.wishes import Wishes

PathLike = str | os.PathLike[str]


def create(
    name: str,
    pretrained: bool | PathLike = False,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    output_stride: int | None = None,
    encoder_pretrained: bool | PathLike = False,
    atrous_rates: Sequence[int] | None = None,
    multi_grid: Sequence[int] | None = None,
    norm: Literal["batch", "group"] | None = None,
    dropout: float | None = None,
    aux_head: bool | None = None,
) -> DeepLab:
    """Make the network that `name` says, in eval mode, with the weights that `pretrained` says.

    `name` is `architecture_encoder[_data][.tag]`, or `hf-hub:owner/name[@revision]` for a repository with a checkpoint of
    ours or of a known origin, such as SMP's and transformers'. `pretrained`: False for none, True for the tag of the name or
    else the default one, a tag, a file, or an `hf-hub:` address. Full weights bring their own encoder, so nothing else is
    fetched then; without them `encoder_pretrained` starts the encoder from timm's ImageNet weights (True) or from a file.

    Everything else is None for "as the weights have it", or as the papers have it without weights. Another `num_classes`
    starts a new classifier; another `in_chans` adapts the first convolution (one channel: the sum over RGB; more: RGB in
    turn, scaled by 3 / in_chans); another `output_stride` re-dilates the same weights. One line says what was done. Options
    beyond these are fields of DeepLabConfig, for `DeepLab(config)`.

    Raises UnknownNameError, UsageError, UnsupportedStrideError, DownloadError and WeightsError, each in one sentence; weights
    never load with a tensor missing or left over.

    >>> net = create("deeplabv3plus_resnet18", num_classes=5, output_stride=8)
    >>> net.num_classes, net.output_stride, net.config.atrous_rates
    (5, 8, None)
    """
    wishes = Wishes(
        num_classes=num_classes,
        in_chans=in_chans,
        output_stride=output_stride,
        atrous_rates=atrous_rates,
        multi_grid=multi_grid,
        norm=norm,
        dropout=dropout,
        aux_head=aux_head,
    )
    if name.startswith(HUB_PREFIX):
        if not isinstance(pretrained, bool):
            raise UsageError(f"'{name}' holds its own weights; leave pretrained={pretrained!r} out.")
        return _loaded(read_from_hub(name), None, wishes)
    parsed = parse_name(name)
    file = _find(parsed, pretrained)
    if file is None:
        return _untrained(parsed, wishes, encoder_pretrained)
    return _loaded(file, parsed, wishes, ("encoder_pretrained not needed",) if encoder_pretrained else ())


def load(source: PathLike) -> DeepLab:
    """Rebuild the network that a file holds, in eval mode: a checkpoint of ours, or any known foreign format.

    `source` is a path (of a file, or of a folder as SMP and transformers save it) or `hf-hub:owner/name[@revision]`. What the
    network is, its classes, colours and preprocessing are found out from the content. Raises WeightsError in one sentence for
    a file that is damaged, unsafe or of an unknown layout, and DownloadError.

    >>> load("missing.safetensors")
    Traceback (most recent call last):
    deeplabzoo.errors.WeightsError: There is no weights file 'missing.safetensors'.
    """
    text = os.fspath(source)
    file = read_from_hub(text) if text.startswith(HUB_PREFIX) else read_weights(Path(text))
    return _loaded(file, None, Wishes())


def _find(name: ModelName, pretrained: bool | PathLike) -> WeightsFile | None:
    """Return the weights that `pretrained` means for a name; None for none."""
    if isinstance(pretrained, bool):
        return read_released(find_weights(name)) if pretrained else None
    if not isinstance(pretrained, str):
        if not isinstance(pretrained, os.PathLike):
            raise UsageError(f"pretrained must be True, False, a tag, a file or an hf-hub: address, not {pretrained!r}.")
        return read_weights(Path(pretrained))
    if pretrained.startswith(HUB_PREFIX):
        return read_from_hub(pretrained)
    tags = {row.tag for row in released() if row.name == name.untagged}
    tag = pretrained.removeprefix(f"{name.untagged}.")
    if tag in tags:
        if name.tag not in (None, tag):
            raise UsageError(f"'{name}' names the weights tagged {name.tag}, but pretrained='{pretrained}'; choose one.")
        return read_released(find_weights(name, tag))
    path = Path(pretrained)
    if path.exists() or path.suffix or len(path.parts) > 1:
        return read_weights(path)
    return read_released(find_weights(name, pretrained))


def _untrained(name: ModelName, wishes: Wishes, encoder_pretrained: bool | PathLike) -> DeepLab:
    config = wishes.change(find_weights(name).config) if name.tag else wishes.of_a_new_network(name)
    known = CLASS_LISTS.get(name.data) if name.data else None
    named = known if known and known.num_classes == config.num_classes else None
    with hub_obeys_switch():
        net = DeepLab(
            config,
            classes=named.classes if named else None,
            palette=named.palette if named else None,
            encoder_pretrained=encoder_pretrained is True,
        ).eval()
    start = "untrained"
    if encoder_pretrained is True:
        start = "encoder with timm's ImageNet weights, head untrained"
    elif encoder_pretrained is not False:
        start = _start_from(net, Path(encoder_pretrained))
    say(f"{name}: {_size(net)}, {start}; {config.num_classes} classes, output stride {config.output_stride}")
    return net


def _start_from(net: DeepLab, path: Path) -> str:
    file, changes = load_encoder(net, path)
    if file.preprocessing is not None:
        # the scale of the input belongs to the encoder's weights, the size of a photo does not
        own = file.preprocessing
        net.preprocessing = replace(net.preprocessing, mean=own.mean, std=own.std, channel_order=own.channel_order)
    remarks = f" ({'; '.join(changes)})" if changes else ""
    return f"encoder from {path} (sha256 {file.source['sha256'][:12]}){remarks}, head untrained"


def _loaded(file: WeightsFile, name: ModelName | None, wishes: Wishes, remarks: tuple[str, ...] = ()) -> DeepLab:
    net, changes = fit(file, name, wishes)
    net.weights_source = {**file.source, **({"adapted": list(changes)} if changes else {})}
    what = file.label if file.source.get("name") else str(name or _name_of(net.config))
    told = "".join(f"; {remark}" for remark in (*changes, *file.remarks, *remarks))
    layout = f"{file.origin} layout, " if file.is_foreign else ""
    say(f"{what}: {_size(net)} from {file.source['source']} ({layout}sha256 {file.source['sha256'][:12]}){told}")
    return net


def _name_of(config: DeepLabConfig) -> ModelName:
    return ModelName(config.architecture, config.encoder)


def _size(net: DeepLab) -> str:
    return f"{sum(parameter.numel() for parameter in net.parameters()) / 1e6:.2f} M parameters"
