"""Every encoder of the table is what the table says, and trains."""

import fnmatch
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import deeplabzoo
from deeplabzoo.errors import DownloadError, UnknownNameError, UnsupportedStrideError, UsageError
from deeplabzoo.models import encoder_table, encoders
from deeplabzoo.models.config import ARCHITECTURES, Architecture, DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.encoder_table import (
    ALIASES,
    EncoderInfo,
    canonical_encoder,
    encoder_info,
    list_encoders,
    short_name,
    supports,
)
from tools.encoders import probe

USABLE = list_encoders()


def smallest_of_every_family() -> list[str]:
    """One encoder a family, the one with the fewest parameters."""
    smallest: dict[str, EncoderInfo] = {}
    for facts in map(encoder_info, USABLE):
        if facts.params < smallest.setdefault(facts.family, facts).params:
            smallest[facts.family] = facts
    return sorted(facts.name for facts in smallest.values())


FAMILIES = smallest_of_every_family()
NAMED = ("resnet50", "mobilenetv2", "mobilenetv3", "xception65", "xception71", "efficientnetb0", "convnexttiny", "mobilevits")
SAMPLE = sorted({*map(canonical_encoder, NAMED), *FAMILIES, "gernet_m"})


def measured(facts: EncoderInfo) -> dict[str, object]:
    """The part of the facts that a probe on shapes alone measures."""
    return {key: value for key, value in vars(facts).items() if not key.startswith("exact")}


def test_the_table_is_large() -> None:
    """369 pretrained encoders of timm were measured to run at output strides 8 and 16; the table has about as many."""
    both = set(list_encoders(output_stride=8)) & set(list_encoders(output_stride=16))
    assert len(both) > 350


@pytest.mark.parametrize("encoder", SAMPLE)
def test_the_table_is_what_a_probe_measures(encoder: str) -> None:
    """The table is generated, not typed: measuring again gives the same row (timm P#2369: declared reductions were wrong)."""
    assert measured(probe.probe(encoder)) == measured(encoder_info(encoder))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"encoder": "resnet50d", "multi_grid": (1, 2, 4), "encoder_pooled_shortcut": False, "encoder_dilate_strided": True},
        {"encoder": "resnet18", "encoder_dilates": "first_convs", "encoder_norm_eps": 1e-3, "in_chans": 5},
        {"encoder_padding": "same", "encoder_dilates": "first_blocks", "output_stride": 8},
        {"encoder": "xception41", "decoder_low_level_activated": False},
        {"encoder": "mobilevit_xxs", "encoder_dilate_local_conv": False},
        {"encoder": "skresnet18", "output_stride": 8},
        {"encoder": "inception_next_atto", "output_stride": 32},
        {"encoder": "drnd54", "output_stride": 8},
    ],
    ids=str,
)
def test_a_plan_from_the_table_is_what_a_measurement_gives(fields: dict[str, object]) -> None:
    """Options that change dilations, padding and channels of the image leave the features' shapes as the table has them."""
    config = DeepLabConfig.from_dict({"architecture": "deeplabv3", "encoder": "mobilenetv2_035", **fields})
    with torch.device("meta"):
        net = DeepLab(config)
        fresh = encoders.build_feature_extractor(config.encoder, config.output_stride, config.in_chans)
    plan = encoders.probe_features(fresh, config.in_chans)
    measured_here = encoders.probe_features(net.encoder, config.in_chans)
    assert net.feature_plan == plan
    assert (measured_here.channels, measured_here.reductions) == (plan.channels, plan.reductions)
    assert measured_here.single_cell_norms == ()  # those of the plan were made safe, and there are no others


