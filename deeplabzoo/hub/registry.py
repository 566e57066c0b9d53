"""The grammar of names, `architecture_encoder[_data][.tag]`, and the questions that can be asked of all of them.

A name is parsed from both ends, since encoder names hold underscores themselves: the architecture is the first word, the
data set the last one, if it is one, and the encoder what stays between. Nothing here imports torch.
"""

import functools
from dataclasses import replace
from fnmatch import fnmatchcase

from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.errors import UnknownNameError, UsageError, did_you_mean
from deeplabzoo.hub.manifest import WeightRow, released
from deeplabzoo.models.config import ARCHITECTURES
from deeplabzoo.models.encoder_table import canonical_encoder, list_encoders, short_name, supports
from deeplabzoo.models.names import ModelName

# Every name there is: each architecture on each usable encoder, and those names with data that have released weights.


@functools.cache
def all_model_names(output_stride: int | None = None) -> tuple[str, ...]:
    """Return all model names, sorted; with `output_stride` only those whose encoder was measured to run at it."""
    encoders = [short_name(encoder) for encoder in list_encoders(output_stride=output_stride)]
    networks = {f"{architecture}_{encoder}" for architecture in ARCHITECTURES for encoder in encoders}
    trained = {row.name for row in released() if output_stride is None or supports(row.config.encoder, output_stride)}
    return tuple(sorted(networks | trained))


def parse_name(name: str) -> ModelName:
    """Take a model name apart; raises UnknownNameError that says which word is unknown and names the nearest known one.

    >>> parse_name("deeplabv3plus_mobilenetv3_voc")
    ModelName(architecture='deeplabv3plus', encoder='mobilenetv3_large_100', data='voc', tag=None)
    """
    words, dot, tag = name.partition(".")
    first, _, rest = words.partition("_")
    architecture = next((one for one in ARCHITECTURES if one == first), None)
    if architecture is None or not rest or (dot and not tag):
        expected = f"expected architecture_encoder[_data][.tag] with {' or '.join(ARCHITECTURES)} as architecture"
        raise UnknownNameError(f"Unknown model '{name}'; {expected}.{did_you_mean(words, all_model_names())}")
    encoder, _, data = rest.rpartition("_")
    if data not in CLASS_LISTS or not encoder:
        encoder, data = rest, ""
    return ModelName(architecture, _known_encoder(encoder, name), data or None, tag or None)


def list_models(pattern: str = "*", *, output_stride: int | None = None) -> list[str]:
    """Return the names that match a shell pattern, sorted: every architecture on every usable encoder, and trained ones.

    With `output_stride` (8, 16 or 32) only models whose encoder was measured to run at it are named. Raises UsageError on
    another stride.

    >>> list_models("deeplabv3plus_resnet50", output_stride=8)
    ['deeplabv3plus_resnet50']
    """
    if output_stride not in (None, 8, 16, 32):
        raise UsageError(f"output_stride must be 8, 16 or 32, not {output_stride!r}.")
    return [name for name in all_model_names(output_stride) if fnmatchcase(name, pattern)]


def list_weights(pattern: str = "*") -> list[WeightRow]:
    """Return the released files whose `name` or `name.tag` matches a shell pattern; each row prints as one line."""
    return [row for row in released() if fnmatchcase(row.name, pattern) or fnmatchcase(row.full_name, pattern)]


def find_weights(name: ModelName, tag: str | None = None) -> WeightRow:
    """Return the released file for a name: of `tag`, else of the name's own tag, else the default one.

    Raises UnknownNameError that names the tags, or the nearest models, that do have weights.
    """
    tag = tag or name.tag
    rows = [row for row in released() if row.name == name.untagged]
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
    nearest = f" The same network has weights as {', '.join(same_model)}." if same_model else ""
    raise UnknownNameError(
        f"No weights are released for {name.untagged}; deeplabzoo.list_weights() lists those that are.{nearest}"
        + ("" if nearest else did_you_mean(name.untagged, trained))
    )


def _known_encoder(encoder: str, name: str) -> str:
    try:
        return canonical_encoder(encoder)
    except UnknownNameError as error:
        before, _, last = encoder.rpartition("_")
        try:
            canonical_encoder(before)
        except UnknownNameError:
            raise UnknownNameError(f"Unknown model '{name}': {error}") from None
        guess = did_you_mean(last, CLASS_LISTS)
        known = ", ".join(CLASS_LISTS)
        raise UnknownNameError(f"Unknown model '{name}': no data set is called '{last}'; known are {known}.{guess}") from None
