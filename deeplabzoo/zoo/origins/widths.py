"""Encoders told by the channels that their stages end with, for files that hold no encoder's name."""

from collections.abc import Sequence

from torch import Tensor

from deeplabzoo.errors import WeightsError
from deeplabzoo.models.encoder_table import encoder_facts, list_encoders


def encoder_of_widths(pattern: str, ends: Sequence[Tensor]) -> str:
    """Return the encoder named like `pattern` whose stages end with as many channels as these convolutions' weights give.

    Raises WeightsError where there is none.
    """
    widths = tuple(weight.shape[0] for weight in ends)
    for name in list_encoders(pattern):
        if encoder_facts(name).channels[: len(widths)] == widths:
            return name
    raise WeightsError(f"No encoder named {pattern} has stages of {', '.join(map(str, widths))} channels.")
