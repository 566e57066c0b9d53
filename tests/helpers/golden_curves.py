"""The first 20 losses of every recipe at toy size, kept in tests/golden/losses.json.

`PYTHONPATH=tests python tests/helpers/golden_curves.py` writes them.

Toy size keeps what a recipe decides (losses, rates, freezing, averages, augmentation, stages) and shrinks what costs: a tiny
encoder, untrained, on generated shapes. In float64 and without dropout, whose random numbers differ from one torch to the next:
so 20 steps stay comparable between CPUs, and between all versions of torch that are supported.
"""

import dataclasses
import functools
import json
from dataclasses import replace
from pathlib import Path

import torch

from deeplabzoo.data.datasets.synthetic_shapes import SyntheticShapes
from deeplabzoo.training.dataloader import Splits
from deeplabzoo.training.distributed import DistributedContext
from deeplabzoo.training.initialization import build_model
from deeplabzoo.training.recipe import Recipe
from deeplabzoo.training.recipes import RECIPES
from deeplabzoo.training.trainer import Trainer

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "losses.json"
STEPS = 20
_CROP = (65, 65)


def toy(recipe: Recipe) -> Recipe:
    """Return the recipe at toy size."""
    encoder = "resnet10t" if recipe.network.multi_grid else "lcnet_050"
    small = dataclasses.replace(
        recipe.network, head_channels=16, decoder_channels=16, decoder_low_level_channels=8, dropout=0.0
    )
    return replace(
        recipe,
        model=f"{recipe.model.split('_')[0]}_{encoder}",
        data="shapes",
        init=None,
        teacher=None,
        encoder_init=False,
        classes=None,
        class_weights=recipe.class_weights if isinstance(recipe.class_weights, str) else "inverse_sqrt",
        network=replace(small, multi_grid=recipe.network.multi_grid and (1,)),
        steps=STEPS,
        epochs=None,
        batch=4,
        workers=0,
        recalibrate_norms=min(recipe.recalibrate_norms, 4),
        warmup_steps=min(recipe.warmup_steps, 5),
        stages=tuple(replace(stage, crop=_CROP) for stage in recipe.stages),
        augmentation=replace(recipe.augmentation, crop=_CROP),
        device="cpu",
    )


def curve(recipe: Recipe) -> list[float]:
    """Return the losses of the first 20 steps of the recipe at toy size; recipes that are one at toy size are run once."""
    return _curve(replace(toy(recipe), name="toy"))


@functools.cache
def _curve(recipe: Recipe) -> list[float]:
    data = Splits(SyntheticShapes("train", _CROP, 12), SyntheticShapes("val", _CROP, 2), None, None)
    net = build_model(recipe, data.train).double()
    net.encoder.register_forward_pre_hook(lambda module, inputs: tuple(one.double() for one in inputs))
    trainer = Trainer(recipe, data, net, DistributedContext(0, 1, torch.device("cpu")), None)
    return [trainer.train_step(batch).loss for batch in trainer.batches()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    curves = {name: [float(f"{loss:.7g}") for loss in curve(function())] for name, function in RECIPES.items()}
    rows = ",\n".join(f'"{name}": {json.dumps(losses)}' for name, losses in curves.items())
    GOLDEN.write_text("{\n" + rows + "\n}\n")
