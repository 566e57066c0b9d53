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


def inverted(rules: Rules) -> Rules:
    r"""Return the rules that turn the new names back into the old ones: one table, read from right to left.

    Rules that leave a tensor out have no way back. A pattern must be made of literal names, escaped dots and groups without
    further groups in them, each of which its template uses once; ValueError names one that is not.

    >>> rename({"encoder.bn1.weight": torch.ones(1)}, inverted([(r"backbone\.(.+)", r"encoder.\1")]), "some").keys()
    dict_keys(['backbone.bn1.weight'])
    """
    return tuple(_inverted(pattern, template) for pattern, template in rules if template is not None)


_PATTERN_PART = re.compile(r"\\(?P<escaped>\.)|\((?:\?P<(?P<name>\w+)>)?(?P<group>(?!\?)[^()]+)\)|(?P<literal>\w)")
_TEMPLATE_PART = re.compile(r"\\g<(?P<name>\w+)>|\\(?P<number>\d)|(?P<literal>[^\\])")


def _inverted(pattern: str, template: str) -> tuple[str, str]:
    groups: dict[str, str] = {}
    theirs, at = "", 0
    while at < len(pattern):
        part = _PATTERN_PART.match(pattern, at)
        if part is None:
            raise ValueError(f"The pattern {pattern!r} has no way back.")
        if part["group"]:
            name = part["name"] or f"_{len(groups) + 1}"
            groups[name] = part["group"]
            theirs += rf"\g<{name}>"
        else:
            theirs += part["literal"] or "."
        at = part.end()
    ours, used = "", []
    for part in _TEMPLATE_PART.finditer(template):
        if part["literal"]:
            ours += re.escape(part["literal"])
        else:
            used.append(part["name"] or f"_{part['number']}")
            ours += f"(?P<{used[-1]}>{groups[used[-1]]})"
    if sorted(used) != sorted(groups):
        raise ValueError(f"The template {template!r} does not use each group of {pattern!r} once.")
    return ours, theirs
