"""Initial weights: transfer loses nothing that both models have, and changes nothing that should stay."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from deeplabzoo.data.datasets.synthetic_shapes import SyntheticShapes
from deeplabzoo.data.transforms import Augmentation, normalize_images
from deeplabzoo.errors import WeightsError
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.training.dataloader import Batch, BatchDataset
from deeplabzoo.training.initialization import (
    build_model,
    estimate_batch_norm_stats,
    has_folded_batch_norms,
    recalibrate_batch_norm,
    transfer_weights,
)
from deeplabzoo.training.optim import BATCH_NORM_TYPES, freeze, train_mode
from deeplabzoo.training.recipe import Recipe

POOLED = DeepLabConfig(
    architecture="deeplabv3",
    encoder="mobilenetv2_050",
    num_classes=4,
    atrous_rates=(),
    refine_conv=False,
    align_corners=True,
    pooling_first=True,
    head_channels=32,
)
PLUS = dataclasses.replace(POOLED, architecture="deeplabv3plus", atrous_rates=(3, 6, 9), decoder_channels=40)


def _randomized_model(config: DeepLabConfig, seed: int = 0) -> DeepLab:
    """A model whose batch norms have random statistics, scales and shifts."""
    torch.manual_seed(seed)
    net = DeepLab(config, classes=tuple(f"c{index}" for index in range(max(2, config.num_classes)))).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                nn.init.normal_(tensor, std=0.2)  # type: ignore[arg-type]
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]
    nn.init.normal_(net.head.classifier.weight, std=0.3)
    nn.init.normal_(net.head.classifier.bias)
    return net


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("low_level_first", [True, False])
def test_a_v3plus_starts_with_the_output_of_its_v3(separable: bool, low_level_first: bool) -> None:
    """The mobile V3 (1x1 and pooling only) becomes a V3+ with atrous branches and decoder without moving a logit."""
    source = _randomized_model(POOLED)
    target = _randomized_model(
        dataclasses.replace(PLUS, decoder_separable=separable, decoder_low_level_first=low_level_first), seed=1
    )
    image = torch.randn(2, 3, 129, 97)
    before = target(image)
    assert "without changing the output" in transfer_weights(source, target)
    torch.testing.assert_close(target(image), source(image), atol=2e-4, rtol=1e-4)
    assert (before - source(image)).abs().max() > 0.1


def test_the_new_parts_learn() -> None:
    """After two updates the atrous branches, the decoder and the low-level path all have moved: nothing is stuck at zero."""
    target = _randomized_model(PLUS, seed=1)
    transfer_weights(_randomized_model(POOLED), target)
    before = {name: parameter.detach().clone() for name, parameter in target.named_parameters()}
    optimizer = torch.optim.SGD(target.parameters(), lr=0.1)
    target.train()
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(target(torch.randn(2, 3, 65, 65)), torch.randint(0, 4, (2, 65, 65)))  # type: ignore[arg-type]
        loss.backward()
        optimizer.step()
    still = [name for name, parameter in target.named_parameters() if torch.equal(parameter, before[name])]
    assert still == []


def test_classes_keep_their_rows_by_name() -> None:
    """From 4 classes to 3: those of the same name keep their logits, whatever their number."""
    source = _randomized_model(POOLED)
    target = DeepLab(dataclasses.replace(POOLED, num_classes=3), classes=("c2", "new", "c0")).eval()
    assert "2 of 3" in transfer_weights(source, target)
    image = torch.randn(1, 3, 65, 65)
    torch.testing.assert_close(target(image)[:, [0, 2]], source(image)[:, [2, 0]])


def test_misfits_are_named() -> None:
    """Another encoder, or fewer atrous branches than the weights have, ends in a sentence."""
    with pytest.raises(WeightsError, match="encoder resnet18"):
        transfer_weights(_randomized_model(dataclasses.replace(POOLED, encoder="resnet18")), _randomized_model(POOLED))
    with pytest.raises(WeightsError, match="atrous"):
        transfer_weights(_randomized_model(dataclasses.replace(POOLED, atrous_rates=(6, 12, 18))), _randomized_model(POOLED))
    with pytest.raises(WeightsError, match="32"):
        transfer_weights(_randomized_model(POOLED), _randomized_model(dataclasses.replace(PLUS, decoder_channels=24)))


def test_recalibrated_batchnorms_compute_the_same_and_train_like_they_evaluate() -> None:
    """Eval mode is unchanged to rounding; training mode on the same images equals it, which identity norms do not."""
    net = _randomized_model(dataclasses.replace(PLUS, dropout=0.0))
    torch.manual_seed(3)
    images = [torch.randn(4, 3, 65, 65) for _ in range(2)]
    before = net(images[0])
    wrong = (net.train()(images[0]) - before).norm() / before.norm()  # type: ignore[operator,union-attr]
    net = _randomized_model(dataclasses.replace(PLUS, dropout=0.0))
    count = recalibrate_batch_norm(net, images[:1])
    assert count == sum(isinstance(module, BATCH_NORM_TYPES) for module in net.modules())
    torch.testing.assert_close(net(images[0]), before, atol=1e-3, rtol=1e-3)
    right = (net.train()(images[0]) - before).norm() / before.norm()  # type: ignore[operator,union-attr]
    assert right < 0.02 < 0.2 < wrong


@pytest.mark.parametrize("encoder", ["mobilenetv2_050", "resnet18"])
def test_frozen_stages_stay_as_they_are(encoder: str) -> None:
    """Parameters and statistics of the first features do not move in training; everything after them does."""
    net = _randomized_model(DeepLabConfig(architecture="deeplabv3plus", encoder=encoder, num_classes=3, head_channels=16))
    freeze(net, stages=2)
    frozen = [name for name, parameter in net.named_parameters() if not parameter.requires_grad]
    assert frozen
    assert all(name.startswith("encoder.") for name in frozen)
    assert any(name.startswith("encoder.") and name not in frozen for name, _ in net.named_parameters())
    image = torch.randn(2, 3, 65, 65)
    low = net.encoder(image)[1].detach().clone()
    train_mode(net)
    net(image)
    torch.testing.assert_close(net.eval().encoder(image)[1], low, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["encoder", "all"])
def test_frozen_batchnorms_keep_their_statistics(where: str) -> None:
    """`freeze_norms` holds statistics, scale and shift of the norms it names, and of no others."""
    net = _randomized_model(PLUS)
    freeze(net, batch_norms=where)
    before = {name: buffer.clone() for name, buffer in net.named_buffers() if "running" in name}
    train_mode(net)
    net(torch.randn(2, 3, 65, 65))
    moved = {name for name, buffer in net.named_buffers() if "running" in name and not torch.equal(buffer, before[name])}
    assert moved == (set() if where == "all" else {name for name in before if name.startswith("head.")})


def _start_file(path: Path, classes: tuple[str, ...], *, bias: float) -> Path:
    """Weights of a model whose row for the first class answers everywhere, with this bias."""
    net = _randomized_model(dataclasses.replace(POOLED, num_classes=len(classes)))
    net.reset_classifier(len(classes), classes)
    nn.init.constant_(net.head.classifier.bias, 0.0)
    net.head.classifier.bias.data[0] = bias
    net.save(path)
    return path


def _recipe(init: Path, **settings: object) -> Recipe:
    augmentation = Augmentation(crop=(65, 65))
    recipe = Recipe(
        name="r", model="deeplabv3_mobilenetv2_050", data="shapes", steps=2, batch=4, workers=0, augmentation=augmentation
    )
    return dataclasses.replace(recipe, init=str(init), **settings)  # type: ignore[arg-type]


def _first_loss(net: DeepLab, recipe: Recipe, data: SyntheticShapes) -> float:
    batch = BatchDataset(data, recipe, net.preprocessing)[0]
    assert isinstance(batch, Batch)
    with torch.no_grad():
        logits = net.eval()(normalize_images(batch.image_BCHW, net.preprocessing))
    return float(nn.functional.cross_entropy(logits, batch.labels_BHW.long(), ignore_index=255))


@pytest.mark.parametrize("bias", [-20.0, 0.0, 20.0])
def test_a_run_starts_no_worse_than_from_a_new_classifier(
    tmp_path: Path, bias: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Where few classes are shared, their trained rows can dominate the new ones, in either direction."""
    data = SyntheticShapes("train", (65, 65), 8)
    shared = _recipe(_start_file(tmp_path / "shared.safetensors", ("background", "cat", "dog"), bias=bias))
    other = _recipe(_start_file(tmp_path / "other.safetensors", ("soil", "cat", "dog"), bias=bias))
    first, new = (_first_loss(build_model(one, data), one, data) for one in (shared, other))
    assert first <= new + 1e-5
    assert ("the classifier is re-initialized" in caplog.text) == (bias != 0.0 and first == pytest.approx(new))