def test_another_timm_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table holds for the version that it was made with; with another one the encoder itself is measured."""
    calls: list[int] = []
    measure = encoders.probe_features
    monkeypatch.setattr(encoders, "probe_features", lambda encoder, in_chans: calls.append(1) or measure(encoder, in_chans))
    config = DeepLabConfig(architecture="deeplabv3plus", encoder="skresnet18")
    with torch.device("meta"):
        before = DeepLab(config)
        assert calls == []
        monkeypatch.setattr(encoders, "measured_with", lambda: "0.0")
        after = DeepLab(config)
    assert calls == [1]
    assert after.feature_plan == before.feature_plan
    assert [type(one) for one in after.modules()] == [type(one) for one in before.modules()]


@pytest.mark.slow
@pytest.mark.parametrize("encoder", USABLE)
def test_the_whole_table_is_what_a_probe_measures(encoder: str) -> None:
    """Every usable encoder."""
    assert measured(probe.probe(encoder)) == measured(encoder_info(encoder))


@pytest.mark.slow
def test_refused_encoders_are_still_unsupported() -> None:
    """Every name of timm is usable or refused with a reason, and what a newer timm can dilate is not missed."""
    for name in sorted(set(probe.encoder_names()) - set(USABLE)):
        with pytest.raises(probe.UnsupportedEncoderError):
            probe.build_meta_encoder(name, 16)
        assert encoder_info(name).refused


@pytest.mark.parametrize("encoder", ["resnet18", "mobilenetv2_100", "tf_mobilenetv3_small_minimal_100", "resnet18d"])
def test_exactness_is_what_a_measurement_gives(encoder: str) -> None:
    """The figures of docs/encoders.md are the probe's: exact, exact, 'SAME' padding, average-pool shortcut."""
    facts = encoder_info(encoder)
    again = probe.with_exactness(facts)
    for before, now in ((facts.exact16, again.exact16), (facts.exact8, again.exact8)):
        assert before is not None
        assert now is not None
        assert now == pytest.approx(before, rel=0.3)


def test_known_exactness() -> None:
    """ResNets, MobileNetV2, Xception, RegNetX convert exactly; average-pool shortcuts, 'SAME' padding at even sizes do not."""
    for encoder in ("resnet50", "mobilenetv2", "xception65", "regnetx002"):
        assert "is exact" in encoder_info(encoder).exactness
    shortcut, same = encoder_info("resnet50d"), encoder_info("tf_efficientnet_lite0")
    assert shortcut.exact16 is not None
    assert shortcut.exact16[0] == 0 < (shortcut.exact16[1] or 0)
    assert same.exact16 is not None
    assert same.exact16[1] == 0 < (same.exact16[0] or 0)
    assert "not exact" in shortcut.exactness


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("encoder", FAMILIES)
def test_every_family_trains_on_a_batch_of_one(encoder: str, output_stride: int) -> None:
    """Forward and backward at an odd size, on a lone sample, at both strides, with every parameter of the head reached."""
    config = DeepLabConfig(
        architecture="deeplabv3plus", encoder=encoder, output_stride=output_stride, num_classes=2, aux_head=True
    )
    net = DeepLab(config).train()
    out = net(torch.rand(1, 3, 33, 47))
    (out.logits.square().mean() + out.aux_logits.square().mean()).backward()
    assert out.logits.shape == (1, 2, 33, 47)
    assert all(parameter.grad is not None for parameter in net.head.parameters())
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in net.parameters())


def build_on_shapes(encoder: str, architecture: Architecture, output_stride: int) -> None:
    """Build a network without memory, and run a batch of one through it in training and in eval mode."""
    with torch.device("meta"):
        net = DeepLab(DeepLabConfig(architecture=architecture, encoder=encoder, output_stride=output_stride))
        image = torch.empty(1, 3, 33, 49)
    for mode in (True, False):
        assert net.train(mode)(image).shape == (1, 21, 33, 49)


@pytest.mark.parametrize("encoder", SAMPLE)
def test_every_family_builds_and_runs(encoder: str) -> None:
    """A sample of every family, V3 at the default stride and V3+ at the densest; the rest under `-m slow`."""
    build_on_shapes(encoder, "deeplabv3", 16)
    build_on_shapes(encoder, "deeplabv3plus", 8)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", USABLE)
