"""What every origin hands back: a foreign checkpoint in our own terms, whatever the file looked like."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from deeplabzoo.models.config import DeepLabConfig, Preprocessing


@dataclass(frozen=True, kw_only=True)
class ConvertedCheckpoint:
    """A foreign checkpoint in our names and layout: enough to build the network, or an encoder for a new one.

    A segmentation file has a `config`, and its `state_dict` loads strictly into `DeepLab(config)`. A classifier has
    `config=None` and names its `encoder`; its `state_dict` keys are then relative to `DeepLab.encoder`.
    """

    format_name: str
    """Name of the format, such as `tflite`."""
    config: DeepLabConfig | None
    encoder: str | None
    """Canonical encoder name, set in both cases."""
    state_dict: Mapping[str, Tensor]
    """float32 tensors on the CPU."""
    classes: tuple[str, ...] | None
    """Class names, background first; None where the file names none and none can be inferred (an encoder)."""
    palette: tuple[tuple[int, int, int], ...] | None
    preprocessing: Preprocessing
    dropped: tuple[str, ...] = ()
    """What the file holds and we do not use, as short phrases for the loading line."""
    notes: tuple[str, ...] = ()
    """What was assumed because the file does not say, as short phrases for the loading line."""
