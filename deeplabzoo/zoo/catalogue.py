"""Every name there is: each architecture on each usable encoder, and those names with data that have released weights."""

import functools

from deeplabzoo.models.config import ARCHITECTURES
from deeplabzoo.models.encoder_table import list_encoders, short_name, supports
from deeplabzoo.zoo.manifest import released


@functools.cache
def every_name(output_stride: int | None = None) -> tuple[str, ...]:
    """Return all model names, sorted; with `output_stride` only those whose encoder was measured to run at it."""
    encoders = [short_name(encoder) for encoder in list_encoders(output_stride=output_stride)]
    networks = {f"{architecture}_{encoder}" for architecture in ARCHITECTURES for encoder in encoders}
    trained = {row.name for row in released() if output_stride is None or supports(row.config.encoder, output_stride)}
    return tuple(sorted(networks | trained))
