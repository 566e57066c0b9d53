"""Which models and released weights there are, by name, without torch."""

import functools
from dataclasses import replace
from fnmatch import fnmatchcase

from deeplabzoo.errors import UnknownNameError, UsageError, did_you_mean
from deeplabzoo.hub.manifest import WeightRow, released, released_rows
from deeplabzoo.models.config import ARCHITECTURES
from deeplabzoo.models.encoder_table import list_encoders, short_name, supports
from deeplabzoo.models.names import ModelName, parse_name


@functools.cache
def all_model_names(output_stride: int | None = None) -> tuple[str, ...]:
    """Return all model names, sorted; with `output_stride`, those whose encoder was measured to run at it.

    These are each architecture on each usable encoder, and the names with a dataset that have released weights.
    """
    encoders = [short_name(encoder) for encoder in list_encoders(output_stride=output_stride)]
    untrained = {f"{architecture}_{encoder}" for architecture in ARCHITECTURES for encoder in encoders}
    trained = {row.name for row in released() if output_stride is None or supports(row.config.encoder, output_stride)}
    return tuple(sorted(untrained | trained))


def list_models(pattern: str = "*", *, output_stride: int | None = None) -> list[str]:
    """Return model names, sorted: every architecture on every usable encoder, and the models with released weights.

    Args:
        pattern: Shell pattern that a name has to match.
        output_stride: 8, 16 or 32: only models whose encoder was measured to run at it; None for all.

    Raises:
        UsageError: Another output stride.

    >>> list_models("deeplabv3plus_resnet50", output_stride=8)
    ['deeplabv3plus_resnet50']
    """
    if output_stride not in (None, 8, 16, 32):
        raise UsageError(f"output_stride must be 8, 16 or 32, not {output_stride!r}.")
    return [name for name in all_model_names(output_stride) if fnmatchcase(name, pattern)]


def list_weights(pattern: str = "*") -> list[WeightRow]:
    """Return the rows of released weights; `str()` of one is a line of its facts.

    Args:
        pattern: Shell pattern that `name` or `name.tag` has to match.
    """
    return [row for row in released() if fnmatchcase(row.name, pattern) or fnmatchcase(row.full_name, pattern)]


def find_weights(name: ModelName, tag: str | None = None) -> WeightRow:
    """Return the row of a model's released weights: of `tag`, else of the name's own tag, else the default.

    Raises UnknownNameError, which names the tags, or the nearest models, that have weights.
    """
    tag = tag or name.tag
    rows = released_rows(name.untagged)
    for row in rows:
        if row.tag == tag or (tag is None and row.default):
            return row
    if rows:
        tags = ", ".join(row.tag for row in rows)
        raise UnknownNameError(
            f"{name.untagged} has no weights tagged '{tag}'; its tags are {tags}. A file needs its full path."
        )
    trained = sorted({row.name for row in released()})
    same_model = [one for one in trained if replace(parse_name(one), data=None) == replace(name, data=None, tag=None)]
    nearest = f" The same model has weights as {', '.join(same_model)}." if same_model else ""
    raise UnknownNameError(
        f"No weights are released for {name.untagged}; deeplabzoo.list_weights() lists those that are.{nearest}"
        + ("" if nearest else did_you_mean(name.untagged, trained))
    )
