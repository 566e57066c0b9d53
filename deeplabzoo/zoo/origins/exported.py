"""What an origin hands out: a network of ours in another library's terms, or the sentence on why it cannot be."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from deeplabzoo.errors import WeightsError
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.heads import effective_rates

_TRAINING_ONLY = {"dropout", "aux_head"}
"""Fields that no logit in evaluation depends on."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A network under the names of another library, whose own class loads it with nothing missing or left over."""

    state_dict: Mapping[str, Tensor]
    build: str = ""
    """The Python expression that makes the network which takes the state dict; empty where folders alone are usual."""
    folder: str = ""
    """The Python expression that reads `{folder}` with these tensors and settings; empty where the library has no such form."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """JSON files of that folder by name."""
    notes: tuple[str, ...] = ()
    """What was left out, filled in, or is not kept, as short phrases."""


def require_same_arithmetic(ours: DeepLabConfig, theirs: DeepLabConfig, library: str, ignore: Collection[str] = ()) -> None:
    """Raise WeightsError, in one sentence with every difference, unless a network means the same in another library.

    `theirs` is what the library computes with these tensors; `ignore` names fields that do not matter there.
    """
    if ours.architecture != theirs.architecture:
        raise WeightsError(f"{library} has no {ours.architecture} on {ours.encoder}.")
    left, right = _plain(ours), _plain(theirs)
    names = [name for name in left if name not in (*ignore, *_TRAINING_ONLY) and left[name] != right[name]]
    if not names:
        return
    of_them = ", ".join(f"{name} {json.dumps(right[name])}" for name in names)
    of_us = ", ".join(f"{name} {json.dumps(left[name])}" for name in names)
    raise WeightsError(f"{library} would compute other logits: its network has {of_them}, and this one has {of_us}.")


def without_auxiliary(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without those of the auxiliary head, which is for training alone."""
    return {name: tensor for name, tensor in state_dict.items() if not name.startswith("aux_head.")}


def _plain(config: DeepLabConfig) -> dict[str, Any]:
    """Return the fields that this architecture has, with what None means written out."""
    plus = config.architecture == "deeplabv3plus"
    separable = plus if config.aspp_separable is None else config.aspp_separable
    plain = dataclasses.asdict(config) | {"atrous_rates": list(effective_rates(config)), "aspp_separable": separable}
    unused = {"refine_conv"} if plus else {name for name in plain if name.startswith("decoder_")}
    if not effective_rates(config):
        unused |= {"aspp_separable"}
        separable = False
    if not separable and not (plus and config.decoder_separable):
        unused |= {"depthwise_norm"}
    if config.output_stride == 32:
        unused |= {"encoder_dilate_strided", "encoder_dilate_local_conv"}
    return {name: value for name, value in plain.items() if name not in unused}
