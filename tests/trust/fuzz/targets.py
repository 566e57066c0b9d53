"""The parsers that read what nobody vouches for, each as a function of one file in a folder of its own."""

import functools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deeplabzoo.checkpoints.converters import smp, transformers
from deeplabzoo.checkpoints.converters.tensorflow import frozen_graph, tflite, tflite_mobilenetv2
from deeplabzoo.checkpoints.load import read_weights
from deeplabzoo.checkpoints.state_dict import read_state_dict
from deeplabzoo.data.class_file import read_class_file
from deeplabzoo.data.download import extract_folder
from deeplabzoo.hub.manifest import read_manifest
from deeplabzoo.hub.registry import find_weights, list_models, list_weights
from deeplabzoo.models.encoder_table import list_encoders
from deeplabzoo.models.names import parse_name
from deeplabzoo.training.overrides import apply_overrides
from deeplabzoo.training.recipes import get_recipe
from deeplabzoo.training.run_dir import RunDir
from fuzz import seeds
from fuzz.contract import Target


def _tflite(path: Path) -> object:
    _remember_networks()
    return tflite.convert(path) if tflite.can_convert(path) else None


@functools.cache
def _remember_networks() -> None:
    """Build each network that files are compared with once: it takes most of the time, and is the same every time."""
    tflite_mobilenetv2.build_encoder = functools.cache(tflite_mobilenetv2.build_encoder)


def _name(path: Path) -> object:
    text = os.fsdecode(path.read_bytes())
    list_models(text)
    list_weights(text)
    list_encoders(text)
    parsed = parse_name(text)
    if parse_name(str(parsed)) != parsed:
        raise AssertionError(f"{text!r} reads as {parsed}, which reads as {parse_name(str(parsed))}")
    return find_weights(parsed)


def _recipe(path: Path) -> object:
    data = path.read_bytes()
    if data.lstrip()[:1] == b"{":
        recipe = RunDir(path.parent).recipe()
        return recipe and (recipe.digest(), recipe.with_total_steps(100).stage_steps)
    return apply_overrides(get_recipe("shapes"), os.fsdecode(data).splitlines())


def _graph(path: Path) -> object:
    return frozen_graph.convert(path) if frozen_graph.can_convert(path) else None


def _settings(path: Path) -> object:
    subjects = _subjects()
    data = path.read_bytes()
    origin = "smp" if b"encoder_name" in data else "transformers"
    tensors, _ = subjects[origin]
    return {"smp": smp, "transformers": transformers}[origin].convert(tensors, path.with_name("model.safetensors"))


@functools.cache
def _subjects() -> Mapping[str, Any]:
    return seeds.config_subjects()


def _archive(path: Path) -> object:
    target = path.parent / "unpacked"
    try:
        extract_folder(path, "wanted", target, max_bytes=1 << 20)
        if any(one.is_symlink() or not (one.is_file() or one.is_dir()) for one in target.rglob("*")):
            raise AssertionError("a link or a device was made")
    finally:
        shutil.rmtree(target, ignore_errors=True)
    return None


_JSON_WORDS = (b"null", b"NaN", b"Infinity", b"[", b"{", b'"', b"\\ud800", b"1e999", b"../", b"\\u0000")
_TFLITE_WORDS = (b"TFL3", *(number.to_bytes(4, "little") for number in (4, 8, 16, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000)))

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("tflite", _tflite, seeds.tflite_files, _TFLITE_WORDS, "net.tflite"),
        Target(
            "manifest",
            read_manifest,
            seeds.manifests,
            (*_JSON_WORDS, b"kind", b"hub", b"url", b"bundled"),
            "manifest.json",
            is_json=True,
        ),
        Target("names", _name, seeds.names, seeds.name_words(), max_bytes=1 << 12),
        Target("recipes", _recipe, seeds.recipes, seeds.recipe_words(), "recipe.json", is_json=True),
        Target(
            "palettes",
            read_class_file,
            seeds.class_files,
            (b" id=", b" #", b"0,0,0", b"void", b"\n", "²".encode(), "٣".encode()),
            "classes.txt",
        ),
        Target("safetensors", read_weights, seeds.safetensors_files, _JSON_WORDS, "net.safetensors"),
        Target("torch", read_state_dict, seeds.torch_files, (b"c__builtin__\neval\n", b"R.", b"PK\x03\x04"), "net.pth"),
        Target(
            "array_pickle",
            read_state_dict,
            seeds.array_pickles,
            (b"cos\nsystem\n", b"R.", b"\x93", b"\x81", b"\x92", b"("),
            "net.pkl",
        ),
        Target("graphdef", _graph, seeds.graphdefs, (b"\x0a", b"\x12", b"Const", b"Conv2D"), "graph.pb", max_bytes=1 << 20),
        Target("hdf5", read_weights, seeds.hdf5_files, (b"TREE", b"HEAP", b"SNOD", b"OHDR"), "net.h5"),
        Target("settings", _settings, seeds.config_files, _JSON_WORDS, "config.json", is_json=True),
        Target("archives", _archive, seeds.archives, (b"../", b"ustar", b"PK\x01\x02", b"wanted/"), "data.tar", writes=True),
    )
}
