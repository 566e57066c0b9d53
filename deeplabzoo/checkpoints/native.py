"""Checkpoints in our own format: one safetensors file whose metadata is enough to rebuild the model that it holds.

Metadata (all strings, JSON inside): `format` "deeplabzoo", `version`, `config`, `classes`, `palette`, `preprocessing`,
`source`. Nothing is ever unpickled; a file that is damaged, truncated or contradicts itself is refused in one sentence.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise

from deeplabzoo.checkpoints.types import NATIVE, Checkpoint
from deeplabzoo.errors import UsageError, WeightsError
from deeplabzoo.files import write_atomically
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.models.deeplab import DeepLab, check_state_dict
from deeplabzoo.models.encoders import SkipInit
from deeplabzoo.strict_json import decode_dataclass, parse_json

FORMAT, VERSION = NATIVE, 1
_MAX_HEADER_BYTES = 4 << 20
"""Of a safetensors file; a model of a thousand tensors has some 100 kB."""
_MAX_RANK = 64
"""Dimensions of a tensor; PyTorch's time for thousands of them grows with their square."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of the dtypes that models hold."""


@dataclass(frozen=True, kw_only=True)
class _MetadataSchema:
    """The fields of the metadata that define the model, as they are checked one by one."""

    config: DeepLabConfig
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    preprocessing: Preprocessing

    def __post_init__(self) -> None:
        for colour in self.palette:
            if not 0 <= min(colour) <= max(colour) <= 255:
                raise WeightsError(f"a colour must be three numbers from 0 to 255, not {colour!r}.")


def save_checkpoint(
    net: DeepLab,
    path: str | Path,
    *,
    extra: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    keep_dtype: Collection[str] = (),
    durable: bool = False,
) -> None:
    """Write a model to `path` atomically: an existing file is replaced as a whole or not at all.

    Args:
        net: The model.
        path: The file.
        extra: JSON values kept as the checkpoint's `source`.
        dtype: Floating-point type in the file, such as torch.float16; None keeps the model's.
        keep_dtype: Names of tensors that keep their dtype.
        durable: Flush the file to the disk before it takes its name, so that a power cut leaves no cut file.

    Raises:
        OutputError: The file cannot be written.
        UsageError: Layers were replaced by hand, so that the file could not be loaded.
    """
    _check_rebuildable(net)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "config": json.dumps(net.config.to_dict()),
        "classes": json.dumps(net.classes),
        "palette": json.dumps(net.palette),
        "preprocessing": json.dumps(net.preprocessing.to_dict()),
        "source": json.dumps(dict(extra or {})),
    }
    tensors = {
        name: _to_storage_dtype(tensor, None if name in keep_dtype else dtype) for name, tensor in net.state_dict().items()
    }
    whole = _with_sorted_header(serialise(tensors, metadata))
    write_atomically(Path(path), lambda file: file.write(whole), durable=durable)


def read_checkpoint(path: str | Path, *, dtype: torch.dtype | None = torch.float32) -> Checkpoint:
    """Read a file that `save_checkpoint` wrote.

    Args:
        path: The file.
        dtype: Floating tensors are converted to it; None keeps them as they are stored.

    Raises:
        WeightsError: The file is missing, empty, damaged or not one of ours.
    """
    metadata, tensors = read_safetensors(Path(path), dtype=dtype)
    if metadata.get("format") != FORMAT:
        raise WeightsError(f"'{path}' is a safetensors file but not one of deeplabzoo's: its metadata names no 'format'.")
    if metadata.get("version") != str(VERSION):
        raise WeightsError(
            f"'{path}' has format version {metadata.get('version')}, and this deeplabzoo reads version {VERSION}; upgrade it."
        )
    try:
        fields = {
            one.name: parse_json(metadata[one.name]) for one in dataclasses.fields(_MetadataSchema) if one.name in metadata
        }
        schema = decode_dataclass(_MetadataSchema, fields, "metadata")
        source = parse_json(metadata.get("source", "{}"))
    except (ValueError, WeightsError) as error:
        raise WeightsError(f"The metadata of '{path}' cannot be understood: {error}") from None
    if not isinstance(source, dict):
        raise WeightsError(f"The metadata of '{path}' cannot be understood: source must be an object, not {source!r}.")
    config = schema.config
    names = {config.num_classes, 2} if config.num_classes == 1 else {config.num_classes}  # one channel: back- and foreground
    if not (len(schema.classes) == len(schema.palette) and len(schema.classes) in names):
        raise WeightsError(
            f"The metadata of '{path}' contradicts itself: {config.num_classes} classes, but {len(schema.classes)} "
            f"names and {len(schema.palette)} colours."
        )
    return Checkpoint(
        format_name=NATIVE,
        config=config,
        encoder=config.encoder,
        state_dict=tensors,
        classes=schema.classes,
        palette=schema.palette,
        preprocessing=schema.preprocessing,
        source=source,
    )


