"""The grammar of model names, `architecture_encoder[_data][.tag]`, without torch."""

from dataclasses import dataclass

from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.errors import UnknownNameError, did_you_mean
from deeplabzoo.models.config import ARCHITECTURES, Architecture
from deeplabzoo.models.encoder_table import canonical_encoder, list_encoders, short_name


@dataclass(frozen=True)
class ModelName:
    """The parts of a model name; `str()` joins them again, with the encoder's short alias."""

    architecture: Architecture
    encoder: str
    """Canonical encoder name."""
    data: str | None = None
    tag: str | None = None

    def __str__(self) -> str:
        return f"{self.untagged}.{self.tag}" if self.tag else self.untagged

    @property
    def untagged(self) -> str:
        """The name without its tag, which all rows of the manifest with this model share."""
        return "_".join(filter(None, (self.architecture, short_name(self.encoder), self.data)))


def parse_name(name: str) -> ModelName:
    """Return the parts of a model name.

    Encoder names hold underscores themselves, so the architecture is the first word, the data set the last one, where it is
    one, and the encoder all between them.

    Args:
        name: `architecture_encoder[_data][.tag]`.

    Raises:
        UnknownNameError: A part is unknown; the message has the nearest known ones.

    >>> parse_name("deeplabv3plus_mobilenetv3_voc")
    ModelName(architecture='deeplabv3plus', encoder='mobilenetv3_large_100', data='voc', tag=None)
    """
    words, dot, tag = name.partition(".")
    first, _, rest = words.partition("_")
    architecture = next((one for one in ARCHITECTURES if one == first), None)
    if architecture is None or not rest or (dot and not tag):
        expected = f"expected architecture_encoder[_data][.tag] with {' or '.join(ARCHITECTURES)} as architecture"
        raise UnknownNameError(f"Unknown model '{name}'; {expected}.{_nearest_names(words)}")
    encoder, _, data = rest.rpartition("_")
    if data not in CLASS_LISTS or not encoder:
        encoder, data = rest, ""
    return ModelName(architecture, _known_encoder(encoder, name), data or None, tag or None)


def _nearest_names(words: str) -> str:
    _, underscore, data = words.rpartition("_")
    suffix = f"_{data}" if underscore and data in CLASS_LISTS else ""
    encoders = [short_name(encoder) for encoder in list_encoders()]
    return did_you_mean(words, (f"{one}_{encoder}{suffix}" for one in ARCHITECTURES for encoder in encoders))


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
        raise UnknownNameError(f"Unknown model '{name}': no dataset is called '{last}'; known are {known}.{guess}") from None
