"""Frozen graphs of TensorFlow's DeepLab zoo, against its networks written out here (tf_reference.py)."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import graphdef_writer as write
from helpers.parity import random_images, require_same_logits
from helpers.tf_reference import Network

import deeplabzoo
from deeplabzoo.checkpoints.converters.tensorflow import frozen_graph, graphdef
from deeplabzoo.errors import WeightsError
from deeplabzoo.hub.manifest import WeightRow, released
from deeplabzoo.models.deeplab import DeepLab

ROWS = [row for row in released() if row.origin == "tf_zoo"]
HEAD = ("aspp0", "image_pooling", "concat_projection", "logits/semantic")
XCEPTION = {"encoder": "xception65", "decoder": True}


def written(network: Network, path: Path, height: int, width: int) -> Path:
    """Write the graph that TensorFlow exports for one size, its norms holding the statistics of a few pictures."""
    network(random_images(4, 96).clamp(-1, 1))
    network(torch.zeros(1, 3, height, width))
    path.write_bytes(network.graph())
    return path


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(Network(), id="mobilenetv2"),
        pytest.param(Network(width=0.5, output_stride=16), id="mobilenetv2-half"),
        pytest.param(
            Network(decoder=True, output_stride=16, separable=False, num_classes=151, old=False), id="mobilenetv2-decoder"
        ),
        pytest.param(Network(**XCEPTION, rates=(12, 24, 36)), id="xception65", marks=pytest.mark.slow),
        pytest.param(Network(**XCEPTION, rates=(6, 12, 18), output_stride=16, old=False), id="xception65-16"),
    ],
)
def test_logits_are_those_of_the_documented_model(network: Network, tmp_path: Path) -> None:
    """At an even and an odd size."""
    ours = deeplabzoo.load(written(network, tmp_path / "graph.pb", 97, 129))
    for height, width in ((96, 64), (97, 129)):
        image = random_images(1, (height, width)).clamp(-1, 1)
        with torch.inference_mode():
            found, expected = ours(image), network(image)
        if network.num_classes == 151:
            expected = expected[:, 1:]
        require_same_logits(found, expected)


def heavy(row: WeightRow) -> bool:
    return row.config.encoder == "xception65" and row.tag != "tf_trainaug"


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=pytest.mark.slow) if heavy(row) else row for row in ROWS],
    ids=lambda row: row.full_name,
)
def test_manifest_rows_match_their_converter(row: WeightRow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their graphs, exported for the size that the row gives, with weights that cost nothing to make."""
    config = row.config
    network = Network(
        encoder="xception65" if config.encoder == "xception65" else "mobilenetv2",
        width=0.5 if config.encoder == "mobilenetv2_050" else 1.0,
        num_classes=151 if config.num_classes == 150 else config.num_classes,
        rates=(12, 24, 36) if config.atrous_rates is None else (),
        decoder=config.architecture == "deeplabv3plus",
        meta=True,
    )
    network(torch.empty(1, 3, *row.preprocessing.size, device="meta"))
    write.archive(tmp_path / "row.tar.gz", network.graph())
    monkeypatch.setattr(graphdef, "_SPARE_VALUES", 1 << 28)
    converted = frozen_graph.convert(tmp_path / "row.tar.gz")
    assert (converted.config, converted.preprocessing) == (config, row.preprocessing)
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in DeepLab(config).state_dict().items()}
    assert {name: tensor.shape for name, tensor in converted.state_dict.items()} == expected


@pytest.fixture(scope="module")
def small() -> Network:
    """The smallest network, its graph made."""
    network = Network(width=0.5, num_classes=2, meta=True)
    network(torch.empty(1, 3, 65, 65, device="meta"))
    return network


def converted(graph: bytes, folder: Path) -> None:
    (folder / "graph.pb").write_bytes(graph)
    assert frozen_graph.can_convert(folder / "graph.pb")
    frozen_graph.convert(folder / "graph.pb")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("MobilenetV2/", "MobilenetV3/", "MobileNetV3's head"),
        ("MobilenetV2/", "MobilenetEdgeTPU/", "MobileNet EdgeTPU"),
        ("image_pooling/", "branch0/", "dense prediction cell"),
        ("logits/semantic/", "logits/other/", "no segmentation model"),
    ],
)
def test_other_models_are_refused_in_a_sentence(old: str, new: str, sentence: str, tmp_path: Path) -> None:
    """With the reason: MobileNetV3, EdgeTPU and dense prediction cells are other networks."""
    network = Network(width=0.5, num_classes=2, meta=True)
    network.rename = (old, new)
    network(torch.empty(1, 3, 65, 65, device="meta"))
    with pytest.raises(WeightsError, match=sentence):
        converted(network.graph(), tmp_path)


