"""Pickles of numpy arrays are read without running anything that they ask for."""

import collections
import io
import os
import pickle
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from deeplabzoo.checkpoints.state_dict import read_state_dict
from deeplabzoo.errors import WeightsError

REFUSED = "holds Python objects or code beside tensors, which are never run, or is damaged"


def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "float": generator.normal(size=(2, 3, 4)).astype(np.float32),
        "half": generator.normal(size=5).astype(np.float16),
        "double": generator.normal(size=(1, 2)),
        "fortran": np.asfortranarray(generator.normal(size=(3, 4)).astype(np.float32)),
        "big endian": generator.normal(size=3).astype(">f4"),
        "whole": np.arange(6).reshape(2, 3),
        "scalar": np.array(7, dtype=np.int64),
        "empty": np.zeros((0, 3), dtype=np.float32),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_come_back_as_tensors(protocol: int, tmp_path: Path) -> None:
    """Of every protocol, byte order and memory order, in dictionaries of either kind, beside words and numbers."""
    file = tmp_path / "model.pkl"
    content = {"model": collections.OrderedDict(arrays()), "__author__": "somebody", "score": np.float64(0.5)}
    file.write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_state_dict(file)
    assert found.keys() == arrays().keys()
    for name, array in arrays().items():
        native = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        assert found[name].shape == array.shape, name
        assert torch.equal(found[name], native.float() if native.is_floating_point() else native), name
    assert found["double"].dtype == torch.float32


def test_pickles_of_paddle_are_read(tmp_path: Path) -> None:
    """Beside the tensors stands a table of names; newer versions write a tensor as its name and its array."""
    file = tmp_path / "model.pdparams"
    weight = np.ones((2, 2), dtype=np.float32)
    table = {"StructuredToParameterName@@": {"a": "conv2d_0.w_0"}}
    file.write_bytes(pickle.dumps({"a": weight, "b": ("conv2d_0.w_1", weight), **table}, protocol=2))
    assert {name: tuple(tensor.shape) for name, tensor in read_state_dict(file).items()} == {"a": (2, 2), "b": (2, 2)}


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def hostile(command: str) -> dict[str, bytes]:
    """One pickle of each way to make an unpickler call something."""
    system = os.system
    text = command.encode()
    nested = {"model": {"weight": [Calls(system, command)], "other": np.ones(2)}}
    short = b"\x8c" + bytes([len(text)]) + text
    return {
        "a call": pickle.dumps(Calls(system, command), protocol=4),
        "a call inside the tensors": pickle.dumps(nested, protocol=2),
        "subprocess": pickle.dumps({"a": Calls(subprocess.check_call, command, -1, None)}, protocol=4),
        "eval": pickle.dumps({"a": Calls(eval, f"__import__('os').system({command!r})")}, protocol=4),
        "a name by GLOBAL": b"\x80\x02cposix\nsystem\n(U" + bytes([len(text)]) + text + b"tR.",
        "a name by STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + short + b"\x85R.",
        "an attribute of a harmless name": b"\x80\x04\x8c\x05numpy\x8c\x0ddtype.__init__\x93" + short + b"\x85R.",
        "INST": b"\x80\x02(U" + bytes([len(text)]) + text + b"iposix\nsystem\n.",
        "OBJ": b"\x80\x02(cposix\nsystem\nU" + bytes([len(text)]) + text + b"o.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\nU" + bytes([len(text)]) + text + b"\x85\x81.",
        "BUILD": b"\x80\x02ccollections\nOrderedDict\n)R}U\x0c__setstate__cposix\nsystem\nsbU"
        + bytes([len(text)])
        + text
        + b"b.",
        "getattr": b"\x80\x02c__builtin__\ngetattr\nc_codecs\nencode\nU\x0b__globals__\x86R.",
        "numpy's loader": pickle.dumps({"a": Calls(np.load, "x.npy", None, True)}, protocol=4),
        "a persistent name": b"\x80\x02Uposix\nQ.",
        "an extension": b"\x80\x02\x82\x01.",
    }


