"""A checkpoint in our names and layout, whatever program wrote the file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from deeplabzoo.data.classes import Palette
from deeplabzoo.models.config import DeepLabConfig, Preprocessing

NATIVE, BARE = "deeplabzoo", "state dict"
"""Format names of our own files, and of files with tensors under our names and nothing beside them."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Enough to build a model, or an encoder for a new one; a field that the file does not state is None.

    A segmentation model has a `config`, and its `state_dict` loads strictly into `DeepLab(config)`. A classifier has no
    `config` and names its `encoder`; its tensor names are then relative to `DeepLab.encoder`. A bare state dict has neither.
    """

    format_name: str
    """`deeplabzoo`, the name of a converter such as `tflite`, or `state dict`."""
    config: DeepLabConfig | None
    encoder: str | None
    """Canonical encoder name."""
    state_dict: Mapping[str, Tensor]
    """Tensors on the CPU by name, float32 unless the reader was asked for another dtype."""
    classes: tuple[str, ...] | None = None
    """Class names, background first."""
    palette: Palette | None = None
    preprocessing: Preprocessing | None = None
    dropped: tuple[str, ...] = ()
    """What the file holds and a model here does not use, as short phrases for the log line."""
    notes: tuple[str, ...] = ()
    """What was assumed because the file does not state it, as short phrases for the log line."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Origin, for reports: `source` (path or address), `sha256`, `trained`, `name` and `tag` of released weights."""

    @property
    def is_converted(self) -> bool:
        """Whether a converter read it."""
        return self.format_name not in (NATIVE, BARE)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What was dropped and what was assumed."""
        return (*(f"{one} dropped" for one in self.dropped), *self.notes)

    @property
    def label(self) -> str:
        """Its name in messages: `name.tag` of released weights, else where it comes from."""
        name, tag = self.source.get("name"), self.source.get("tag")
        return f"{name}.{tag}" if name else str(self.source.get("source", "the checkpoint"))
