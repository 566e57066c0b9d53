"""Weights files that want to run code, to fill the memory or to be taken for something else end in one sentence."""

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import attacks
import numpy as np
import pytest
import torch
from fuzz.contract import Target, limited_memory, the_watch
from fuzz.seeds import archived, graphdefs
from fuzz.targets import TARGETS
from safetensors.torch import save_file

import deeplabzoo
from deeplabzoo.checkpoints.converters.key_mapping import read_config_json
from deeplabzoo.checkpoints.load import read_weights
from deeplabzoo.checkpoints.state_dict import read_state_dict
from deeplabzoo.errors import WeightsError

PROGRAMS = attacks.programs()
WRAPPED: Mapping[str, Callable[[bytes], bytes]] = {
    "as it is": bytes,
    "in a zip": attacks.in_torch_zip,
    "in an old file": attacks.in_old_torch_file,
    "in a zip in a zip": lambda program: attacks.nested(attacks.in_torch_zip(program)),
    "in a tar": attacks.in_torch_tar,
    "in a tar that begins as a pickle": attacks.in_torch_tar_that_begins_as_a_pickle,
}


ATTACKS: Mapping[str, Callable[[], Mapping[str, bytes]]] = {
    "torch": attacks.torch_bombs,
    "array_pickle": attacks.array_bombs,
    "safetensors": attacks.false_headers,
}
Outcomes = Mapping[str, Mapping[str, tuple[str, str]]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What came of each file, read while this process may take no more memory than four times what is stated."""
    return {name: _outcomes(TARGETS[name], make(), tmp_path_factory.mktemp(name)) for name, make in ATTACKS.items()}


def _outcomes(target: Target, files: Mapping[str, bytes], folder: Path) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    the_watch().run(target, target.seeds()[0], folder)  # what is imported and cached once is no attack's doing
    with limited_memory(4 * target.mebibytes):
        for name, data in files.items():
            wrong = the_watch().run(target, data, folder)
            said = the_watch().outcome
            kind = "broken" if wrong else "read" if said is None else "refused"
            found[name] = kind, wrong.what if wrong else str(said)
    return found


def broken(found: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    return {name: text for name, (kind, text) in found.items() if kind == "broken"}


def read(found: Mapping[str, tuple[str, str]]) -> set[str]:
    return {name for name, (kind, _) in found.items() if kind == "read"}


@pytest.mark.parametrize(
    "suffix", [".pkl", ".pth", ".bin", ".h5", ".npy", ".npz", ".tar", ".ckpt", ".safetensors", ".pb", ".tflite"]
)
def test_no_program_is_run_whatever_it_is_wrapped_in_and_called(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seventeen programs by all the instructions that call, in six wrappings: refused, and nothing has happened."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"net{suffix}"
    for wrapped in WRAPPED.values():
        for program in PROGRAMS.values():
            path.write_bytes(wrapped(program))
            with pytest.raises(WeightsError) as caught:
                deeplabzoo.load(path)
            assert str(caught.value).isprintable()
            assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_the_programs_would_run_if_they_were_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else refusing them would show nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("GLOBAL REDUCE", "STACK_GLOBAL REDUCE", "INST", "OBJ", "eval", "text protocol", "posix"):
        pickle.loads(PROGRAMS[name])
        (tmp_path / attacks.MARK).unlink()


def test_small_files_of_pytorch_take_little_memory_and_time(outcomes: Outcomes) -> None:
    """Strides of 0, long storages, compressed records, byte arrays of 64 GB, copies of copies: 256 MiB and seconds at most."""
    assert not broken(outcomes["torch"])
    assert not read(outcomes["torch"]), "none of them holds a state dict"


def test_small_pickles_of_arrays_take_little_memory_and_time(outcomes: Outcomes) -> None:
    """A text or a list that is copied a hundred thousand times, and one array under a hundred thousand names."""
    assert not broken(outcomes["array_pickle"])
    assert not read(outcomes["array_pickle"])


def test_false_headers_end_in_a_sentence(outcomes: Outcomes) -> None:
    """Overlaps, holes, offsets beyond the file, names twice, metadata of megabytes: as in safetensors' own tests.

    One of the types is float8, which torch has, so it is read.
    """
    assert not broken(outcomes["safetensors"])
    readable = {"name that writes on the terminal", "name with a null", "type that networks have not"}
    assert read(outcomes["safetensors"]) == readable


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pkl"])
def test_weights_that_are_no_numbers_are_refused(value: float, suffix: str, tmp_path: Path) -> None:
    """A network of NaN labels every pixel 0 without a word."""
    path, tensors = tmp_path / f"net{suffix}", attacks.non_finite(value)
    if suffix == ".safetensors":
        save_file(tensors, path)
    elif suffix == ".pth":
        torch.save(tensors, path)
    else:
        path.write_bytes(pickle.dumps({name: tensor.numpy() for name, tensor in tensors.items()}, 4))
    with pytest.raises(WeightsError, match=r"'head.classifier.weight' .* not finite"):
        read_weights(path)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, device="meta"),
    ],
    ids=["sparse", "complex", "without values"],
)
def test_tensors_of_another_nature_are_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    """By name, and not by whatever an operation on them would raise later."""
    path = tmp_path / "net.pth"
    torch.save({"a.weight": tensor}, path)
    with pytest.raises(WeightsError):
        read_state_dict(path)


@pytest.mark.parametrize(
    "names", [{1: np.zeros(2)}, {(1, 2): np.zeros(2)}, {None: np.zeros(2)}], ids=["number", "tuple", "None"]
)
def test_tensors_without_names_are_refused(names: dict[object, np.ndarray], tmp_path: Path) -> None:
    """A state dict has words for keys."""
    path = tmp_path / "net.pkl"
    path.write_bytes(pickle.dumps(names, 4))
    with pytest.raises(WeightsError, match="no plain tensor with a name"):
        read_state_dict(path)


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/dev/urandom"])
def test_what_has_no_end_is_not_read(kind: str, tmp_path: Path) -> None:
    """A pipe or a device in the place of weights, and of the settings beside them."""
    path = tmp_path / "net.pth"
    (tmp_path / "folder").mkdir()
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "folder" / "pytorch_model.bin")
    for place in (path, tmp_path / "folder" / "config.json"):
        if kind == "pipe":
            os.mkfifo(place)
        else:
            place.symlink_to(kind)
    with pytest.raises(WeightsError, match="a device or a pipe"):
        deeplabzoo.load(path)
    assert read_config_json(tmp_path / "folder" / "pytorch_model.bin") == {}


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_numpys_own_files_are_no_state_dicts(suffix: str, tmp_path: Path) -> None:
    """With an object in them numpy would unpickle it."""
    path = tmp_path / f"net{suffix}"
    objects = np.array([{"a": 1}], dtype=object)
    np.save(path, objects) if suffix == ".npy" else np.savez(path, objects)
    with pytest.raises(WeightsError):
        read_weights(path)


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33])
def test_files_of_a_few_bytes_end_in_a_sentence(count: int, tmp_path: Path) -> None:
    """Of zeros, of ones, and the beginnings of every format."""
    target = TARGETS["safetensors"]
    for begin in (
        b"",
        b"PK\x03\x04",
        b"\x80\x02",
        b"\x80\x04",
        b"\x89HDF\r\n\x1a\n",
        b"\0\0\0\0TFL3",
        b"\x1f\x8b",
        b"\x0a",
        b"\xff" * 8,
    ):
        assert the_watch().run(target, (begin + b"\0" * count)[: max(count, len(begin))], tmp_path) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "../../frozen_inference_graph.pb"},
        {"name": "/etc/frozen_inference_graph.pb"},
        {"type": b"2", "linkname": "/etc/passwd"},
    ],
    ids=["upwards", "absolute", "link"],
)
def test_the_names_in_an_archive_of_tensorflow_lead_nowhere(fields: dict[str, object], tmp_path: Path) -> None:
    """It is read in memory: a graph is found by its name alone, and a link is none."""
    assert the_watch().run(TARGETS["graphdef"], archived(graphdefs()[0], **fields), tmp_path) is None
