"""What a DeepLab promises whatever its encoder: sizes, batches of one, strides that change under the same parameters."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.fx
from helpers.tensor_work import TensorWork, require_work_of_one_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deeplabzoo.errors import UnknownNameError, UnsupportedStrideError, UsageError
from deeplabzoo.models.config import Architecture, DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab, TrainingOutput
from deeplabzoo.models.layers import _warn_single_sample

BOTH: tuple[Architecture, Architecture] = ("deeplabv3", "deeplabv3plus")


def config(architecture: Architecture = "deeplabv3", encoder: str = "mobilenetv2_035", **fields: object) -> DeepLabConfig:
    return replace(DeepLabConfig(architecture=architecture, encoder=encoder, num_classes=3), **fields)  # type: ignore[arg-type]


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def random_statistics(net: nn.Module) -> None:
    """Move every norm and residual branch away from its neutral start, so that nothing in the network is multiplied by 0."""
    torch.manual_seed(0)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5) if "var" in name or "weight" in name else tensor.normal_(std=0.1)


@pytest.mark.parametrize("encoder", ["resnet50", "resnet101"])
def test_v3_has_the_parameters_of_torchvision(encoder: str) -> None:
    """Fidelity: the default V3 head at 21 classes is torchvision's, to the last parameter."""
    segmentation = pytest.importorskip("torchvision.models.segmentation")
    with torch.device("meta"):
        reference = getattr(segmentation, f"deeplabv3_{encoder}")(weights=None, weights_backbone=None, num_classes=21)
        net = DeepLab(config(encoder=encoder, num_classes=21, output_stride=8))
    assert parameter_count(net) == parameter_count(reference)
    assert parameter_count(net.head) == parameter_count(reference.classifier)


def test_v3_with_auxiliary_head_has_the_parameters_of_the_published_file() -> None:
    """42 004 074 parameters is what torchvision publishes for deeplabv3_resnet50 with its auxiliary head."""
    with torch.device("meta"):
        net = DeepLab(config(encoder="resnet50", num_classes=21, output_stride=8, aux_head=True))
    assert parameter_count(net) == 42_004_074


def test_v3plus_decoder_is_the_papers() -> None:
    """A 48-channel projection of the stride-4 feature and two separable 3x3 of 256, norm after both halves of each."""
    with torch.device("meta"):
        head = DeepLab(config("deeplabv3plus", encoder="resnet50")).head
    shapes = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    assert shapes["low_level.conv.weight"] == (48, 256, 1, 1)
    assert shapes["decoder.0.depthwise.conv.weight"] == (304, 1, 3, 3)
    assert shapes["decoder.0.depthwise.norm.weight"] == (304,)
    assert shapes["decoder.0.pointwise.conv.weight"] == (256, 304, 1, 1)
    assert shapes["decoder.1.pointwise.norm.weight"] == (256,)
    assert shapes["aspp.branches.1.depthwise.conv.weight"] == (2048, 1, 3, 3)
    assert shapes["classifier.weight"] == (3, 256, 1, 1)


def test_the_tensorflow_mobile_head_can_be_expressed() -> None:
    """1x1 + image pooling, no atrous branch, no 3x3: the head of the published TensorFlow mobile models."""
    net = DeepLab(config(atrous_rates=(), refine_conv=False, pooling_first=True)).eval()
    convolutions = {name: tuple(one.weight.shape[:2]) for name, one in net.head.named_modules() if isinstance(one, nn.Conv2d)}
    assert convolutions == {
        "aspp.branches.0.conv": (256, 112),
        "aspp.pool.conv": (256, 112),
        "aspp.project.conv": (256, 512),
        "classifier": (3, 256),
    }
    seen: list[torch.Tensor] = []
    net.head.aspp.project.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        net(torch.rand(1, 3, 65, 65))
    pooled_half, map_half = seen[0][:, :256], seen[0][:, 256:]
    assert torch.equal(pooled_half, pooled_half[..., :1, :1].expand_as(pooled_half))
    assert not torch.equal(map_half, map_half[..., :1, :1].expand_as(map_half))


@pytest.fixture(scope="module", params=BOTH)
def small_net(request: pytest.FixtureRequest) -> DeepLab:
    return DeepLab(config(request.param)).eval()