def test_every_registered_architecture_builds_and_runs(encoder: str) -> None:
    """Every encoder of the table, in both architectures, at every stride."""
    for output_stride in encoder_info(encoder).strides:
        for architecture in ARCHITECTURES:
            build_on_shapes(encoder, architecture, output_stride)


def test_supports_answers_without_building(monkeypatch: pytest.MonkeyPatch) -> None:
    """SMP#730: "which ones DO support? is there a method to find the list?" No module is made for an answer."""

    def refuse(module: torch.nn.Module, *_: object, **__: object) -> None:
        raise AssertionError(f"{type(module).__name__} was built")

    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    assert supports("resnet50", 8)
    assert not supports("densenet121", 16)
    assert all(supports(name, 8) for name in list_encoders("*xception*", output_stride=8))
    assert deeplabzoo.supports is supports


def test_names_and_aliases_round_trip() -> None:
    """Every usable encoder has one short name, which leads back to it; an alias is never another encoder's full name."""
    assert [canonical_encoder(short_name(name)) for name in USABLE] == USABLE
    assert all(ALIASES.get(alias, alias) == name for alias, name in ALIASES.items())
    assert all(alias == name or alias not in USABLE for alias, name in ALIASES.items())
    assert set(ALIASES.values()) <= set(USABLE)


def test_lists_follow_patterns() -> None:
    """A pattern matches canonical and short names."""
    assert fnmatch.filter(USABLE, "xception*") == list_encoders("xception*")
    assert "mobilenetv3_large_100" in list_encoders("mobilenetv3")
    assert list_encoders("no_such*") == []


@pytest.mark.parametrize("encoder", ["densenet121", "hrnet_w18", "maxvit_tiny_tf_224", "vgg16", "swin_tiny_patch4_window7_224"])
def test_an_unsupported_stride_names_three_encoders_that_can(encoder: str) -> None:
    """timm ends in a raw TypeError or an empty AssertionError here (SMP#238, open for four years)."""
    with pytest.raises(UnsupportedStrideError, match="cannot run at output stride 16") as caught:
        DeepLab(DeepLabConfig(architecture="deeplabv3", encoder=encoder))
    near = str(caught.value).rsplit(": ", 1)[1].rstrip(".").split(", ")
    assert len(near) == 3
    assert all(supports(name, 16) for name in near)


def test_imagenet_weights_that_cannot_be_had_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no weights for this encoder, or weights for other tensors: said before, or instead of, a traceback."""

    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError("cannot reach the hub\nand a long story")

    monkeypatch.setattr("timm.create_model", no_network)
    config = DeepLabConfig(architecture="deeplabv3", encoder="resnet18")
    with pytest.raises(DownloadError, match=r"of 'resnet18' could not be fetched \(ConnectionError: cannot reach the hub\)"):
        DeepLab(config, encoder_pretrained=True)
    with pytest.raises(UsageError, match="'drnd54' has no ImageNet weights"):
        DeepLab(replace(config, encoder="drnd54"), encoder_pretrained=True)
    with pytest.raises(UnsupportedStrideError, match="'gernet_l' do not fit at output stride 16"):
        DeepLab(replace(config, encoder="gernet_l"), encoder_pretrained=True)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    """Did you mean, from aliases and full names alike."""
    with pytest.raises(UnknownNameError, match=r"Did you mean .*'mobilenetv2'"):
        supports("mobilenetv22", 8)


def test_the_table_and_its_page_are_written_by_the_probe(tmp_path: Path) -> None:
    """Neither `encoder_table.json` nor `docs/encoders.md` was edited by hand."""
    facts = list(encoder_table.all_encoders())
    probe.write_table(facts, tmp_path / "table.json")
    committed = Path(encoder_table.__file__).with_name("encoder_table.json")
    assert (tmp_path / "table.json").read_text().split("\n")[1:] == committed.read_text().split("\n")[1:]
    page = Path(__file__).resolve().parents[2] / "docs" / "encoders.md"
    probe.write_docs([one for one in facts if one.strides], tmp_path / "page.md", "")
    assert (tmp_path / "page.md").read_text().split("\n")[5:] == page.read_text().split("\n")[5:]
