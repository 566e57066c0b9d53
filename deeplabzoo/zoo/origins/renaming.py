"""Tensor names of one layout turned into those of another, by rules that must cover every name."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deeplabzoo.errors import WeightsError

Rules = Sequence[tuple[str, str | None]]
"""(pattern of a whole name, what it becomes with \\1 for its groups, or None to leave the tensor out); the first fit counts."""


def rename(tensors: Mapping[str, Tensor], rules: Rules, origin: str) -> dict[str, Tensor]:
    """Return the tensors under their new names; raises WeightsError for a name that no rule covers or two that become one.

    Counters of batches, which files from before PyTorch 0.4.1 lack and evaluation never reads, are added as 0.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        matches = ((re.fullmatch(pattern, name), template) for pattern, template in rules)
        found, template = next((match for match in matches if match[0]), (None, None))
        if found is None:
            raise WeightsError(f"The {origin} checkpoint has a tensor '{name}' that its layout does not know.")
        if template is None:
            continue
        new = found.expand(template)
        if new in renamed:
            raise WeightsError(f"The {origin} checkpoint has more than one tensor for '{new}', the last of them '{name}'.")
        renamed[new] = tensor
    norms = [name.removesuffix("running_var") for name in renamed if name.endswith(".running_var")]
    return {f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms} | renamed