@pytest.mark.parametrize("way", hostile("true"))
def test_nothing_is_ever_run(way: str, tmp_path: Path) -> None:
    """Each way to call something ends in the same sentence, and what it would have made is not there."""
    trace = tmp_path / "trace"
    file = tmp_path / "model.pkl"
    file.write_bytes(hostile(f"touch {trace}")[way])
    with pytest.raises(WeightsError, match=REFUSED):
        read_state_dict(file)
    assert not trace.exists()


def test_a_library_call_that_is_not_refused_is_not_run_either(tmp_path: Path) -> None:
    """A class of numpy may stand beside the tensors: the file is read, and the call, which would write a file, is not made."""
    trace, file = tmp_path / "trace", tmp_path / "model.pkl"
    call = Calls(np.memmap, str(trace), "uint8", "w+", 0, 4)
    file.write_bytes(pickle.dumps({"model": {"weight": np.ones(2, np.float32)}, "log": call}, protocol=2))
    assert list(read_state_dict(file)) == ["weight"]
    assert not trace.exists()
    pickle.loads(file.read_bytes())
    assert trace.exists(), "the call does nothing, so this test would show nothing"


def test_the_way_by_a_call_would_have_run(tmp_path: Path) -> None:
    """The pickles above do something where they are let: else their refusal would show nothing."""
    trace = tmp_path / "trace"
    pickle.loads(hostile(f"touch {trace}")["a name by STACK_GLOBAL"])
    assert trace.exists()


def test_a_file_cannot_change_how_the_next_is_read(tmp_path: Path) -> None:
    """BUILD can set attributes of classes; the stand-ins are made anew, so it changes those of its own reading alone."""
    poison = tmp_path / "poison.pkl"
    poison.write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x05dtype\x93N}\x8c\x05order\x8c\x01>s\x86b.")
    with pytest.raises(WeightsError):
        read_state_dict(poison)
    file = tmp_path / "model.pkl"
    file.write_bytes(pickle.dumps({"a": np.ones(2, dtype=np.float32)}))
    assert read_state_dict(file)["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"few bytes.",
        b"\x80\x02Nr\xff\xff\xff\xff.",
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 50) + b"N.",
        pickle.dumps({"a": np.ones(100, dtype=np.float32)})[:-60],
        pickle.dumps({"a": np.array([print], dtype=object)}),
        pickle.dumps({"a": np.array(["words"])}),
        b"\x80\x04",
    ],
    ids=["bytes", "memo", "frame", "cut", "objects", "words", "nothing"],
)
def test_lying_lengths_and_other_arrays_end_in_a_sentence(data: bytes, tmp_path: Path) -> None:
    """No length is believed before as many bytes are there."""
    file = tmp_path / "model.pkl"
    file.write_bytes(data)
    with pytest.raises(WeightsError, match=REFUSED):
        read_state_dict(file)


def test_an_array_with_a_wrong_declared_size_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.pkl"
    honest = pickle.dumps({"a": np.ones((2, 3), dtype=np.float32)}, protocol=2)
    assert honest.count(b"K\x02K\x03\x86") == 1
    file.write_bytes(honest.replace(b"K\x02K\x03\x86", b"K\x02K\x7f\x86"))
    with pytest.raises(WeightsError, match=REFUSED):
        read_state_dict(file)


def test_old_files_of_pytorch_stay_with_pytorch(tmp_path: Path) -> None:
    """They are pickles too, and begin with a number of their own."""
    stream = io.BytesIO()
    torch.save({"a": torch.ones(2)}, stream, _use_new_zipfile_serialization=False)
    (tmp_path / "old.pth").write_bytes(stream.getvalue())
    assert read_state_dict(tmp_path / "old.pth")["a"].tolist() == [1.0, 1.0]
