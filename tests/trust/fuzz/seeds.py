"""Inputs that fuzzing begins with: small files of every kind that a parser reads, made by this package and the tests."""

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from helpers.tf_reference import Network
from helpers.tflite_writer import Dialect, write_classifier, write_deeplab
from safetensors.torch import save

from deeplabzoo.checkpoints.converters import smp, transformers
from deeplabzoo.checkpoints.native import save_checkpoint
from deeplabzoo.hub.manifest import released, weights_folder
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.encoder_table import ALIASES
from deeplabzoo.training.recipes import RECIPES

_ONE_CHANNEL = dict.fromkeys((-1, *range(7)), 1)
"""The narrowest network whose blocks are those of a MobileNetV2."""
_TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2), "steps": torch.tensor(3)}


def tflite_files() -> list[bytes]:
    """DeepLabs and a classifier of one channel a layer, in every dialect that converters write."""
    mobile = {"encoder": "mobilenetv2_035", "num_classes": 2, "head_channels": 1, "pooling_first": True, "refine_conv": False}
    net = _mobile(**mobile, atrous_rates=(), align_corners=True, encoder_padding="same")
    atrous = _mobile(**{**mobile, "refine_conv": True}, atrous_rates=(1, 2), output_stride=8, aspp_separable=True)
    found = [write_deeplab(net, 33, 33, Dialect(narrow=_ONE_CHANNEL, **dialect)) for dialect in _dialects()]
    return [
        *found,
        write_deeplab(atrous, 33, 33, Dialect(narrow=_ONE_CHANNEL, batches_around_dilation=True)),
        *(write_classifier(net.encoder, 33, 2, fully_connected=full) for full in (False, True)),
    ]


def _dialects() -> list[dict[str, Any]]:
    return [
        {},
        {"weights": "float16", "argmax": False},
        {"weights": "hybrid", "upsample": False},
        {"explicit_padding": True, "pool_by_mean": True},
        {"separate_steps": True, "scaling_in_graph": True},
        {"labels": ("background", "person")},
    ]


def _mobile(**fields: Any) -> DeepLab:
    torch.manual_seed(0)
    return DeepLab(DeepLabConfig(architecture="deeplabv3", **fields)).eval()


def manifests() -> list[bytes]:
    """Manifests of one released row each, one of every kind of source, and one of two rows."""
    rows = json.loads((weights_folder() / "manifest.json").read_text(encoding="utf-8"))["rows"]
    kinds = {row["source"]["kind"]: {**row, "default": True} for row in rows}
    trained = next(row for row in rows if row.get("training"))
    chosen = [*kinds.values(), {**trained, "default": True}]
    return [json.dumps({"schema": 1, "rows": each}).encode() for each in ([], *([row] for row in chosen), chosen[:2])]


def names() -> list[bytes]:
    """Names of models and weights, right ones and nearly right ones, patterns and addresses."""
    texts = [
        "*",
        "deeplabv3*_[a-m]?t50",
        "deeplabv3_resnet5O",
        "deeplabv3plus_mobilenetv3_voc.nosuch",
        "hf-hub:owner/name@main",
        "",
        "_",
        ".",
        "[!]",
    ]
    texts += [
        "deeplabv3_tf_efficientnetv2_s",
        "deeplabv3plus_resnet50_vox",
        "deeplabv4_resnet50",
        "deeplabv3_resnet50.",
        "deeplabv3__voc",
    ]
    return [text.encode() for text in (*texts, *(row.full_name for row in list(released())[::8]))]


def name_words() -> tuple[bytes, ...]:
    """What names are made of."""
    return tuple(
        word.encode()
        for word in ("deeplabv3", "deeplabv3plus", "_", ".", "voc", "cityscapes", "*", "?", "[", *list(ALIASES)[::4])
    )


def recipes() -> list[bytes]:
    """Recipe files, and lines of `--set` arguments."""
    files = [json.dumps(function().to_dict()).encode() for function in list(RECIPES.values())[::3]]
    lines = [
        "lr=0.01",
        "augmentation.crop=321,321\nloss=ce:1,lovasz:0.5",
        'stages=[{"share": 1, "lr": 0.1}]\nstages.0.lr=1e-3',
        "steps=10\nepochs=2.5",
        "model=deeplabv3_resnet18",
        "teacher=none",
        "network.atrous_rates=[6,12,18]",
        "batch=16.0",
        "amp=bf16",
        "milestones=(1,2)",
        "classes=a,b",
    ]
    return [*files, *(line.encode() for line in lines)]


def recipe_words() -> tuple[bytes, ...]:
    """Fields and values of recipes."""
    first = next(iter(RECIPES.values()))().to_dict()
    fields = (
        *first,
        *(f"augmentation.{one}" for one in first["augmentation"]),
        *(f"network.{one}" for one in first["network"]),
    )
    return tuple(
        word.encode() for word in (*fields, "=", "\n", ".0.", "none", "true", "1e400", "Infinity", "NaN", "[[", "ce:1,", "²")
    )


def class_files() -> list[bytes]:
    """Class lists with names alone, ids, colours of both spellings and void."""
    texts = [
        "background\nperson\n",
        "sky #8080FF\nroad 1,2,3\nvoid #000000\n",
        "a id=3\nb id=7\nignore id=255",
        "\ufeffname with spaces   id=12\n",
        "a #000000\nb 0, 0 ,1",
    ]
    return [
        text.encode() for text in (*texts, "\n".join(f"class {index} id={index}" for index in range(256)), "void\nvoid 1,1,1")
    ]


