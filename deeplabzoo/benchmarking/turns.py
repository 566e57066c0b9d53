"""Times of several sides that take turns, A B A B …: the only fair way on a machine whose speed drifts."""

import functools
import time
from collections.abc import Callable, Mapping

import torch
from tqdm import tqdm

from deeplabzoo.errors import UsageError

_SETTLE_S = 0.02
"""Before each turn: worker threads of the side before (OpenMP, ONNX Runtime) spin for a while, which must not be paid here."""
_TURN_S = 0.1
"""A side whose call is shorter is called until its turn is as long as this; the turn's time is the mean of its calls."""
_CALLS_AT_MOST = 1000


def alternate(turns: Mapping[str, Callable[[], float]], pairs: int, *, name: str = "measure") -> dict[str, list[float]]:
    """Return what each side's turns gave: each round has one turn of each side, in the order given.

    Raises UsageError for less than one pair.
    """
    if pairs < 1:
        raise UsageError(f"--pairs must be at least 1, not {pairs}.")
    times: dict[str, list[float]] = {side: [] for side in turns}
    with tqdm(total=len(turns) * pairs, desc=name, unit="turn", leave=False, disable=None) as progress:
        for _ in range(pairs):
            for side, take in turns.items():
                progress.set_postfix_str(side)
                times[side].append(take())
                progress.update()
    return times


def in_turns(
    sides: Mapping[str, Callable[[], object]], pairs: int, *, device: torch.device | None = None, name: str = "measure"
) -> dict[str, list[float]]:
    """Return milliseconds a call, one figure a turn, for functions of this process; each is called once before its first turn.

    Raises UsageError for less than one pair.
    """
    for call in sides.values():
        call()
    turns = {side: functools.partial(turn, call, device) for side, call in sides.items()}
    return alternate(turns, pairs, name=name)


def turn(call: Callable[[], object], device: torch.device | None = None) -> float:
    """Return milliseconds a call: a pause, one call that does not count, then calls that do (on a GPU timed by events)."""
    time.sleep(_SETTLE_S)
    call()
    if device is not None and device.type == "cuda":
        return _on_gpu(call, device)
    begun = time.perf_counter()
    call()
    once = time.perf_counter() - begun
    more = min(_CALLS_AT_MOST, int(_TURN_S / max(once, 1e-9)))
    begun_again = time.perf_counter()
    for _ in range(more):
        call()
    seconds = once + (time.perf_counter() - begun_again)
    return 1000 * seconds / (1 + more)


def every_thread_flushes() -> bool:
    """Whether torch's worker threads let denormals be zero, found by computing with them in all of them."""
    tiny = torch.full((1 << 22,), 1e-39)
    return not bool((tiny * 1.0).any())


def _on_gpu(call: Callable[[], object], device: torch.device) -> float:
    torch.cuda.synchronize(device)
    calls = 1
    while True:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize(device)
        milliseconds = float(begin.elapsed_time(end))
        if milliseconds >= 1000 * _TURN_S or calls >= _CALLS_AT_MOST:
            return milliseconds / calls
        calls = min(_CALLS_AT_MOST, max(2 * calls, int(calls * 1000 * _TURN_S / max(milliseconds, 1e-3))))
