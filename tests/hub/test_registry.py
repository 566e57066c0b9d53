"""A name is a sentence: architecture, encoder, data, tag; every one that is listed can be taken apart and put together."""

import pytest

import deeplabzoo
from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.errors import UnknownNameError, UsageError
from deeplabzoo.hub.manifest import released
from deeplabzoo.hub.registry import find_weights, list_models, list_weights
from deeplabzoo.models.encoder_table import list_encoders, short_name, supports
from deeplabzoo.models.names import ModelName, parse_name

EVERY_NAME = list_models()


def test_every_listed_name_round_trips() -> None:
    """What list_models prints can be typed back, for each architecture, encoder, data set and tag."""
    assert sorted(set(EVERY_NAME)) == EVERY_NAME
    for name in EVERY_NAME:
        assert str(parse_name(name)) == name
        for data in CLASS_LISTS:
            if parse_name(name).data is None:
                tagged = f"{name}_{data}.some_tag"
                assert str(parse_name(tagged)) == tagged
                assert parse_name(tagged).data == data


def test_no_encoder_name_ends_like_a_data_set() -> None:
    """Parsing from both ends is unambiguous only as long as this holds."""
    for encoder in list_encoders():
        for spelling in (encoder, short_name(encoder)):
            assert spelling.rpartition("_")[2] not in CLASS_LISTS


def test_alias_and_full_timm_name_mean_the_same_model() -> None:
    short, full = parse_name("deeplabv3plus_mobilenetv2_voc"), parse_name("deeplabv3plus_mobilenetv2_100_voc")
    assert short == full == ModelName("deeplabv3plus", "mobilenetv2_100", "voc")
    assert str(full) == "deeplabv3plus_mobilenetv2_voc"


def test_both_architectures_are_listed_for_every_encoder() -> None:
    """The strides are data that is read, not a table of the documentation."""
    for encoder in list_encoders():
        assert f"deeplabv3_{short_name(encoder)}" in EVERY_NAME
        assert f"deeplabv3plus_{short_name(encoder)}" in EVERY_NAME


def test_listing_by_stride_answers_from_the_measured_table() -> None:
    """`output_stride=` keeps what runs at it and nothing else (SMP#730: "is there a method to find the list?")."""
    for stride in (8, 16, 32):
        listed = set(list_models(output_stride=stride))
        assert listed == {name for name in EVERY_NAME if supports(parse_name(name).encoder, stride)}
    with pytest.raises(UsageError, match="8, 16 or 32, not 4"):
        list_models(output_stride=4)


def test_patterns_are_shell_patterns() -> None:
    assert "deeplabv3_resnet50" in list_models("*_resnet50")
    assert all(name.startswith("deeplabv3plus_") for name in list_models("deeplabv3plus_*"))
    assert list_models("nothing*") == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deeplabv3_resnet5O", "Unknown encoder 'resnet5O'.*Did you mean 'resnet50'"),
        ("deeplabv3_resnet50_vocc", "no dataset is called 'vocc'.*Did you mean 'voc'"),
        ("deeplab_resnet50", "expected architecture_encoder.*Did you mean 'deeplabv3_resnet50'"),
        ("DeepLabV3_resnet50", "expected architecture_encoder"),
        ("deeplabv3", "expected architecture_encoder"),
        ("deeplabv3_", "expected architecture_encoder"),
        ("deeplabv3_resnet50.", "expected architecture_encoder"),
        ("deeplabv3_voc", "Unknown encoder 'voc'"),
        ("deeplabv3__resnet50", "Unknown encoder"),
        ("", "expected architecture_encoder"),
    ],
)
def test_unknown_names_teach_the_nearest_one(name: str, reason: str) -> None:
    """The sentence says which word is unknown and what exists instead."""
    with pytest.raises(UnknownNameError, match=reason) as caught:
        parse_name(name)
    assert "\n" not in str(caught.value)


def test_manifest_rows_stand_under_their_canonical_name() -> None:
    """A row's name says the network that its config builds and the data whose classes it has."""
    for row in released():
        name = parse_name(row.name)
        assert str(name) == row.name
        assert (name.architecture, name.encoder, name.data) == (row.config.architecture, row.config.encoder, row.data)
        assert row.name in EVERY_NAME
        assert row.full_name not in EVERY_NAME


def test_weights_are_found_by_name_tag_and_default() -> None:
    row = find_weights(parse_name("deeplabv3_mobilenetv2_voc"))
    assert row.default
    assert row in list_weights("*_voc*")
    assert row in list_weights("deeplabv3_mobilenetv2_voc.coral")
    assert find_weights(parse_name("deeplabv3_mobilenetv2_voc.coral")) == row
    assert find_weights(parse_name("deeplabv3_mobilenetv2_100_voc"), "coral") == row


@pytest.mark.parametrize(
    ("name", "tag", "reason"),
    [
        ("deeplabv3_mobilenetv2_voc", "corall", "no weights tagged 'corall'; its tags are coral"),
        ("deeplabv3_mobilenetv2_voc.corall", None, "no weights tagged 'corall'"),
        ("deeplabv3_mobilenetv2", None, "The same model has weights as deeplabv3_mobilenetv2_ade20k, .*mobilenetv2_voc"),
        ("deeplabv3plus_mobilenetv3_voc", None, "Did you mean .*'deeplabv3_mobilenetv3_voc'"),
    ],
)
def test_weights_that_do_not_exist_are_named_with_those_that_do(name: str, tag: str | None, reason: str) -> None:
    with pytest.raises(UnknownNameError, match=reason):
        find_weights(parse_name(name), tag)


def test_describe_prints_everything_on_one_page() -> None:
    """Strides, rates, classes, weights, licences and notes of a name, and of one tag."""
    page = str(deeplabzoo.describe("deeplabv3_mobilenetv2_voc"))
    for fact in ("mobilenetv2_100", "16 (rates 6, 12, 18)", "21 of voc", "aeroplane", "coral", "Apache-2.0", "dequantised"):
        assert fact in page
    assert deeplabzoo.describe("deeplabv3_mobilenetv2_voc.coral").weights == tuple(list_weights("*.coral"))
    assert "none released" in str(deeplabzoo.describe("deeplabv3plus_resnet50"))
    with pytest.raises(UnknownNameError):
        deeplabzoo.describe("deeplabv3_mobilenetv2_voc.corall")
