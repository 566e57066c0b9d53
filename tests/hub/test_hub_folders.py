"""Repositories and folders of other libraries: their tensors say too little, so the settings of the same commit come along."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.local_server import LocalServer, local_server
from helpers.parity import random_images, randomised, require_same_logits

import deeplabzoo
from deeplabzoo.errors import WeightsError

PROGRAM = """
import json, sys
import deeplabzoo
from deeplabzoo.errors import DownloadError
from deeplabzoo.log import show_log
show_log()
for address in sys.argv[1:]:
    try:
        net = deeplabzoo.create(address)
        print(json.dumps([net.config.encoder, net.output_stride, net.config.atrous_rates, net.classes]))
    except DownloadError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def smp_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A network of SMP with settings that tensors do not tell, and what its save_pretrained writes."""
    library = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    settings = {"encoder_output_stride": 16, "decoder_atrous_rates": (3, 6, 9), "decoder_channels": 32, "classes": 3}
    net = library.DeepLabV3("tu-resnet10t", encoder_weights=None, **settings)
    folder = tmp_path_factory.mktemp("smp")
    randomised(net).save_pretrained(folder)
    return net, folder


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A fine-tuned MobileNetV2 with classes of its own, saved as once: a pickle of tensors, and its settings."""
    library = pytest.importorskip("transformers")
    torch.manual_seed(0)
    labels = {0: "road", 1: "river"}
    config = library.MobileNetV2Config(depth_multiplier=0.35, output_stride=16, num_labels=2, id2label=labels)
    net = randomised(library.MobileNetV2ForSemanticSegmentation(config))
    folder = tmp_path_factory.mktemp("transformers")
    torch.save(net.state_dict(), folder / "pytorch_model.bin")
    net.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
    return net, folder


def serve(server: LocalServer, repo: str, folder: Path, file: str, *others: str) -> str:
    """Serve the tensors at `main` and the other files at its commit alone, as after a push to the branch."""
    server.serve_hub_file(repo, "main", file, (folder / file).read_bytes())
    commit = hashlib.sha1(b"main").hexdigest()
    for other in others:
        server.serve_hub_file(repo, commit, other, (folder / other).read_bytes())
    return f"hf-hub:{repo}"


def test_a_repository_is_read_with_its_settings(
    smp_folder: tuple[Any, Path], transformers_folder: tuple[Any, Path], tmp_path: Path
) -> None:
    """`create("hf-hub:user/repo")` by the real client; safetensors first, then .bin; what was assumed is said."""
    with local_server() as server:
        addresses = [
            serve(server, "someone/smp", smp_folder[1], "model.safetensors", "config.json"),
            serve(server, "someone/alone", smp_folder[1], "model.safetensors"),
            serve(server, "someone/transformers", transformers_folder[1], "pytorch_model.bin", "config.json"),
            "hf-hub:someone/empty",
        ]
        environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *addresses]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        fetched = [request.path for request in server.asked("GET")]
    with_settings, alone, fine_tuned, empty = map(json.loads, done.stdout.splitlines())
    unnamed = ["class_0", "class_1", "class_2"]
    assert with_settings == ["resnet10t", 16, [3, 6, 9], unnamed]
    assert alone == ["resnet10t", 8, [12, 24, 36], unnamed]
    assert fine_tuned == ["mobilenetv2_035", 16, [], ["road", "river"]]
    assert (
        empty
        == "hf-hub:someone/empty/model.safetensors cannot be downloaded: the repository has no such file at this revision."
    )
    said = {line.partition(" from ")[2].split(" ")[0]: line for line in done.stderr.splitlines() if " from hf-hub:" in line}
    assert "assumed" not in said["hf-hub:someone/smp"]
    assert "no config.json beside it: output stride 8" in said["hf-hub:someone/alone"]
    commit = hashlib.sha1(b"main").hexdigest()
    assert fetched == [
        "/someone/smp/resolve/main/model.safetensors",
        f"/someone/smp/resolve/{commit}/config.json",
        "/someone/alone/resolve/main/model.safetensors",
        "/someone/transformers/resolve/main/pytorch_model.bin",
        f"/someone/transformers/resolve/{commit}/config.json",
    ]


def test_folders_give_the_logits_of_their_library(
    smp_folder: tuple[Any, Path], transformers_folder: tuple[Any, Path], tmp_path: Path
) -> None:
    """`load(folder)`, as a string or a path, of either library."""
    image_BCHW = random_images(1, (64, 96))
    with torch.inference_mode():
        theirs, folder = smp_folder
        require_same_logits(deeplabzoo.load(str(folder))(image_BCHW), theirs(image_BCHW))
        theirs, folder = transformers_folder
        net = deeplabzoo.load(folder)
        require_same_logits(net.forward_low_resolution(image_BCHW), theirs(image_BCHW).logits)
    assert net.classes == ("road", "river")
    with pytest.raises(WeightsError, match="is a folder"):
        deeplabzoo.load(tmp_path)


def test_commands_take_folders(smp_folder: tuple[Any, Path], tmp_path: Path) -> None:
    """MODEL may be a folder wherever it may be a file."""
    from deeplabzoo.errors import UsageError
    from deeplabzoo.hub.factory import load_named_model

    assert load_named_model(str(smp_folder[1]), None).output_stride == 16
    with pytest.raises(UsageError, match="leave --weights out"):
        load_named_model(str(smp_folder[1]), "coral")
