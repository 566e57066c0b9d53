"""Files that try to run code, to fill the memory or to be taken for something else, byte by byte."""

import io
import json
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import torch

MARK = "was_run"
"""The file that every program in here makes in the folder that it runs in."""
_SYSTEM = b"touch " + MARK.encode()


def _short(text: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text


def programs() -> dict[str, bytes]:
    """Pickles that make `MARK`, by the instruction that calls."""
    name, text = b"cos\nsystem\n", _short(_SYSTEM)
    stacked = _short(b"os") + _short(b"system") + b"\x93"
    python = f"__import__('pathlib').Path({MARK!r}).touch()".encode()
    return {
        "GLOBAL REDUCE": b"\x80\x02" + name + text + b"\x85R.",
        "posix": b"\x80\x02cposix\nsystem\n" + text + b"\x85R.",
        "STACK_GLOBAL REDUCE": b"\x80\x04" + stacked + text + b"\x85R.",
        "INST": b"\x80\x02(" + text + b"ios\nsystem\n.",
        "OBJ": b"\x80\x02(" + name + text + b"o.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n" + _short(_SYSTEM).join((b"(]", b"ae")).replace(b"ae", b"at") + b"\x81.",
        "NEWOBJ_EX": b"\x80\x04csubprocess\nPopen\n)}"
        + _short(b"args")
        + _short(_SYSTEM)
        + b"s"
        + _short(b"shell")
        + b"\x88s\x92.",
        "eval": b"\x80\x02cbuiltins\neval\n" + _short(python) + b"\x85R.",
        "exec in Python 2's words": b"\x80\x02c__builtin__\nexec\n" + _short(python) + b"\x85R.",
        "BUILD": b"\x80\x02ctorch.nn.modules.module\nModule\n)\x81}" + _short(b"__setstate__") + name + b"sb" + text + b"b.",
        "dotted name": b"\x80\x04" + _short(b"torch") + _short(b"serialization.os.system") + b"\x93" + text + b"\x85R.",
        "getattr": b"\x80\x02cbuiltins\ngetattr\n(cos\n__dict__\n" + _short(b"get") + b"tR.",
        "allowed name, then called": b"\x80\x02cbuiltins\ngetattr\n(cposix\nsystem\n"
        + _short(b"__call__")
        + b"tR"
        + text
        + b"\x85R.",
        "extension registry": b"\x80\x02\x82\x01" + text + b"\x85R.",
        "text protocol": b"cos\nsystem\n(S'" + _SYSTEM + b"'\ntR.",
        "after a state dict": pickle.dumps({"a": 1}, 2)[:-1] + b"0" + name + text + b"\x85R.",
        "import of a module": b"\x80\x02cantigravity\nfly\n)R.",
    }


def in_torch_zip(program: bytes, **records: bytes) -> bytes:
    """A file as torch.save writes it, whose pickle is the given one."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in ({"data.pkl": program, "version": b"3\n", "byteorder": b"little"} | records).items():
            archive.writestr(f"archive/{name}", data)
    return file.getvalue()


def in_old_torch_file(program: bytes) -> bytes:
    """The same in the form from before PyTorch 1.6: pickles one after another."""
    head = [pickle.dumps(one, 2) for one in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join(head) + program + pickle.dumps([], 2)


def in_torch_tar(program: bytes, first: str = "PKG") -> bytes:
    """The same in the form from before 0.2, a tar, whose first name makes its first bytes look like a zip file's."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in (
            (first, b""),
            ("storages", program),
            ("tensors", program),
            ("pickle", program),
            ("../../storages", program),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def in_torch_tar_that_begins_as_a_pickle(program: bytes) -> bytes:
    """The same, whose first name is all the pickles that a file from before 1.6 begins with."""
    name = (pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"\x80\x02M\xe9\x03." + 2 * b"\x80\x02}." + b"\x80\x02].").decode(
        "latin-1"
    )
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        for member in (name, "storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(member)
            entry.size = len(program)
            tar.addfile(entry, io.BytesIO(program))
    return file.getvalue()


def nested(inner: bytes, name: str = "archive/data.pkl") -> bytes:
    """A zip with a zip in the place of its pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, inner)
        archive.writestr("archive/version", b"3\n")
    return file.getvalue()


def _storage(numel: int, kind: bytes = b"FloatStorage", key: bytes = b"0", *, old: bool = False) -> bytes:
    return (
        b"("
        + _short(b"storage")
        + b"ctorch\n"
        + kind
        + b"\n"
        + _short(key)
        + _short(b"cpu")
        + _long(numel)
        + (b"N" if old else b"")
        + b"tQ"
    )


def _long(number: int) -> bytes:
    return pickle.dumps(number, 2)[2:-1]


def _tensor(
    numel: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int = 0,
    kind: bytes = b"FloatStorage",
    *,
    old: bool = False,
) -> bytes:
    sides = b"(" + b"".join(map(_long, size)) + b"t(" + b"".join(map(_long, stride)) + b"t"
    made = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + _storage(numel, kind, old=old)
        + _long(offset)
        + sides
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )
    return b"\x80\x02}" + _short(b"a.weight") + made + b"s."


def torch_bombs() -> dict[str, bytes]:
    """Small files of torch's that claim, or unpack to, very much."""
    four = b"\0" * 16
    compressed = io.BytesIO()
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", _tensor(1 << 28, (1 << 28,), (1,)))
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/data/0", bytes(1 << 30))
    copies = (
        b"\x80\x02("
        + b"K\x00" * 60_000
        + b"lq\x00"
        + b"cbuiltins\nset\nq\x01"
        + b"".join(b"h\x01h\x00\x85R" for _ in range(30_000))
        + b"."
    )
    listed = (
        b"\x80\x02]q\x00("
        + b"(K\x00K\x01t" * 30_000
        + b"e0"
        + b"ccollections\nOrderedDict\nq\x010("
        + b"h\x01h\x00\x85R" * 30_000
        + b"t."
    )
    return {
        "stride 0": in_torch_zip(_tensor(4, (1 << 20, 1 << 20), (0, 0)), **{"data/0": four}),
        "stride 0, half precision": in_torch_zip(
            _tensor(8, (1 << 20, 1 << 20), (0, 0), kind=b"HalfStorage"), **{"data/0": four}
        ),
        "storage longer than its record": in_torch_zip(_tensor(1 << 40, (4,), (1,)), **{"data/0": four}),
        "tensor longer than its storage": in_torch_zip(_tensor(4, (1 << 20,), (1,)), **{"data/0": four}),
        "offset outside": in_torch_zip(_tensor(4, (2,), (1,), offset=1 << 40), **{"data/0": four}),
        "negative size": in_torch_zip(_tensor(4, (-4,), (1,)), **{"data/0": four}),
        "negative stride": in_torch_zip(_tensor(4, (2,), (-1,), offset=3), **{"data/0": four}),
        "negative offset": in_torch_zip(_tensor(4, (2,), (1,), offset=-8), **{"data/0": four}),
        "compressed record": compressed.getvalue(),
        "bytearray": in_torch_zip(b"\x80\x02cbuiltins\nbytearray\n" + _long(1 << 36) + b"\x85R."),
        "copies of a set": in_torch_zip(copies),
        "copies of a dictionary": in_torch_zip(listed),
        "memo": in_torch_zip(b"\x80\x02]r\xff\xff\xff\x7f."),
        "old file, long storage": in_old_torch_file(_tensor(1 << 40, (4,), (1,), old=True)),
        "nested lists": in_torch_zip(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
        "nested tuples": in_torch_zip(b"\x80\x02)" + b"\x85" * 200_000 + b"."),
        "many dimensions": in_torch_zip(_tensor(4, (1,) * 60_000, (1,) * 60_000), **{"data/0": four}),
        "counter": in_torch_zip(b"\x80\x02ccollections\nCounter\n" + _short(b"x" * 1000) + b"\x85R."),
        **{f"{name}, in a record called data.PKL": _zip_of({"archive/data.PKL": data}) for name, data in _copies().items()},
        **{
            f"{name}, in the first of two directories": _zip_of({"archive/data.pkl": data}) + in_torch_zip(b"\x80\x02}.")
            for name, data in _copies().items()
        },
        **{name: in_torch_zip(data) for name, data in _copies().items()},
        **{f"{name}, in an old file": in_old_torch_file(data) for name, data in _copies().items()},
    }


def _zip_of(records: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in ({"archive/version": b"3\n", "archive/byteorder": b"little"} | records).items():
            archive.writestr(name, data)
    return file.getvalue()


def _copies() -> dict[str, bytes]:
    """Pickles that copy one long value into many, or hash or compare it without end, by each way that an unpickler has."""
    keys = b"".join(_short(b"%d" % index) + b"N" for index in range(10_000))
    many = b"\x80\x02}(" + keys + b"uq\x000"
    pairs = b"(" + b"K\x00" * 30_000 + b"tq\x000"
    doubled = b"\x80\x02}q\x00K\x01\x85" + b"2\x86" * 100
    colliding = b"".join(_long((2**61 - 1) * index) + b"N" for index in range(20_000))
    return {
        "BUILD on many dictionaries": many + b"ccollections\nOrderedDict\nq\x010(" + b"h\x01)Rh\x00b" * 5_000 + b"t.",
        "BUILD on many counters": many + b"ccollections\nCounter\nq\x010(" + b"h\x01)Rh\x00b" * 5_000 + b"t.",
        "BUILD on many numpy numbers": many + b"cnumpy.core.multiarray\nscalar\nq\x010(" + b"h\x01)Rh\x00b" * 5_000 + b"t.",
        "many torch.Size by REDUCE": b"\x80\x02" + pairs + b"ctorch\nSize\nq\x010(" + b"h\x01h\x00\x85R" * 30_000 + b"t.",
        "many torch.Size by NEWOBJ": b"\x80\x02" + pairs + b"ctorch\nSize\nq\x010(" + b"h\x01h\x00\x85\x81" * 30_000 + b"t.",
        "many tensors of one list": b"\x80\x02" + pairs + b"ctorch\nFloatTensor\nq\x010(" + b"h\x01h\x00\x85R" * 40_000 + b"t.",
        "a codec that takes long": b"\x80\x02c_codecs\nencode\n("
        + _short("\u00e4\u4e00".encode() * 20_000)
        + _short(b"punycode")
        + b"tR.",
        "a key that takes for ever to hash": doubled + b"Ns.",
        "a set that takes for ever to hash": b"\x80\x04\x8fq\x00(K\x01\x85" + b"2\x86" * 100 + b"\x90.",
        "keys that collide": b"\x80\x02}(" + colliding + b"u.",
        "a long key before many": b"\x80\x02}" + _short(b"x" * 1_000_000) + b"}(" + keys.replace(b"N", b"}") + b"us.",
        "dictionaries that hold each other": b"\x80\x02}q\x00("
        + b"".join(_short(b"%d" % index) + b"h\x00" for index in range(5_000))
        + b"u.",
    }


def array_bombs() -> dict[str, bytes]:
    """Small pickles that look like numpy's and copy one long value very often."""
    text = (
        b"\x80\x02" + _short(b"x" * 100_000) + b"q\x000" + b"c_codecs\nencode\nq\x010(" + b"h\x01h\x00\x85R" * 100_000 + b"t."
    )
    pairs = (
        b"\x80\x02]("
        + b"(K\x00K\x01t" * 60_000
        + b"eq\x000"
        + b"ccollections\nOrderedDict\nq\x010("
        + b"h\x01h\x00\x85R" * 60_000
        + b"t."
    )
    lists = b"\x80\x02](" + b"K\x00" * 200_000 + b"eq\x000" + b"cbuiltins\nlist\nq\x010(" + b"h\x01h\x00\x85R" * 200_000 + b"t."
    arrays = {"a": np.zeros(1000, np.float32)}
    return {
        "copies of a text": text,
        "copies of pairs": pairs,
        "copies of a list": lists,
        "the same array a million times": pickle.dumps(dict.fromkeys(range(100000), arrays["a"]), 4),
        "nested lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "nested tuples": b"\x80\x02)" + b"\x85" * 200_000 + b".",
        "a list in itself": b"\x80\x02}X\x01\x00\x00\x00aq\x00]q\x01h\x01as.",
        "a dictionary in itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
        "a dictionary that is its own key": b"\x80\x02}q\x00h\x00K\x01s.",
        "a long number": b"\x80\x02\x8b" + struct.pack("<i", 1 << 20) + b"\xff" * (1 << 20) + b".",
        "digits": b"\x80\x02L" + b"9" * 200_000 + b"L\n.",
        **_copies(),
    }


def safetensors_file(header: object, body: bytes = b"\0" * 24, length: int | None = None) -> bytes:
    """A safetensors file with any header, even one that is text already or no JSON, and any claim of its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def _entry(begin: int, end: int, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def false_headers() -> dict[str, bytes]:
    """Headers that lie, after the attacks in safetensors' own tests."""
    same = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    other = b'"a":{"dtype":"F32","shape":[2000000000],"data_offsets":[0,8000000000]}'
    nested_ = b'{"__metadata__":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001
    return {
        "overlapping": safetensors_file({"a": _entry(0, 8), "b": _entry(4, 12)}, b"\0" * 12),
        "same bytes twice": safetensors_file({"a": _entry(0, 8), "b": _entry(0, 8)}, b"\0" * 8),
        "hole": safetensors_file({"a": _entry(0, 8), "b": _entry(16, 24)}),
        "backwards": safetensors_file({"a": _entry(8, 0)}, b"\0" * 8),
        "negative": safetensors_file({"a": _entry(-8, 0)}, b"\0" * 8),
        "huge offsets": safetensors_file({"a": _entry(0, 1 << 62)}),
        "offsets beyond 64 bits": safetensors_file({"a": _entry(0, 1 << 70)}),
        "sides whose product wraps": safetensors_file({"a": _entry(0, 0, (1 << 32, 1 << 32))}, b""),
        "huge shape": safetensors_file({"a": _entry(0, 8, (1 << 40,))}, b"\0" * 8),
        "many dimensions": safetensors_file({"a": _entry(0, 4, (1,) * 100_000)}, b"\0" * 4),
        "no shape": safetensors_file({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8),
        "unknown type": safetensors_file({"a": _entry(0, 8, (2,), "X32")}, b"\0" * 8),
        "type that networks have not": safetensors_file({"a": _entry(0, 2, (2,), "F8_E4M3")}, b"\0" * 2),
        "shape of text": safetensors_file({"a": _entry(0, 8, "2")}, b"\0" * 8),
        "shape not whole": safetensors_file({"a": _entry(0, 8, (2.0,))}, b"\0" * 8),
        "the same name twice": safetensors_file(b"{" + same + b"," + other + b"}", b"\0" * 8),
        "the same name twice, the other first": safetensors_file(b"{" + other + b"," + same + b"}", b"\0" * 8),
        "the same name twice, spelled in two ways": safetensors_file(
            b"{" + same + b"," + other.replace(b'"a"', b'"\\u0061"') + b"}", b"\0" * 8
        ),
        "metadata twice": safetensors_file(
            b'{"__metadata__":{"format":"pt"},"__metadata__":{"format":"deeplabzoo"},' + same + b"}", b"\0" * 8
        ),
        "metadata of numbers": safetensors_file({"__metadata__": {"a": 1}, "a": _entry(0, 8)}, b"\0" * 8),
        "metadata nested": safetensors_file(nested_),
        "metadata of 20 MB": safetensors_file(b'{"__metadata__":{"a":"' + b"x" * 20_000_000 + b'"}}', b""),
        "entries without number": safetensors_file({"__metadata__": {str(index): "" for index in range(400_000)}}, b""),
        "lists nested": safetensors_file(b"[" * 1_000_000),
        "header not an object": safetensors_file([1]),
        "header of spaces": safetensors_file(b" " * 64),
        "header longer than the file": safetensors_file({}, b"", 1 << 62),
        "header of no length": safetensors_file({}, b"", 0),
        "header not UTF-8": safetensors_file(b'{"\xff":1}'),
        "trailing bytes": safetensors_file({"a": _entry(0, 8)}, b"\0" * 4096),
        "name with a null": safetensors_file({"a\0b": _entry(0, 8)}, b"\0" * 8),
        "name that writes on the terminal": safetensors_file({"\x1b]0;owned\x07": _entry(0, 8)}, b"\0" * 8),
        "only the length": struct.pack("<Q", 8),
        "seven bytes": b"\0" * 7,
    }


def non_finite(value: float) -> dict[str, torch.Tensor]:
    """Tensors of which one has one value that is no number."""
    tensors = {"head.classifier.weight": torch.zeros(2, 3, 1, 1), "head.classifier.bias": torch.zeros(2)}
    tensors["head.classifier.weight"][1, 2] = value
    return tensors