def _check_rebuildable(net: DeepLab) -> None:
    """Raise UsageError unless the configuration describes the model's tensors, as it does until a layer is replaced by hand."""
    net.check_classifier()
    with torch.device("meta"), SkipInit():
        expected = type(net)(net.config).state_dict()
    try:
        check_state_dict(net.config, net.state_dict(), {name: tensor.shape for name, tensor in expected.items()})
    except WeightsError as error:
        raise UsageError(
            f"The model cannot be saved, as layers were replaced by hand and a file could not be loaded: {error} Change them "
            "by DeepLabConfig, reset_classifier or set_output_stride, or save net.state_dict()."
        ) from None


def is_native_checkpoint(path: str | Path) -> bool:
    """Return whether a file is a checkpoint in our own format; False for anything else, damaged files included."""
    try:
        _check_header_size(Path(path))
        with safe_open(str(path), framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, ValueError, SafetensorError):
        return False


def read_safetensors(path: Path, *, dtype: torch.dtype | None = None) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Return metadata and tensors of any safetensors file; raises WeightsError where it is missing, empty or damaged.

    Each tensor is read into memory of its own, and floating ones are converted to `dtype` one by one, so that there is never
    a second copy of all weights. Views of the mapped file would need no copy at all, but are not aligned, and kernels round
    differently on unaligned memory: logits would not be bit-identical.
    """
    if not path.is_file():
        raise WeightsError(f"There is no weights file '{path}'.")
    if path.stat().st_size == 0:
        raise WeightsError(f"'{path}' is empty; download or save it again.")
    try:
        _check_header_size(path)
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})  # the library has checked the header against the file's length
        with path.open("rb", buffering=0) as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = parse_json(raw.read(length))
            facts = {name: about for name, about in header.items() if name != "__metadata__"}
            return metadata, {name: _read_tensor(raw, 8 + length, about, dtype) for name, about in sorted(facts.items())}
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise WeightsError(f"'{path}' is not a whole safetensors file ({error}); download or save it again.") from error


def _check_header_size(path: Path) -> None:
    """Raise ValueError for a header larger than any model needs; the library would read up to 100 MB, name by name."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"its header claims {length} bytes, and {_MAX_HEADER_BYTES} are enough for any model")


def _read_tensor(raw: io.FileIO, base: int, about: Mapping[str, Any], dtype: torch.dtype | None) -> torch.Tensor:
    begin, end = about["data_offsets"]
    if len(about["shape"]) > _MAX_RANK:
        raise ValueError(f"a tensor has {len(about['shape'])} dimensions")
    if about["dtype"] not in _DTYPES:
        raise ValueError(f"a tensor has the dtype {about['dtype']}, which no model here holds")
    tensor = torch.empty(about["shape"], dtype=_DTYPES[about["dtype"]])
    if tensor.numel():
        raw.seek(base + begin)
        into = tensor.reshape(-1).view(torch.uint8).numpy().data
        while into and (count := raw.readinto(into)):
            into = into[count:]
        if into:
            raise ValueError(f"{len(into)} of {end - begin} bytes are missing")
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _with_sorted_header(whole: bytes) -> bytes:
    """Sort the metadata, whose order the library varies, so that equal models give equal files.

    The header is JSON, padded with spaces, after its length in 8 bytes.
    """
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + whole[8 + length :]


def _to_storage_dtype(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.detach().contiguous()


def tensors_sha256(net: torch.nn.Module) -> str:
    """Return the SHA-256 over the state dict: for each tensor, by name, its name, dtype, shape and bytes.

    It depends on the tensors alone, not on the file that they were stored in, and changes with a single bit of them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(values.view(torch.uint8).numpy()))
    return digest.hexdigest()