def safetensors_files() -> list[bytes]:
    """A checkpoint of our own with one tensor left in it, and plain files."""
    return [
        own_checkpoint(),
        save(_TENSORS),
        save(_TENSORS, {"format": "pt"}),
        save({"b": torch.ones(3, dtype=torch.bfloat16)}),
    ]


def own_checkpoint(**changes: str) -> bytes:
    """A file with the metadata of a real checkpoint, of which `changes` are replaced, and two small tensors."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "own.safetensors"
        net = DeepLab(DeepLabConfig(architecture="deeplabv3plus", encoder="mobilenetv2_035", num_classes=2, head_channels=8))
        save_checkpoint(net, path, extra={"trained": "here"})
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return save(_TENSORS, header["__metadata__"] | changes)


def torch_files() -> list[bytes]:
    """Files as torch.save writes them: zips, and pickles from before 1.6."""
    found = []
    for value, modern in (
        (_TENSORS, True),
        (_TENSORS, False),
        ({"state_dict": _TENSORS, "epoch": 3, "best": np.float64(1)}, True),
        ({"model": torch.nn.Linear(1, 1)}, True),
    ):
        file = io.BytesIO()
        torch.save(value, file, _use_new_zipfile_serialization=modern)
        found.append(file.getvalue())
    return found


def array_pickles() -> list[bytes]:
    """Pickles of numpy arrays in every protocol, and one that calls a function."""
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.zeros((), np.int64),
        "c": np.asfortranarray(np.ones((2, 2))),
        "n": 3,
        "t": ("x", [1]),
    }
    calling = b"\x80\x04c" + b"os\nsystem\n(X\x04\x00\x00\x00truetR."
    return [*(pickle.dumps({"model": arrays}, protocol) for protocol in range(2, 6)), calling]


def graphdefs() -> list[bytes]:
    """The smallest graph of TensorFlow's zoo, its weights given as one number each; and the same inside an archive."""
    network = Network(width=0.5, num_classes=2, meta=True)
    network(torch.empty(1, 3, 65, 65, device="meta"))
    graph = network.graph()
    return [graph, archived(graph)]


def archived(graph: bytes, **fields: Any) -> bytes:
    """A `.tar.gz` as the zoo's with the graph in it; `fields` are set on its entry."""
    packed = io.BytesIO()
    with gzip.open(packed, "wb", compresslevel=1) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        entry = tarfile.TarInfo("deeplabv3/frozen_inference_graph.pb")
        entry.size = len(graph)
        for name, value in fields.items():
            setattr(entry, name, value)
        tar.addfile(entry, io.BytesIO(graph))
    return packed.getvalue()


def hdf5_files() -> list[bytes]:
    """Small HDF5 files, plain, chunked and compressed."""
    import h5py

    found = []
    for options in ({}, {"chunks": (2, 2), "compression": "gzip"}):
        file = io.BytesIO()
        with h5py.File(file, "w") as written:
            written.create_dataset("layers/conv2d/vars/0", data=np.ones((2, 2), np.float32), **options)
            written["layers/deep_lab_v3_backbone/layers/spatial_pyramid_pooling/x"] = np.float32(1)
            written["link"] = h5py.SoftLink("/layers")
        found.append(file.getvalue())
    return found


def config_files() -> list[bytes]:
    """The `config.json` of transformers' and SMP's networks, as our exports write them."""
    return [json.dumps(settings).encode() for _, settings in config_subjects().values()]


def config_subjects() -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Tensors and settings of one network of each library that keeps settings beside its tensors."""
    mobile = DeepLabConfig(
        architecture="deeplabv3",
        encoder="mobilenetv2_100",
        num_classes=2,
        output_stride=8,
        atrous_rates=(),
        pooling_first=True,
        refine_conv=False,
        align_corners=True,
        encoder_padding="same",
        encoder_norm_eps=1e-3,
    )
    plus = DeepLabConfig(
        architecture="deeplabv3plus",
        encoder="resnet18",
        num_classes=2,
        decoder_refine_conv=True,
        decoder_convs=1,
        align_corners=True,
        atrous_rates=(12, 24, 36),
        depthwise_norm=False,
        encoder_dilate_strided=True,
        dropout=0.5,
    )
    found = {}
    for name, config, origin in (("transformers", mobile, transformers), ("smp", plus, smp)):
        with torch.device("meta"):
            net = DeepLab(config)
        exported = origin.export(net)
        found[name] = (dict(exported.state_dict), dict(exported.settings["config.json"]))
    return found


def archives() -> list[bytes]:
    """Tar and zip files with a wanted folder, another one, and links."""
    found = []
    for mode in ("w", "w:gz", "w:bz2", "w:xz"):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode=mode, format=tarfile.PAX_FORMAT if mode == "w" else tarfile.GNU_FORMAT) as tar:
            for name in ("wanted/a.txt", "wanted/" + "deep/" * 30 + "b.txt", "other/c.txt"):
                entry = tarfile.TarInfo(name)
                entry.size = 5
                tar.addfile(entry, io.BytesIO(b"hello"))
        found.append(file.getvalue())
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("wanted/a.txt", "hello" * 10)
        archive.writestr("other/b.txt", "hello")
    return [*found, zipped.getvalue()]