@settings(max_examples=25, deadline=None)
@given(height=st.integers(33, 130), width=st.integers(33, 130))
def test_logits_come_at_the_size_of_the_image(small_net: DeepLab, height: int, width: int) -> None:
    """Every size works and comes back unchanged (rishizek/tensorflow-deeplab-v3#7: 430 x 418 for 512 x 512)."""
    image_BCHW = torch.rand(1, 3, height, width)
    with torch.no_grad():
        assert small_net(image_BCHW).shape == (1, 3, height, width)
    labels_BHW = small_net.predict_labels(image_BCHW)
    assert labels_BHW.shape == (1, height, width)
    assert labels_BHW.dtype == torch.int64


@pytest.mark.parametrize("architecture", BOTH)
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("aux_head", [False, True])
def test_batch_of_one_trains(architecture: Architecture, norm: str, aux_head: bool) -> None:
    """The pooled branch of a lone sample has no variance, and six libraries crash on it (msminhas93/DeepLabv3FineTuning#5)."""
    net = DeepLab(config(architecture, norm=norm, aux_head=aux_head)).train()
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    out = net(torch.rand(1, 3, 33, 45))
    (out.logits + out.aux_logits if isinstance(out, TrainingOutput) else out).square().mean().backward()
    optimizer.step()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert not torch.equal(before["head.aspp.project.conv.weight"], net.head.aspp.project.conv.weight)


