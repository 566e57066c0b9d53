"""Writes TensorFlow graphs (GraphDef) in protobuf's wire format, for tests; field numbers as in TensorFlow's .proto files."""

import gzip
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_TYPES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9}


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def message(number: int, data: bytes) -> bytes:
    """A field of bytes: a string or a message."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def number_field(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def tensor(values: np.ndarray, *, single: bool = False) -> bytes:
    """A TensorProto; `single` gives one value that stands for all."""
    shape = b"".join(message(2, number_field(1, size)) for size in values.shape)
    found = number_field(1, _TYPES[str(values.dtype)]) + message(2, shape)
    return found + (message(5, values.reshape(-1)[:1].tobytes()) if single else message(4, values.tobytes()))


def attribute(name: str, value: Any) -> bytes:
    """A float, flag, text, list of whole numbers or tensor, as an entry of a node's attributes."""
    if isinstance(value, bytes):
        held = message(8, value)
    elif isinstance(value, bool):
        held = number_field(5, value)
    elif isinstance(value, float):
        held = varint(4 << 3 | 5) + np.float32(value).tobytes()
    elif isinstance(value, str):
        held = message(2, value.encode())
    else:
        held = message(1, message(3, b"".join(varint(one) for one in value)))
    return message(5, message(1, name.encode()) + message(2, held))


def node(name: str, op: str, inputs: Sequence[str] = (), **attributes: Any) -> bytes:
    found = message(1, name.encode()) + message(2, op.encode())
    found += b"".join(message(3, one.encode()) for one in inputs)
    return message(1, found + b"".join(attribute(key, value) for key, value in attributes.items()))


def archive(path: Path, graph: bytes, name: str = "deeplabv3/frozen_inference_graph.pb", before: bytes = b"weights") -> Path:
    """A `.tar.gz` as the zoo's: a checkpoint first, then the graph."""
    with gzip.open(path, "wb", compresslevel=1) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for one, data in (("deeplabv3/model.ckpt.data-00000-of-00001", before), (name, graph)):
            entry = tarfile.TarInfo(one)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path
