"""The grammar of model names: `architecture_encoder[_data][.tag]`."""

from dataclasses import dataclass, replace

from deeplabzoo.models.config import Architecture
from deeplabzoo.models.encoder_table import short_name


@dataclass(frozen=True)
class ModelName:
    """A model name taken apart; `str()` puts it together again with the encoder's short alias."""

    architecture: Architecture
    encoder: str
    """Canonical encoder name."""
    data: str | None = None
    tag: str | None = None

    def __str__(self) -> str:
        words = "_".join(filter(None, (self.architecture, short_name(self.encoder), self.data)))
        return f"{words}.{self.tag}" if self.tag else words

    @property
    def untagged(self) -> str:
        """The name without its tag: what manifest rows share."""
        return str(replace(self, tag=None))
