"""From a name or a file to a network: found, fetched, loaded without a gap, and reported in one line."""

import contextlib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import deeplabzoo
from deeplabzoo.checkpoints.build import ModelOverrides, build_from_checkpoint, load_encoder_weights
from deeplabzoo.checkpoints.load import FOLDER_FILES, HUB_PREFIX, NATIVE, SETTINGS_FILE, WeightsFile, read_weights
from deeplabzoo.checkpoints.native import is_native_checkpoint
from deeplabzoo.data.classes import CLASS_LISTS, class_list
from deeplabzoo.errors import UsageError, WeightsError
from deeplabzoo.hub.download import HubFileNotFoundError, fetch, fetch_from_hub, hf_offline_mode
from deeplabzoo.hub.manifest import WeightRow, released
from deeplabzoo.hub.registry import find_weights, parse_name
from deeplabzoo.log import logger
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.names import ModelName

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
    overrides = ModelOverrides(
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
        return _build_and_log(read_from_hub(name), None, overrides)
    parsed = parse_name(name)
    file = _resolve_weights(parsed, pretrained)
    if file is None:
        return _build_random_init(parsed, overrides, encoder_pretrained)
    return _build_and_log(file, parsed, overrides, ("encoder_pretrained not needed",) if encoder_pretrained else ())


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
    return _build_and_log(file, None, ModelOverrides())


def _resolve_weights(name: ModelName, pretrained: bool | PathLike) -> WeightsFile | None:
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


def _build_random_init(name: ModelName, overrides: ModelOverrides, encoder_pretrained: bool | PathLike) -> DeepLab:
    config = overrides.apply(find_weights(name).config) if name.tag else overrides.new_model_config(name)
    known = CLASS_LISTS.get(name.data) if name.data else None
    named = known if known and known.num_classes == config.num_classes else None
    with hf_offline_mode():
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
        start = _load_encoder_file(net, Path(encoder_pretrained))
    logger.info(f"{name}: {_parameter_count(net)}, {start}; {config.num_classes} classes, output stride {config.output_stride}")
    return net


def _load_encoder_file(net: DeepLab, path: Path) -> str:
    file, changes = load_encoder_weights(net, path)
    if file.preprocessing is not None:
        # the scale of the input belongs to the encoder's weights, the size of a photo does not
        own = file.preprocessing
        net.preprocessing = replace(net.preprocessing, mean=own.mean, std=own.std, channel_order=own.channel_order)
    notes = f" ({'; '.join(changes)})" if changes else ""
    return f"encoder from {path} (sha256 {file.source['sha256'][:12]}){notes}, head untrained"


def _build_and_log(
    file: WeightsFile, name: ModelName | None, overrides: ModelOverrides, notes: tuple[str, ...] = ()
) -> DeepLab:
    net, changes = build_from_checkpoint(file, name, overrides)
    net.weights_source = {**file.source, **({"adapted": list(changes)} if changes else {})}
    what = file.label if file.source.get("name") else str(name or _name_of(net.config))
    notes_text = "".join(f"; {note}" for note in (*changes, *file.notes, *notes))
    layout = f"{file.format_name} layout, " if file.is_converted else ""
    logger.info(
        f"{what}: {_parameter_count(net)} from {file.source['source']} ({layout}sha256 {file.source['sha256'][:12]}){notes_text}"
    )
    return net


def _name_of(config: DeepLabConfig) -> ModelName:
    return ModelName(config.architecture, config.encoder)


def _parameter_count(net: DeepLab) -> str:
    return f"{sum(parameter.numel() for parameter in net.parameters()) / 1e6:.2f} M parameters"


def read_released(row: WeightRow) -> WeightsFile:
    """Fetch and read the file of a manifest row.

    What the row says about a foreign file (configuration, preprocessing, classes) counts, since such files cannot say it all.
    Raises DownloadError and WeightsError.
    """
    file = read_weights(fetch(row), str(row.source))
    if file.format_name != row.origin:
        raise WeightsError(
            f"The manifest says that {row.full_name} is of origin {row.origin}, but its file is {file.format_name}."
        )
    if file.format_name != NATIVE:
        classes = class_list(row.data)
        file = replace(
            file,
            config=row.config,
            encoder=row.config.encoder,
            preprocessing=row.preprocessing,
            classes=classes.classes,
            palette=classes.palette,
            notes=(),  # what a row says is not assumed
        )
    return replace(file, source={**file.source, "name": row.name, "tag": row.tag})


def read_from_hub(address: str) -> WeightsFile:
    """Read `hf-hub:owner/name[@revision]`: its `model.safetensors`, else its `pytorch_model.bin`, of ours or a known origin.

    A file that is not ours says too little about itself (output stride, rates, class names), so the `config.json` of the same
    commit is fetched beside it, where there is one. Raises DownloadError and WeightsError.
    """
    repo, _, revision = address.removeprefix(HUB_PREFIX).partition("@")
    path = _weights_from_hub(repo, revision or None)
    if not is_native_checkpoint(path):
        with contextlib.suppress(HubFileNotFoundError):
            fetch_from_hub(repo, SETTINGS_FILE, _commit_of(path) or revision or None)
    return read_weights(path, address)


def _weights_from_hub(repo: str, revision: str | None) -> Path:
    first, *others = FOLDER_FILES
    try:
        return fetch_from_hub(repo, first, revision)
    except HubFileNotFoundError as missing:
        for file in others:
            with contextlib.suppress(HubFileNotFoundError):
                return fetch_from_hub(repo, file, revision)
        raise missing


def _commit_of(path: Path) -> str:
    """Return the commit that a file of the Hub's cache is of, so that a branch that moves meanwhile mixes no two."""
    name = path.parent.name
    return name if re.fullmatch(r"[0-9a-f]{40}", name) else ""


def load_named_model(model: str, weights: str | None) -> "DeepLab":
    """Return the network that a command line names, with trained weights.

    `model` is a name of the zoo, `hf-hub:repo[@revision]`, or a checkpoint file or folder, which says itself what it is;
    `weights` is a tag of that name or a file, and without it the name's default tag is taken. Raises what `create` and `load`
    raise.
    """
    if not (Path(model).is_file() or _is_checkpoint_folder(Path(model))):
        named: DeepLab = deeplabzoo.create(model, pretrained=weights or True)
        return named
    if weights is not None:
        raise UsageError(f"MODEL '{model}' holds its own weights; leave --weights out.")
    loaded: DeepLab = deeplabzoo.load(model)
    return loaded


def _is_checkpoint_folder(path: Path) -> bool:
    """Whether it is a folder as SMP and transformers save it, and not one that happens to have a model's name."""
    return any((path / file).is_file() for file in ("model.safetensors", "pytorch_model.bin"))