def test_all_shared_rows_are_kept_whatever_they_answer(tmp_path: Path) -> None:
    """A classifier of the same classes is what one asked for."""
    data = SyntheticShapes("train", (65, 65), 8)
    start = _start_file(tmp_path / "start.safetensors", data.classes, bias=20.0)
    assert build_model(_recipe(start), data).head.classifier.bias[0] == 20.0


@pytest.mark.parametrize(("freeze_norms", "measured"), [("none", True), ("all", False)])
def test_folded_batch_norms_of_initial_weights_are_recalibrated(
    tmp_path: Path, freeze_norms: str, measured: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights without statistics (TFLite files) would train on other activations than they are evaluated with."""
    data = SyntheticShapes("train", (65, 65), 8)
    start = DeepLab(POOLED, classes=("background", "cat", "dog", "cow"))  # new batch norms: mean 0, variance 1, as folded ones
    start.save(tmp_path / "folded.safetensors")
    assert has_folded_batch_norms(start)
    assert not has_folded_batch_norms(_randomized_model(POOLED))
    recipe = _recipe(tmp_path / "folded.safetensors", freeze_norms=freeze_norms)
    net = build_model(recipe, data)
    before = net.eval()(torch.zeros(1, 3, 65, 65))
    estimate_batch_norm_stats(net, recipe, data)
    assert ("folded batch norms" in caplog.text) == measured
    assert has_folded_batch_norms(net) != measured
    torch.testing.assert_close(net.eval()(torch.zeros(1, 3, 65, 65)), before, atol=1e-3, rtol=1e-3)


def test_random_initialization_is_not_taken_for_folded_weights(caplog: pytest.LogCaptureFixture) -> None:
    """Batch norms of a new model have no statistics either, and need none."""
    data = SyntheticShapes("train", (65, 65), 8)
    recipe = dataclasses.replace(_recipe(Path("unused")), init=None)
    estimate_batch_norm_stats(build_model(recipe, data), recipe, data)
    assert "batch norm" not in caplog.text


def test_a_sigmoid_channel_becomes_background_and_foreground() -> None:
    """One channel x and the two channels 0, x have the same probabilities."""
    source = _randomized_model(dataclasses.replace(POOLED, num_classes=1))
    target = DeepLab(dataclasses.replace(POOLED, num_classes=2), classes=source.classes).eval()
    assert "2 of 2" in transfer_weights(source, target)
    image = torch.randn(1, 3, 65, 65)
    torch.testing.assert_close(target(image).softmax(1)[:, 1:], source(image).sigmoid())