def test_a_single_sample_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Falling back to running statistics is not silent, and not repeated at every step."""
    _warn_single_sample.cache_clear()
    net = DeepLab(config()).train()
    for _ in range(3):
        net(torch.rand(1, 3, 33, 33))
    assert caplog.text.count("running statistics") == 1


def test_a_single_sample_uses_running_statistics() -> None:
    """The pooled norm of a batch of one computes what it computes in eval mode, and leaves its statistics alone."""
    norm = DeepLab(config()).head.aspp.pool.norm
    norm.running_mean.fill_(0.25)
    lone = torch.rand(1, 256, 1, 1)
    assert torch.equal(norm.train()(lone), copy.deepcopy(norm).eval()(lone))
    assert norm.running_mean.eq(0.25).all()
    norm(torch.rand(2, 256, 1, 1))
    assert not norm.running_mean.eq(0.25).all()


def test_eval_gives_one_tensor_and_training_gives_both() -> None:
    """An auxiliary head is a training matter; using the network never means unpacking (pytorch/vision#1891)."""
    net = DeepLab(config(aux_head=True))
    image = torch.rand(2, 3, 33, 41)
    out = net.train()(image)
    assert isinstance(out, TrainingOutput)
    assert out.logits.shape == out.aux_logits.shape == (2, 3, 33, 41)
    assert isinstance(net.eval()(image), torch.Tensor)


def test_low_resolution_logits_are_what_is_upsampled() -> None:
    """`forward_low_resolution` gives the head's own map: the output stride for V3, stride 4 for V3+."""
    image = torch.rand(1, 3, 65, 97)
    for architecture, size in (("deeplabv3", (5, 7)), ("deeplabv3plus", (17, 25))):
        net = DeepLab(config(architecture, align_corners=True)).eval()
        with torch.no_grad():
            small = net.forward_low_resolution(image)
            assert small.shape[-2:] == size
            upsampled = nn.functional.interpolate(small, size=(65, 97), mode="bilinear", align_corners=True)
            assert torch.equal(upsampled, net(image))


@pytest.mark.parametrize("architecture", BOTH)
@pytest.mark.parametrize(("start", "target"), [(16, 8), (8, 16), (32, 8), (16, 32)])
@pytest.mark.parametrize("encoder", ["mobilenetv2_035", "resnet18"])
def test_output_stride_changes_under_the_same_parameters(
    architecture: Architecture, start: int, target: int, encoder: str
) -> None:
    """Train at 16, run at 8: the same Parameter objects, and the model that would be built there."""
    net = DeepLab(config(architecture, encoder, output_stride=start))
    random_statistics(net)
    fresh = DeepLab(config(architecture, encoder, output_stride=target))
    fresh.load_state_dict(net.state_dict())
    before = dict(net.named_parameters())
    net.set_output_stride(target)
    after = dict(net.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert net.output_stride == target
    assert net.config == fresh.config
    image = torch.rand(1, 3, 65, 71)
    with torch.no_grad():
        assert torch.equal(net.eval()(image), fresh.eval()(image))


@pytest.mark.parametrize(("encoder", "start", "target"), [("drnd54", 8, 16), ("resnetblur50", 8, 32), ("resnetblur50", 32, 8)])
def test_output_stride_changes_for_unusual_encoders(encoder: str, start: int, target: int) -> None:
    """Our own DRN, and one with blur kernels that are no parameters and come and go with the stride."""
    test_output_stride_changes_under_the_same_parameters("deeplabv3", start, target, encoder)


@pytest.mark.parametrize(("start", "target"), [(8, 32), (32, 8)])
def test_buffers_that_are_not_saved_follow_the_type_of_the_model(start: int, target: int) -> None:
    """Blur kernels are in no state dict; a network in float64 stays one when they come or go."""
    net = DeepLab(config(encoder="resnetblur50", output_stride=start)).double().eval()
    net.set_output_stride(target)
    with torch.no_grad():
        assert net(torch.rand(1, 3, 33, 33, dtype=torch.float64)).dtype == torch.float64


def test_an_optimizer_survives_a_change_of_stride() -> None:
    """Its parameters are the network's own afterwards: a step moves the network."""
    net = DeepLab(config())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net.set_output_stride(8)
    before = net.encoder.get_parameter("blocks.5.0.conv_dw.weight").clone()
    net(torch.rand(2, 3, 33, 33)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, net.encoder.get_parameter("blocks.5.0.conv_dw.weight"))


def test_a_change_of_stride_keeps_modes_types_and_frozen_parameters() -> None:
    """Training flags per module, dtype, requires_grad and batch-norm momentum are the user's, not ours."""
    net = DeepLab(config()).to(torch.float64).train()
    net.encoder.blocks[0].eval()  # type: ignore[index]
    net.encoder.conv_stem.weight.requires_grad_(False)  # type: ignore[union-attr]
    net.encoder.bn1.momentum = 0.01  # type: ignore[union-attr]
    net.set_output_stride(8)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float64}
    assert net.training
    assert net.encoder.training
    assert not net.encoder.blocks[0].training  # type: ignore[index]
    assert net.encoder.blocks[1].training  # type: ignore[index]
    assert not net.encoder.conv_stem.weight.requires_grad  # type: ignore[union-attr]
    assert net.encoder.blocks[1][0].conv_pw.weight.requires_grad  # type: ignore[index]
    assert net.encoder.bn1.momentum == 0.01  # type: ignore[union-attr]


def test_given_rates_scale_with_the_stride() -> None:
    """Trained with 12,24,36 at 16, run with 24,48,72 at 8 (tensorflow/models#6257: unchanged rates lose a point)."""
    net = DeepLab(config(atrous_rates=(12, 24, 36)))
    net.set_output_stride(8)
    assert net.config.atrous_rates == (24, 48, 72)
    assert [branch.conv.dilation[0] for branch in net.head.aspp.branches] == [1, 24, 48, 72]


def test_multi_grid_dilates_the_blocks_of_the_last_stage() -> None:
    """(1, 2, 4) at output stride 16 is dilation 2, 4, 8 in the three blocks, and follows a change of stride."""
    net = DeepLab(config(encoder="resnet50", multi_grid=(1, 2, 4)))
    assert [block.conv2.dilation[0] for block in net.encoder.layer4] == [2, 4, 8]  # type: ignore[union-attr]
    net.set_output_stride(8)
    assert [block.conv2.dilation[0] for block in net.encoder.layer4] == [4, 8, 16]  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="ResNet-like"):
        DeepLab(config(multi_grid=(1, 2, 4)))


@pytest.mark.parametrize(("encoder", "stride"), [("xception71", 8), ("gernet_l", 32)])
def test_a_stride_with_other_tensors_is_refused_and_nothing_changes(encoder: str, stride: int) -> None:
    """Shortcuts of these encoders come and go with the stride: weights would silently not fit."""
    with torch.device("meta"):
        net = DeepLab(config(encoder=encoder))
    before = net.config, net.encoder, net.feature_plan
    with pytest.raises(UnsupportedStrideError, match=f"other tensors at output stride {stride}"):
        net.set_output_stride(stride)
    assert (net.config, net.encoder, net.feature_plan) == before


