"""`create` and `load`: from a model name, a tag, a file, a folder or a Hub address to a model."""

import contextlib
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from deeplabzoo.checkpoints.build import ModelOverrides, build_from_checkpoint, fields_of_shapes, load_encoder_weights
from deeplabzoo.checkpoints.load import FOLDER_FILES, SETTINGS_FILE, SHARD_INDEXES, find_weights_file, read_weights, shard_names
from deeplabzoo.checkpoints.native import is_native_checkpoint
from deeplabzoo.checkpoints.types import NATIVE, Checkpoint
from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.errors import UnknownNameError, UsageError, WeightsError
from deeplabzoo.hub.download import HubFileNotFoundError, cached_sha256, fetch, fetch_from_hub
from deeplabzoo.hub.manifest import WeightRow, released_row_of, released_rows
from deeplabzoo.hub.registry import find_weights
from deeplabzoo.log import logger
from deeplabzoo.models.config import ARCHITECTURES
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.names import ModelName, parse_name

PathLike = str | os.PathLike[str]
HUB_PREFIX = "hf-hub:"
_FILE_SUFFIXES = (
    *(".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".gz", ".tgz", ".tflite", ".pb", ".h5", ".hdf5", ".keras"),
    *(".pkl", ".pdparams", ".npz", ".json", ".onnx"),
)
"""Suffixes that no tag has: a text that ends in one means a file, whether or not it exists."""


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
    """Create a model by name, optionally with pretrained weights.

    A model with weights is in eval mode; one without, or with an encoder's weights alone, is in training mode. Options that are
    None are as the weights have them, or as in the papers where there are no weights. One log line states what was loaded and,
    as a warning, what was changed or assumed. Other options are fields of DeepLabConfig, for `DeepLab(config)`.

    Args:
        name: `architecture_encoder[_data][.tag]`, or `hf-hub:owner/name[@revision]` for a repository with a checkpoint of ours
            or of a known format, such as SMP's and transformers'.
        pretrained: True for the weights of the name's tag, or the default ones; a tag; a file or folder; or an `hf-hub:`
            address. False for random weights.
        num_classes: Number of classes; another one than the weights have starts a new classifier.
        in_chans: Channels of the image. Another number adapts the first convolution: one channel is the sum over RGB, more
            repeat RGB in order, scaled by 3 / in_chans.
        output_stride: 8, 16 or 32 pixels per cell of the encoder's last feature; the same weights are re-dilated.
        encoder_pretrained: True for timm's ImageNet weights in the encoder, or a file, folder or `hf-hub:` address with
            an encoder; only for models without weights of their own.
        atrous_rates: ASPP rates at `output_stride`.
        multi_grid: Unit rates of the blocks of the last encoder stage.
        norm: `batch` or `group` norm in encoder and head.
        dropout: Probability in the head, 0...1.
        aux_head: Whether there is an auxiliary head, which only training uses.

    Returns:
        The model. Weights never load with a tensor missing or left over.

    Raises:
        UnknownNameError: A name or tag that does not exist; the message has the nearest ones.
        UsageError: Options that do not go together, or that the weights cannot be used with.
        UnsupportedStrideError: The encoder cannot run at the output stride.
        DownloadError: A file could not be downloaded.
        WeightsError: A file that is damaged, unsafe, of an unknown format or of another model.

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
    if pretrained is False:
        return _build_random_init(parsed, overrides, encoder_pretrained)
    if pretrained is True:
        checkpoint = read_released(find_weights(parsed))
    elif isinstance(pretrained, str | os.PathLike):
        checkpoint = _lend_from_row(open_checkpoint(pretrained, parsed), parsed, overrides)
    else:
        raise UsageError(f"pretrained must be True, False, a tag, a file or an hf-hub: address, not {pretrained!r}.")
    return _build_and_log(checkpoint, parsed, overrides, ("encoder_pretrained not needed",) if encoder_pretrained else ())


def load(source: PathLike) -> DeepLab:
    """Load the model that a checkpoint holds, in eval mode; architecture, classes and preprocessing follow from its content.

    Args:
        source: A file of ours or of any known format; a folder as SMP and transformers save it; `hf-hub:owner/name[@revision]`;
            or the name of a model with released weights, `name[.tag]`.

    Raises:
        WeightsError: A file that is missing, damaged, unsafe or of an unknown format.
        DownloadError: A file could not be downloaded.

    >>> load("missing.safetensors")
    Traceback (most recent call last):
    deeplabzoo.errors.WeightsError: There is no weights file 'missing.safetensors'.
    """
    return _build_and_log(open_checkpoint(source), None, ModelOverrides())


def load_named_model(model: str, weights: str | None = None) -> DeepLab:
    """Load the model that a command line names, with trained weights.

    Args:
        model: What `load` takes.
        weights: A tag of `model`, a file or an `hf-hub:` address with its weights; None takes the model's own or default ones.
    """
    if weights is None:
        return load(model)
    if model.startswith(HUB_PREFIX) or _means_file(model):
        raise UsageError(f"MODEL '{model}' holds its own weights; leave --weights out.")
    return create(model, pretrained=weights)


def load_encoder(net: DeepLab, source: PathLike) -> str:
    """Put the encoder weights of a file, folder or `hf-hub:` address into a model and return what was done, as a phrase."""
    checkpoint = open_checkpoint(source)
    changes = load_encoder_weights(net, checkpoint)
    notes = f" ({'; '.join(changes)})" if changes else ""
    return f"encoder from {os.fspath(source)} (sha256 {checkpoint.source['sha256'][:12]}){notes}"


def open_checkpoint(source: PathLike, name: ModelName | None = None) -> Checkpoint:
    """Return the checkpoint that a text or path means; the one place where names, tags, files and addresses are distinguished.

    Args:
        source: `hf-hub:owner/name[@revision]`, a file or folder, or a model name with or without tag; with `name` also its tag.
        name: The model whose weights are looked for.

    Raises:
        UnknownNameError: It is neither a file nor a name or tag that exists.
        WeightsError: A file that is missing, damaged, unsafe or of an unknown format.
        DownloadError: A file could not be downloaded.
    """
    text = os.fspath(source)
    if text.startswith(HUB_PREFIX):
        return read_from_hub(text)
    if name is not None and isinstance(source, str):
        tag = text.removeprefix(f"{name.untagged}.")
        if tag in {row.tag for row in released_rows(name.untagged)}:
            if name.tag not in (None, tag):
                raise UsageError(f"'{name}' names the weights tagged {name.tag}, but pretrained='{text}'; choose one.")
            return read_released(find_weights(name, tag))
        if not Path(text).exists() and re.fullmatch(r"[\w-]+", text):
            return read_released(find_weights(name, text))  # fails, and names the tags
    if name is None and isinstance(source, str) and not _means_file(text):
        return read_released(find_weights(parse_name(text)))
    return _identify(read_weights(Path(text)), Path(text))


def _means_file(text: str) -> bool:
    """Return whether a text means a file or checkpoint folder: it is one, looks like a path, or could not be a model's name.

    A folder without weights that happens to have a model's name is not one.
    """
    path = Path(text)
    if path.is_file() or any((path / name).is_file() for name in (*FOLDER_FILES, *SHARD_INDEXES)):
        return True
    looks_like_path = "/" in text or os.sep in text or path.suffix.lower() in _FILE_SUFFIXES or text in (".", "..", "")
    return looks_like_path or (path.exists() and not text.startswith(ARCHITECTURES))


def _identify(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """Add the file's hash and, where the manifest has it, the name and tag of the released weights that it is."""
    file = find_weights_file(path)
    if file.name.endswith(".index.json"):
        hashes = "".join(cached_sha256(one) for one in (file, *map(file.with_name, shard_names(file))))
        sha256 = hashlib.sha256(hashes.encode()).hexdigest()
    else:
        sha256 = cached_sha256(file)
    row = released_row_of(sha256)
    identity = {"name": row.name if row else None, "tag": row.tag if row else None, "sha256": sha256}
    source = {key: value for key, value in checkpoint.source.items() if key != "source"}
    return replace(checkpoint, source={**source, **identity, "source": checkpoint.source["source"]})


def _lend_from_row(checkpoint: Checkpoint, name: ModelName, overrides: ModelOverrides) -> Checkpoint:
    """Complete a bare state dict by what the manifest states about the model's released weights: most likely it began as them.

    Names and shapes of the tensors win over the row, and class names are lent for as many classes alone.
    """
    if checkpoint.config is not None or checkpoint.encoder is not None or "head.classifier.weight" not in checkpoint.state_dict:
        return checkpoint
    try:
        row = find_weights(name)
    except UnknownNameError:
        return checkpoint
    shown = fields_of_shapes(checkpoint.state_dict, name.encoder)
    config = replace(row.config, **{key: value for key, value in shown.items() if key != "atrous_rates"})
    same_classes = config.num_classes == row.config.num_classes
    classes = CLASS_LISTS[row.data]
    lent = "configuration, preprocessing and class names" if same_classes else "configuration and preprocessing"
    return replace(
        checkpoint,
        config=config,
        encoder=config.encoder,
        preprocessing=row.preprocessing,
        classes=classes.classes if same_classes else None,
        palette=classes.palette if same_classes else None,
        notes=(*checkpoint.notes, f"{lent} as of {row.full_name}"),
    )


def _build_random_init(name: ModelName, overrides: ModelOverrides, encoder_pretrained: bool | PathLike) -> DeepLab:
    """Build a model without weights; a tag in its name gives it the configuration and preprocessing of these weights."""
    row = find_weights(name) if name.tag else None
    config = overrides.apply(row.config) if row else overrides.new_model_config(name)
    known = CLASS_LISTS.get(name.data) if name.data else None
    named = known if known and known.num_classes == config.num_classes else None
    net = DeepLab(
        config,
        classes=named.classes if named else None,
        palette=named.palette if named else None,
        preprocessing=row.preprocessing if row else None,
        encoder_pretrained=encoder_pretrained is True,
    )
    start = "random weights"
    if encoder_pretrained is True:
        start = "encoder with timm's ImageNet weights, head with random weights"
    elif encoder_pretrained is not False:
        start = f"{load_encoder(net, encoder_pretrained)}, head with random weights"
    logger.info(f"{name}: {_parameter_count(net)}, {start}; {config.num_classes} classes, output stride {config.output_stride}")
    return net


def _build_and_log(
    checkpoint: Checkpoint, name: ModelName | None, overrides: ModelOverrides, notes: tuple[str, ...] = ()
) -> DeepLab:
    net, changes = build_from_checkpoint(checkpoint, name, overrides)
    source = checkpoint.source
    net.weights_source = {**source, **({"adapted": list(changes)} if changes else {})}
    what = checkpoint.label if source.get("name") else str(name or ModelName(net.config.architecture, net.config.encoder))
    notes_text = "".join(f"; {note}" for note in (*changes, *checkpoint.remarks, *notes))
    layout = f"{checkpoint.format_name} layout, " if checkpoint.is_converted else ""
    log = logger.warning if changes or checkpoint.remarks else logger.info
    log(f"{what}: {_parameter_count(net)} from {source['source']} ({layout}sha256 {source['sha256'][:12]}){notes_text}")
    return net


def _parameter_count(net: DeepLab) -> str:
    return f"{sum(parameter.numel() for parameter in net.parameters()) / 1e6:.2f} M parameters"


def read_released(row: WeightRow) -> Checkpoint:
    """Download and read the file of a manifest row.

    What the row states about a converted file (configuration, preprocessing, classes) counts, as such files do not state all.
    Raises DownloadError and WeightsError.
    """
    path = fetch(row)
    checkpoint = read_weights(path, str(row.source))
    if checkpoint.format_name != row.origin:
        raise WeightsError(
            f"The manifest states that {row.full_name} is of origin {row.origin}, but its file is {checkpoint.format_name}."
        )
    if checkpoint.format_name != NATIVE:
        classes = CLASS_LISTS[row.data]
        checkpoint = replace(
            checkpoint,
            config=row.config,
            encoder=row.config.encoder,
            preprocessing=row.preprocessing,
            classes=classes.classes,
            palette=classes.palette,
            dropped=(),
            notes=(),  # what the row states was not assumed
        )
    identity = {"name": row.name, "tag": row.tag, "sha256": row.sha256 or cached_sha256(path), "source": str(row.source)}
    return replace(checkpoint, source={**checkpoint.source, **identity})


def read_from_hub(address: str) -> Checkpoint:
    """Read the checkpoint of a Hub repository, of ours or of a known format, sharded or not.

    A file that is not ours does not state everything (output stride, atrous rates, class names), so the `config.json` of the
    same commit is downloaded with it, where there is one.

    Args:
        address: `hf-hub:owner/name[@revision]`.

    Raises:
        DownloadError: A file could not be downloaded.
        WeightsError: A file that is damaged, unsafe or of an unknown format.
    """
    repo, _, revision = address.removeprefix(HUB_PREFIX).partition("@")
    path = _weights_from_hub(repo, revision or None)
    commit = _commit_of(path) or revision or None
    if path.name in SHARD_INDEXES:
        for shard in shard_names(path):
            fetch_from_hub(repo, shard, commit)
    if not is_native_checkpoint(path):
        with contextlib.suppress(HubFileNotFoundError):
            fetch_from_hub(repo, SETTINGS_FILE, commit)
    return _identify(read_weights(path, address), path)


def _weights_from_hub(repo: str, revision: str | None) -> Path:
    first, *others = (*FOLDER_FILES, *SHARD_INDEXES)
    try:
        return fetch_from_hub(repo, first, revision)
    except HubFileNotFoundError as missing:
        for file in others:
            with contextlib.suppress(HubFileNotFoundError):
                return fetch_from_hub(repo, file, revision)
        raise missing


def _commit_of(path: Path) -> str:
    """Return the commit that a file in the Hub's cache is of, so that files of a branch that moves are of one commit."""
    name = path.parent.name
    return name if re.fullmatch(r"[0-9a-f]{40}", name) else ""