def test_steps_that_are_not_the_models_are_refused(small: Network, tmp_path: Path) -> None:
    """What the graph says counts: a stride, rate or concatenation that no network of the zoo has is not read over."""
    for name, attributes, sentence in (
        (
            "MobilenetV2/Conv/Conv2D",
            {"strides": (1, 1, 1, 1), "padding": "SAME"},
            "strides of the graph's encoder multiply to 4",
        ),
        ("MobilenetV2/Conv/Conv2D", {"strides": (1, 2, 2, 1), "padding": "VALID"}, "padded in a way"),
        ("aspp0/Conv2D", {"strides": (1, 2, 2, 1), "padding": "SAME"}, "runs at stride 2"),
        ("aspp0/Conv2D", {"strides": (1, 2, 1, 1), "padding": "SAME"}, "expected the same for height and width"),
    ):
        scope = name.rpartition("/")[0]
        source = {"aspp0": "MobilenetV2/expanded_conv_16/project/BatchNorm/FusedBatchNorm"}.get(scope, "sub")
        nodes = {**small.nodes, name: write.node(name, "Conv2D", (source, f"{scope}/weights/read"), **attributes)}
        with pytest.raises(WeightsError, match=sentence):
            converted(b"".join(nodes.values()), tmp_path)


def test_a_damaged_graph_is_refused_in_a_sentence(small: Network, tmp_path: Path) -> None:
    """Cut short or with flipped bytes: no other error, no hang, no memory beyond the file's own size."""
    graph = small.graph()
    for cut in (*range(200, 4000, 331), len(graph) // 2, len(graph) - 3):
        with pytest.raises(WeightsError):
            converted(graph[:cut], tmp_path)
    random = np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(graph)
        for at in random.integers(100, len(graph), 40):
            changed[at] = random.integers(256)
        with contextlib.suppress(WeightsError):
            converted(bytes(changed), tmp_path)


def test_hostile_graphs_cost_nothing(tmp_path: Path) -> None:
    """A few bytes that claim gigabytes, circles of identities, and millions of empty fields."""
    huge = write.message(2, write.message(2, write.number_field(1, 1 << 30)) * 1)
    claim = write.number_field(1, 1) + huge + write.message(5, b"\0\0\0\0")
    consts = [
        write.node(name, "Const", value=claim) for name in ("MobilenetV2/Conv/weights", *(f"{one}/weights" for one in HEAD))
    ]
    circle = write.node("a", "Identity", ["b"]) + write.node("b", "Identity", ["a"])
    for graph, sentence in (
        (b"".join(consts), "grow far beyond"),
        (circle * 2, "two nodes"),
        (write.node("a", "NoOp") + b"\x20\x01" * 1_100_000, "more than 1000000 fields"),
        (write.node("a", "NoOp") + b"\x0a\xff\xff\xff\xff\x7f", "longer than what is left"),
    ):
        with pytest.raises(WeightsError, match=sentence):
            converted(graph, tmp_path)


def test_archives_are_read_in_memory(small: Network, tmp_path: Path) -> None:
    """Wherever the names in them lead; without a graph, or cut short, they are refused."""
    outside = write.archive(tmp_path / "zoo.tar.gz", small.graph(), name="../../outside/frozen_inference_graph.pb")
    assert deeplabzoo.load(outside).num_classes == 2
    assert sorted(one.name for one in tmp_path.iterdir()) == ["zoo.tar.gz"]
    (tmp_path / "cut.tar.gz").write_bytes(outside.read_bytes()[:3000])
    with pytest.raises(WeightsError, match="damaged archive, or ends too early"):
        deeplabzoo.load(tmp_path / "cut.tar.gz")
    write.archive(tmp_path / "ckpt.tar.gz", b"", name="deeplabv3/model.ckpt.index")
    with pytest.raises(WeightsError, match=r"holds no frozen_inference_graph\.pb"):
        deeplabzoo.load(tmp_path / "ckpt.tar.gz")


def test_other_files_are_not_taken_for_graphs(tmp_path: Path) -> None:
    for data in (b"", b"\x0a", b"\x0a\x02\x0a\x00", b"\x0a\x00\x00\x00\x00\x00\x00\x00{}", b"\x1f\x8b", b"PK\x03\x04"):
        (tmp_path / "file").write_bytes(data)
        assert not frozen_graph.can_convert(tmp_path / "file")
