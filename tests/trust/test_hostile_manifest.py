"""Manifests, recipes, settings and class lists of any content end in our own errors, in one line that a terminal can show."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz.seeds import config_subjects, manifests, own_checkpoint

from deeplabzoo.checkpoints.converters import smp, transformers
from deeplabzoo.checkpoints.native import read_checkpoint
from deeplabzoo.data.class_file import read_class_file
from deeplabzoo.errors import DataError, TrainingError, UsageError, WeightsError
from deeplabzoo.hub.manifest import read_manifest
from deeplabzoo.log import logger
from deeplabzoo.models.names import parse_name
from deeplabzoo.strict_json import parse_json
from deeplabzoo.training.overrides import apply_overrides
from deeplabzoo.training.recipes import get_recipe
from deeplabzoo.training.run_dir import RunDir

DEEP = "[" * 200_000


@pytest.mark.parametrize("name", ["deeplabv3_\x1b[2Jresnet50", "deeplabv3_resnet50\n.x", "deeplabv3_\u202etenser", "\udcff"])
def test_a_name_cannot_write_on_the_terminal(name: str) -> None:
    """Escape sequences, line ends, reversed text and bytes that are no text are shown, not carried out."""
    with pytest.raises(UsageError) as caught:
        parse_name(name)
    assert str(caught.value).isprintable()


def test_an_error_stays_readable_however_long_its_values_are() -> None:
    """A megabyte of a hostile file is no sentence."""
    with pytest.raises(UsageError) as caught:
        apply_overrides(get_recipe("shapes"), [f"batch={'x' * 1_000_000}"])
    assert len(str(caught.value)) < 2000
    assert str(caught.value).startswith("batch must be a whole number")


def test_a_line_about_loading_cannot_write_on_the_terminal(caplog: pytest.LogCaptureFixture) -> None:
    """Names out of files stand in the lines that say what was loaded."""
    with caplog.at_level("INFO", logger="deeplabzoo"):
        logger.info("classes: cat\x1b[2J, 100 % dog")
    assert caplog.messages == ["classes: cat\\x1b[2J, 100 % dog"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (DEEP, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' stands twice"),
        ("[NaN]", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("1e999", "too large"),
        ("1" * 5000, "too large"),
        ("1" * 400, "too large"),
        ("{", "Expecting property name"),
    ],
)
def test_json_that_readers_understand_differently_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def _manifest(path: Path, text: str) -> None:
    path.write_text(text)
    read_manifest(path)


def _recipe(path: Path, text: str) -> None:
    path.with_name("recipe.json").write_text(text)
    RunDir(path.parent).recipe()


def _checkpoint(path: Path, text: str) -> None:
    path.write_bytes(own_checkpoint(config=text))
    read_checkpoint(path)


def _source(path: Path, text: str) -> None:
    path.write_bytes(own_checkpoint(source=text))
    read_checkpoint(path)


@pytest.mark.parametrize("text", [DEEP, "1e999", "NaN", "1" * 5000, '"\\ud800"', "null", "[]", '{"\\u001b[2J": 1}', ""])
@pytest.mark.parametrize("read", [_manifest, _recipe, _checkpoint, _source])
def test_any_json_at_the_top_ends_in_a_sentence(read: Callable[[Path, str], None], text: str, tmp_path: Path) -> None:
    """Nested without end, not finite, of another type: our own error, in one printable line."""
    if read is _source and text.startswith("{"):
        return  # free to say anything
    with pytest.raises((WeightsError, TrainingError)) as caught:
        read(tmp_path / "file", text)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dropout", "0.1"),
        ("aux_head", "no"),
        ("encoder_dilate_strided", 1),
        ("decoder_kernel", 3.0),
        ("decoder_convs", 1.5),
        ("atrous_rates", 6),
        ("pooling_window", [[1, 2], [3, 4]]),
        ("norm", ["batch"]),
        ("norm_eps", None),
        ("architecture", {"deeplabv3": 1}),
        ("../encoder", "resnet18"),
    ],
)
def test_a_checkpoint_with_a_field_of_another_kind_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    """By name, when it is read: not by a traceback when the network is built."""
    plain = {"architecture": "deeplabv3", "encoder": "resnet18", "num_classes": 2, field: value}
    with pytest.raises(WeightsError, match=f"metadata.config.{field}|unknown field '{field}'"):
        _checkpoint(tmp_path / "file", json.dumps(plain))


@pytest.mark.parametrize("palette", ["[[0, 0, 256], [1, 1, 1]]", "[[-1, 0, 0], [1, 1, 1]]", "[[0.5, 0, 0], [1, 1, 1]]"])
def test_a_checkpoint_with_colours_that_are_none_is_refused(palette: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(own_checkpoint(palette=palette))
    with pytest.raises(WeightsError, match=r"palette|colour"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "assignment", ["stages.²=1", "stages.² =1", "lr.x=1", "name.0=x", f"steps={DEEP}", "lr=1e999", "epochs=Infinity", "lr=NaN"]
)
def test_an_assignment_that_makes_no_sense_is_refused(assignment: str) -> None:
    with pytest.raises(UsageError):
        apply_overrides(get_recipe("shapes"), [assignment])


@pytest.mark.parametrize("name", ["transformers", "smp"])
def test_settings_beside_the_weights_are_input_like_any_other(name: str, tmp_path: Path) -> None:
    """A `config.json` of a repository that nobody can read is passed over, and what is assumed without it is said."""
    tensors, settings = config_subjects()[name]
    (tmp_path / "config.json").write_text(json.dumps(settings).replace("{", '{"deep": ' + DEEP + ",", 1))
    origin = {"transformers": transformers, "smp": smp}[name]
    converted = origin.convert(tensors, tmp_path / "model.safetensors")
    assert converted.config is not None
    assert any("assumed" in note for note in converted.notes)


def test_a_recipe_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").mkdir()
    with pytest.raises(TrainingError):
        RunDir(tmp_path).recipe()


def test_a_class_file_is_no_way_to_fill_the_memory(tmp_path: Path) -> None:
    """A list of classes of more than a mebibyte is none."""
    path = tmp_path / "classes.txt"
    with path.open("wb") as file:
        file.truncate(1 << 32)
    with pytest.raises(DataError, match="1 MiB"):
        read_class_file(path)


def test_the_seeds_of_the_fuzzers_are_right_manifests(tmp_path: Path) -> None:
    """Else they would try nothing but the first check."""
    for text in manifests():
        _manifest(tmp_path / "manifest.json", text.decode())
