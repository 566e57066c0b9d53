"""Hypothesis drives the parsers of text and JSON: any value ends in our own error, and what is read says the same again."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from fuzz.contract import the_watch
from fuzz.targets import TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deeplabzoo.data.class_file import read_class_file
from deeplabzoo.errors import DataError, DeepLabZooError, UnknownNameError, UsageError
from deeplabzoo.models.encoder_table import ALIASES
from deeplabzoo.models.names import parse_name
from deeplabzoo.strict_json import parse_json
from deeplabzoo.training.overrides import apply_overrides, recipe_from_dict
from deeplabzoo.training.recipes import get_recipe

EXAMPLES = settings(
    max_examples=int(os.environ.get("DEEPLABZOO_EXAMPLES", 60)),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
FIELDS = sorted(get_recipe("shapes").to_dict())
WORDS = ("deeplabv3", "deeplabv3plus", "voc", "cityscapes", *ALIASES)
COLOURS = st.tuples(*[st.integers(0, 255)] * 3)


@EXAMPLES
@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=4), st.text(max_size=8))
def test_a_name_is_read_as_itself_or_refused(words: list[str], tag: str) -> None:
    """`str` of a name that was taken apart is a name of the same parts."""
    name = "_".join(words) + (f".{tag}" if tag else "")
    try:
        parsed = parse_name(name)
    except UnknownNameError:
        return
    assert parse_name(str(parsed)) == parsed


@EXAMPLES
@given(JSON)
def test_plain_values_go_through_json_unchanged(value: Any) -> None:
    """The strict reader refuses nothing that has one meaning."""
    assert parse_json(json.dumps(value)) == value


@EXAMPLES
@given(st.sampled_from(FIELDS), JSON)
def test_any_value_of_any_field_of_a_recipe_is_fitted_or_refused(field: str, value: Any) -> None:
    """In the file, and after `--set`; a recipe that is accepted comes back from its own JSON."""
    plain = get_recipe("shapes").to_dict()
    for make in (
        lambda: recipe_from_dict({**plain, field: value}),
        lambda: apply_overrides(get_recipe("shapes"), [f"{field}={json.dumps(value)}"]),
    ):
        try:
            recipe = make()
        except UsageError:
            continue
        assert recipe_from_dict(parse_json(json.dumps(recipe.to_dict()))) == recipe


@EXAMPLES
@given(
    place=st.lists(
        st.sampled_from(["rows", "config", "source", "metrics", "license", "training", "preprocessing"]), max_size=2
    ),
    value=JSON,
)
def test_any_value_anywhere_in_a_manifest_ends_in_a_sentence(place: list[str], value: Any, tmp_path: Path) -> None:
    """The row that it stands in is otherwise right."""
    tree = json.loads(TARGETS["manifest"].seeds()[1])
    row = tree["rows"][0]
    if place[:1] == ["rows"]:
        tree["rows"] = value
    elif place:
        row[place[0]] = value
    else:
        tree = value
    assert the_watch().run(TARGETS["manifest"], json.dumps(tree).encode(), tmp_path) is None


@EXAMPLES
@given(
    pairs=st.lists(
        st.tuples(st.text("abcdefgh äöü", min_size=1, max_size=12).map(str.strip).filter(bool), COLOURS), min_size=1, max_size=8
    )
)
def test_a_list_of_classes_is_read_as_it_was_written(pairs: list[tuple[str, tuple[int, int, int]]], tmp_path: Path) -> None:
    """Names and colours come back, or the repeated one is named."""
    path = tmp_path / "classes.txt"
    path.write_text("".join(f"{name} {red},{green},{blue}\n" for name, (red, green, blue) in pairs))
    names, colours = [name for name, _ in pairs], [colour for _, colour in pairs]
    try:
        known = read_class_file(path)
    except DataError:
        assert len(set(names)) < len(names) or len(set(colours)) < len(colours)
    else:
        assert (list(known.classes), list(known.palette)) == (names, colours)


@EXAMPLES
@given(text=st.text(max_size=60))
@pytest.mark.parametrize("name", ["palettes", "names", "recipes"])
def test_any_text_ends_in_a_sentence(name: str, text: str, tmp_path: Path) -> None:
    data = text.encode("utf-8", "surrogatepass")
    assert the_watch().run(TARGETS[name], data, tmp_path) is None
    assert the_watch().outcome is None or isinstance(the_watch().outcome, DeepLabZooError)