def test_reset_classifier_replaces_the_last_layer_alone() -> None:
    """21 classes to 5 without a size mismatch (VainF#81), on the same device and in the same type, auxiliary head included."""
    net = DeepLab(config("deeplabv3plus", num_classes=21, aux_head=True)).half()
    kept = net.head.aspp.project.conv.weight
    net.reset_classifier(5, classes=["a", "b", "c", "d", "e"])
    assert net.num_classes == len(net.palette) == 5
    assert net.classes == ("a", "b", "c", "d", "e")
    assert net.head.classifier.weight.shape == (5, 256, 1, 1)
    assert net.aux_head.classifier.weight.shape[0] == 5  # type: ignore[union-attr]
    assert net.head.classifier.weight.dtype == torch.float16
    assert net.head.aspp.project.conv.weight is kept
    assert net.float().eval()(torch.rand(1, 3, 33, 33)).shape[1] == 5


def test_reset_classifier_refuses_names_that_do_not_match() -> None:
    """Names and colours are as many as classes, or nothing changes."""
    net = DeepLab(config())
    with pytest.raises(UsageError, match="A model of 5 classes needs as many names"):
        net.reset_classifier(5, classes=["a", "b"])
    assert net.num_classes == net.config.num_classes == len(net.classes) == 3


@pytest.mark.parametrize("channels", [1, 4, 8])
def test_any_number_of_input_channels(channels: int) -> None:
    """Multispectral and grey images are inputs too (jfzhang95#116)."""
    net = DeepLab(config(in_chans=channels)).eval()
    assert net(torch.rand(1, channels, 33, 33)).shape == (1, 3, 33, 33)


def test_group_norm_leaves_no_batch_norm() -> None:
    """norm="group" reaches encoder and head; the activation that timm keeps inside its norm layers is kept."""
    net = DeepLab(config(norm="group", aux_head=True))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    batch = DeepLab(config(aux_head=True))
    count = {kind: sum(isinstance(one, kind) for one in net.modules()) for kind in (nn.ReLU6, nn.GroupNorm)}
    assert count[nn.ReLU6] == sum(isinstance(one, nn.ReLU6) for one in batch.modules())
    assert count[nn.GroupNorm] == sum(isinstance(one, nn.BatchNorm2d) for one in batch.modules())


def test_tensorflow_padding_and_epsilon() -> None:
    """TensorFlow's weights need 'SAME' padding and an epsilon of 1e-3; encoders that cannot are refused in a sentence."""
    net = DeepLab(config(encoder_padding="same", encoder_norm_eps=1e-3)).eval()
    assert {one.eps for one in net.encoder.modules() if isinstance(one, nn.BatchNorm2d)} == {1e-3}
    assert net(torch.rand(1, 3, 64, 64)).shape == (1, 3, 64, 64)
    ordinary = DeepLab(config(encoder_norm_eps=1e-3)).eval()
    ordinary.load_state_dict(net.state_dict())
    with torch.no_grad():
        odd, even = torch.rand(1, 3, 65, 65), torch.rand(1, 3, 64, 64)
        assert torch.allclose(net(odd), ordinary(odd), atol=1e-5)
        assert not torch.allclose(net(even), ordinary(even), atol=1e-5)
    with pytest.raises(UsageError, match="EfficientNet and MobileNet encoders only"):
        DeepLab(config(encoder="resnet18", encoder_padding="same"))
    with pytest.raises(UsageError, match="encoder_norm_eps"):
        DeepLab(config(encoder="convnext_atto", encoder_norm_eps=1e-3))


def test_dropout_is_the_papers() -> None:
    """0.1, once, after the ASPP projection (SMP and torchvision: 0.5)."""
    rates = [one.p for one in DeepLab(config()).modules() if isinstance(one, nn.Dropout) and one.p > 0]
    assert rates == [0.1]


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (torch.rand(1, 4, 40, 40), r"B x 3 x H x W, not \(1, 4, 40, 40\)"),
        (torch.rand(3, 40, 40), r"B x 3 x H x W, not \(3, 40, 40\)"),
        (torch.zeros(1, 3, 40, 40, dtype=torch.uint8), "normalized float image, not torch.uint8"),
    ],
)
def test_wrong_images_end_in_a_sentence(image: torch.Tensor, sentence: str) -> None:
    """What arrived, what was expected."""
    with pytest.raises(UsageError, match=sentence):
        DeepLab(config()).eval()(image)


