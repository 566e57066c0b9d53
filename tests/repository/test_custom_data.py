"""docs/custom_data.md: its five commands, word for word but for the size of the training, on generated pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.documents import blocks, make_desk, run_block
from PIL import Image

import deeplabzoo
from deeplabzoo.data.datasets.synthetic_shapes import SyntheticShapes

SMALLER = {
    "model=deeplabv3plus_mobilenetv2 epochs=40": "model=deeplabv3plus_lcnet_050 epochs=2 batch=2 augmentation.crop=65 "
    "evaluations=1 workers=0 log_every=1"
}
"""What the document trains for an hour, the test trains for a second."""


def write_folder(root: Path) -> None:
    """Write three splits of discs on a ground, with masks of 0 and 255."""
    for split, pictures in (("train", 6), ("val", 2), ("test", 2)):
        data = SyntheticShapes("train" if split == "train" else "val", (70, 60), pictures, classes=2)
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for index in range(pictures):
            sample = data[index]
            Image.fromarray(sample.image).save(root / split / "images" / f"{split}{index}.jpg", quality=95)
            Image.fromarray((sample.labels == 1).astype(np.uint8) * 255).save(root / split / "masks" / f"{split}{index}.png")
    (root / "classes.txt").write_text("background\ndisc\n")


@pytest.mark.slow
def test_five_commands_lead_from_masks_to_a_model(tmp_path: Path) -> None:
    """Look, train, measure, look again, publish; the released file is the model that was trained."""
    desk = make_desk(tmp_path / "desk")
    write_folder(desk / "my_data")
    commands = [block for block in blocks() if block.document == "docs/custom_data.md" and block.mark == "own"]
    assert len(commands) == 5
    logged = []
    for block in commands:
        code = block.code
        for words, fewer in SMALLER.items():
            code = code.replace(words, fewer)
        logged.append(run_block(code, "bash", desk, tmp_path / "cache"))
    assert sum(block.code.count(words) for block in commands for words in SMALLER) == 1  # the replaced words stand there
    assert "train: 6 images of 60 x 70 pixels" in logged[0]
    report = json.loads((desk / "report.json").read_text())
    assert set(report["per_class"]) == {"background", "disc"}
    assert sorted(path.name for path in (desk / "predictions").glob("*_overlay.png")) == [
        "val0_overlay.png",
        "val1_overlay.png",
    ]
    (released,) = (path for path in (desk / "runs/mine/release").glob("*.safetensors") if "golden" not in path.name)
    net = deeplabzoo.load(released)
    assert net.classes == ("background", "disc")
    card = (desk / "runs/mine/release/README.md").read_text()
    assert f"{100 * report['miou']:.1f}" in card or "mIoU" in card
    assert "our own images" in card


@pytest.mark.slow
def test_the_bundled_weights_can_be_the_start(tmp_path: Path) -> None:
    """`init=deeplabv3plus_mobilenetv2_voc` needs no download, as the document says."""
    desk = make_desk(tmp_path / "desk")
    write_folder(desk / "my_data")
    settings = "init=deeplabv3plus_mobilenetv2_voc steps=1 batch=2 augmentation.crop=65 evaluations=1 workers=0"
    logged = run_block(f"python -m deeplabzoo.train folder --data my_data --out run --set {settings}", "bash", desk, tmp_path)
    assert "deeplabv3plus_mobilenetv2_voc" in logged
