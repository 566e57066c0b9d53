"""Frozen graphs of TensorFlow's DeepLab zoo, against its networks written out here (tf_reference.py)."""

from pathlib import Path

import pytest
import torch
from parity import pictures, require_same_logits
from tf_reference import Network

import deeplabzoo

XCEPTION = {"encoder": "xception65", "decoder": True}


def written(network: Network, path: Path, height: int, width: int) -> Path:
    """Write the graph that TensorFlow exports for one size, its norms holding the statistics of a few pictures."""
    network(pictures(4, 96).clamp(-1, 1))
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
def test_logits_are_those_of_the_documented_network(network: Network, tmp_path: Path) -> None:
    """At an even and an odd size."""
    ours = deeplabzoo.load(written(network, tmp_path / "graph.pb", 97, 129))
    for height, width in ((96, 64), (97, 129)):
        image = pictures(1, (height, width)).clamp(-1, 1)
        with torch.inference_mode():
            found, expected = ours(image), network(image)
        if network.num_classes == 151:
            expected = expected[:, 1:]
        require_same_logits(found, expected)