def test_an_alias_and_its_full_name_are_one_model() -> None:
    """What is stored in a checkpoint is the canonical name, whatever was typed."""
    assert DeepLab(config(encoder="mobilenetv3small")).config == config(encoder="mobilenetv3_small_100")


def test_unknown_encoders_are_refused_with_the_nearest_names() -> None:
    """Did you mean."""
    with pytest.raises(UnknownNameError, match=r"Unknown encoder 'resnet5O'. Did you mean 'resnet50'"):
        DeepLab(config(encoder="resnet5O"))


@pytest.mark.parametrize("encoder", ["resnet18", "mobilenetv2_035", "xception41", "convnext_atto", "mobilevit_xxs"])
def test_random_initialization_is_skipped_for_given_weights(encoder: str) -> None:
    """Loading, and changing the stride, neither spend time on random numbers nor move the generator of the user's run."""
    net = DeepLab(config(encoder=encoder))
    before = torch.get_rng_state()
    net.set_output_stride(8)
    DeepLab.from_weights(net.config, net.state_dict())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_large_model_is_initialised_once() -> None:
    """A 101-layer model without weights is ready at once: its memory is taken once, and no image runs through it."""
    with TensorWork() as work:
        net = DeepLab(config("deeplabv3", encoder="resnet101", num_classes=21))
    require_work_of_one_model(work, net)


@pytest.mark.parametrize(
    "classifier", [nn.Conv2d(256, 5, 1), nn.Sequential(nn.Conv2d(256, 9, 1), nn.ReLU(), nn.Conv2d(9, 5, 1))]
)
def test_a_classifier_replaced_by_hand_has_no_names_and_is_not_saved(classifier: nn.Module, tmp_path: Path) -> None:
    """Labels would get the names of other classes, and the file would not load: both name reset_classifier."""
    net = DeepLab(config(num_classes=21))
    net.head.classifier = classifier  # type: ignore[assignment]
    for call in (lambda: net.classes, lambda: net.save(tmp_path / "net.safetensors")):
        with pytest.raises(UsageError, match=r"net.reset_classifier\(5\)"):
            call()
    assert not (tmp_path / "net.safetensors").exists()


def test_a_layer_replaced_by_hand_is_not_saved(tmp_path: Path) -> None:
    """A file that cannot be loaded is refused when it is written: another stem, or a layer more."""
    other_stem, added = DeepLab(config()), DeepLab(config())
    other_stem.encoder.conv_stem = nn.Conv2d(5, 16, 3, 2, 1, bias=False)
    added.head.extra = nn.Linear(2, 2)
    for net, reason in ((other_stem, "encoder.conv_stem.weight is"), (added, "head.extra")):
        with pytest.raises(UsageError, match=f"cannot be saved.*{reason}"):
            net.save(tmp_path / "net.safetensors")


@pytest.mark.parametrize("architecture", BOTH)
@pytest.mark.parametrize("training", [False, True])
def test_a_model_can_be_traced_by_torch_fx(architecture: Architecture, training: bool) -> None:
    """`torch.fx`, and with it torchvision's create_feature_extractor; checks of the image stay, as single calls."""
    net = DeepLab(config(architecture, aux_head=True, dropout=0.0)).train(training)
    traced, image = torch.fx.symbolic_trace(net), torch.rand(2, 3, 65, 97)
    expected, found = copy.deepcopy(net)(image), traced(image)
    for one, other in zip(expected if training else [expected], found if training else [found], strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UsageError, match="B x 3 x H x W"):
        traced(image[:, :2])


def test_a_batch_of_one_trains_in_one_graph() -> None:
    """`torch.compile(fullgraph=True)`: neither the log line nor the condition breaks the graph."""
    net = DeepLab(config()).train()
    expected = copy.deepcopy(net)
    torch.manual_seed(0)
    out = torch.compile(net, fullgraph=True, backend="eager")(torch.ones(1, 3, 33, 33))
    torch.manual_seed(0)
    assert torch.equal(out, expected(torch.ones(1, 3, 33, 33)))
    assert torch.equal(net.head.aspp.pool.norm.running_mean, expected.head.aspp.pool.norm.running_mean)
