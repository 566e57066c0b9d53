"""The model among the tensors of a weights file: behind wrappers and prefixes, beside losses, optimizers and second copies.

Training code puts a state dict under keys (`state_dict`, `model_ema`) and prefixes (`module.`, `_orig_mod.`, `model.`), beside
other copies of the model (EMA, teacher, momentum encoder). Keys and prefixes are the same thing here: a file is a flat table of
full names, and the model is where a prefix leaves names of a known layout.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from deeplabzoo.checkpoints.safe_pickle import Placeholder
from deeplabzoo.checkpoints.tensor_file import open_contents
from deeplabzoo.errors import WeightsError

_MAX_PREFIX = 12
"""Parts of a prefix that are looked through."""

_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "params")
"""Where training code keeps a model, the likelier first; names of layers (`backbone`, `encoder`) are no wrappers."""
_COMPILED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put before names, at any depth."""
_AVERAGED = re.compile(r"(?:\w+_)?ema(?:_\w+)?|swa\w*|averaged\w*|teacher\w*")
_SECOND = re.compile(r"student\w*|encoder_k|key_encoder|(?:target|momentum)(?:_\w+)?")
"""Copies of a model that its authors do not evaluate: a student, MoCo's key encoder, the target of BYOL."""
_BESIDE = re.compile(
    r"n_averaged|num_updates|decay|steps?|initted|ema_[a-zA-Z0-9_]+|queue(_ptr)?|(?:pixel_)?(?:mean|std)"
    r"|(?:\w*_)?(?:loss|losses|criterion|criteria|metric|metrics|loss_fn|loss_fct)(?:_\w+)?(?:\..+)?"
)
"""Tensors at the top of a state dict that belong to no model: counters of an average, losses, metrics, a second copy."""


@dataclass(frozen=True)
class Model:
    """Where in a file a model is."""

    names: Mapping[str, str]
    """Full name in the file -> name in the model's layout."""
    notes: tuple[str, ...] = ()
    """Which of several copies was taken."""
    outside: int = 0
    """Number of the file's tensors that lie outside the model and outside its copies."""


def find_model(names: Iterable[str], is_layout: Callable[[Collection[str]], bool]) -> Model | None:
    """Return where the tensors of a model lie whose names satisfy `is_layout`, or None where no prefix leads to one.

    Of several copies the one that is evaluated by its authors is taken: an EMA or teacher before the model that was trained, a
    query or online encoder before a momentum encoder. Raises WeightsError where nothing tells two models apart.
    """
    clean = {_COMPILED.sub("", name): name for name in names}
    found = dict(_layouts("", {name: name for name in clean}, is_layout, 0))
    if not found:
        return None
    prefix, is_average = _best(found, clean)
    own = {clean[name]: inside for name, inside in found[prefix].items() if not _BESIDE.fullmatch(inside)}
    copies = [other for other in found if other != prefix]
    notes = []
    if copies or is_average:
        left = f", those under {', '.join(repr(one.rstrip('.')) for one in copies)} left out" if copies else ""
        place = f" under '{prefix.rstrip('.')}'" if prefix else ""
        notes.append(f"{'EMA ' if is_average else ''}weights{place} taken{left}")
    inside = len(own) + sum(len(found[other]) for other in copies)
    return Model(own, tuple(notes), len(clean) - inside)


def _layouts(
    prefix: str, inside: Mapping[str, str], is_layout: Callable[[Collection[str]], bool], depth: int
) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield each prefix that leads to a layout, and its names (with prefix -> without); top down, and no further inside one."""
    if is_layout(set(inside.values())):
        yield prefix, inside
    elif depth < _MAX_PREFIX:
        groups: dict[str, dict[str, str]] = {}
        for name, rest in inside.items():
            first, dot, after = rest.partition(".")
            if dot:
                groups.setdefault(first, {})[name] = after
        for first, group in groups.items():
            if len(group) > 1:
                yield from _layouts(f"{prefix}{first}.", group, is_layout, depth + 1)


def _best(prefixes: Collection[str], names: Collection[str]) -> tuple[str, bool]:
    """Return the prefix of the copy to take, and whether it is an average (EMA)."""
    # mmengine swaps the two before it saves: the average is under state_dict, what was trained under ema_state_dict
    swapped = "ema_state_dict.steps" in names

    def rank(prefix: str) -> tuple[int, int]:
        parts = prefix.split(".")[:-1]
        averaged = any(_AVERAGED.fullmatch(part) for part in parts)
        second = any(_SECOND.fullmatch(part) for part in parts)
        order = [_WRAPPERS.index(part) if part in _WRAPPERS else len(_WRAPPERS) for part in parts[:1]]
        return (2 if second else 0 if averaged != swapped else 1), (order or [0])[0]

    first, *others = sorted(prefixes, key=rank)
    if any(rank(first) == rank(other) for other in others):
        both = ", ".join(repr(one.rstrip(".")) for one in (first, *others))
        raise WeightsError(
            f"The file holds several models ({both}) and does not tell which one to take; save the state dict of one."
        )
    average = any(_AVERAGED.fullmatch(part) and not part.startswith("teacher") for part in first.split(".")) and not swapped
    return first, average or (
        swapped and first.startswith("state_dict.")
    ) or f"{first.removesuffix('module.')}n_averaged" in names


def unwrap(names: Iterable[str]) -> dict[str, str]:
    """Return full name -> name without the wrappers that a state dict of any layout is kept in.

    Beside an average or another copy nothing is unwrapped: which of them is wanted is found later, by the names of an encoder.
    """
    inside = {name: _COMPILED.sub("", name) for name in names}
    while True:
        counts = Counter(name.partition(".")[0] for name in inside.values() if "." in name)
        best = next((one for one in _WRAPPERS if one in counts), None)
        has_copies = any(_AVERAGED.fullmatch(one) or _SECOND.fullmatch(one) for one in counts)
        if best is None or has_copies or counts[best] * 4 < len(inside):
            return inside
        inside = {name: rest.partition(".")[2] for name, rest in inside.items() if rest.startswith(f"{best}.")}


def find_encoder(
    tensors: Mapping[str, Tensor], expected: Collection[str]
) -> tuple[dict[str, Tensor], list[str], tuple[str, ...]]:
    """Return an encoder's tensors under the `expected` names wherever they lie, the names left over, and which copy was taken.

    timm's feature extractors write `stages_0` for what its classifiers call `stages.0`, so dots and underscores count as equal.
    """
    ours = {re.sub(r"[._]", "_", name): name for name in expected}
    found: dict[str, dict[str, str]] = {}
    for full in tensors:
        name = _COMPILED.sub("", full)
        parts = name.split(".")
        for at in range(len(parts)):
            if match := ours.get(re.sub(r"[._]", "_", ".".join(parts[at:]))):
                found.setdefault("".join(f"{part}." for part in parts[:at]), {})[match] = full
    most = max((len(names) for names in found.values()), default=0)
    complete = {prefix: names for prefix, names in found.items() if len(names) == most}
    if not complete:
        return {}, list(tensors), ()
    prefix, is_average = _best(complete, tensors)
    others = [one for one in complete if one != prefix]
    left = f", those under {', '.join(repr(one.rstrip('.')) for one in others)} left out" if others else ""
    notes = (f"{'EMA ' if is_average else ''}weights under '{prefix.rstrip('.')}' taken{left}",) if others or is_average else ()
    used = {name for names in complete.values() for name in names.values()}
    own = {new: tensors[full] for new, full in complete[prefix].items()}
    return own, [name for name in tensors if name not in used], notes


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file by name, without wrappers, in float32 on the CPU.

    Raises WeightsError, in one sentence, for a file that is empty, damaged, of another kind, or holds no plain tensors by name.
    """
    with open_contents(path) as contents:
        return contents.load(unwrap(contents.tensors))


# Facts beside the tensors.


def find_classes(value: Any) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...] | None] | None:
    """Return the class names that a training script kept in its file, and their colours where it kept them; else None.

    Looked for in `meta` (mmcv), `meta.dataset_meta` (mmengine), `hyper_parameters` (Lightning) and at the top.
    """
    places = [value]
    for key in ("meta", "dataset_meta", "hyper_parameters", "args", "config"):
        places += [inside for one in places if isinstance(inside := _items(one).get(key), dict | Placeholder)]
    for place in reversed(places):
        items = _items(place)
        for key in ("CLASSES", "classes", "class_names"):
            names = items.get(key)
            if isinstance(names, list | tuple) and names and all(isinstance(one, str) and 0 < len(one) <= 200 for one in names):
                return tuple(names), _palette(items.get("PALETTE") or items.get("palette"), len(names))
    return None


def _items(value: Any) -> dict[Any, Any]:
    if isinstance(value, Placeholder):
        return value.items or (value.state if isinstance(value.state, dict) else {})
    return value if isinstance(value, dict) else {}


def _palette(value: Any, count: int) -> tuple[tuple[int, int, int], ...] | None:
    if not isinstance(value, list | tuple) or len(value) != count:
        return None
    if not all(
        isinstance(one, list | tuple) and len(one) == 3 and all(type(c) is int and 0 <= c <= 255 for c in one) for one in value
    ):
        return None
    return tuple((one[0], one[1], one[2]) for one in value)
