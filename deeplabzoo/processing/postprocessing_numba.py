"""Labels straight from small logits, one cell at a time, compiled (import this only where `jit.numba_available()`).

A cell is the rectangle between four neighbouring low-resolution logits. Bilinear weights are convex, so a class that one and
the same other class beats at all four corners cannot win inside: where the corners agree on the winner the cell is filled,
and elsewhere only the classes that are left are interpolated, in the order of `bilinear.lerp`: rows first.

Equal logits go to the first class, as in torch.argmax: where two classes are equal at some corner, both stay in the race.
"""

import functools
import itertools
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from deeplabzoo.models.interpolation import InterpolationAxis
from deeplabzoo.numba_jit import cached_njit, inner_njit

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]

LANES = 16
"""Classes are compared in blocks of this length, which compilers turn into one or two vector instructions."""

_FLOAT32_LOWEST = np.float32(-3.4028235e38)
_INF_BITS = 0x7F800000


@cached_njit
def upsample_argmax_cells(
    low: Float32Array,
    bits: Int32Array,
    channels_last: bool,
    classes: int,
    low_hw: tuple[int, int],
    cell_rows: tuple[int, int],
    row_starts: Int32Array,
    row_weights: Float32Array,
    column_starts: Int32Array,
    column_weights: Float32Array,
    labels_HW: npt.NDArray[np.integer],
) -> bool:
    """Write the labels of the pixels in a range of cell rows; return False, with labels unfinished, at a NaN or infinity.

    `low` holds one picture's logits, flat, h x w x classes or classes x h x w, and `bits` the same memory as int32. Cell row i
    covers the output rows `row_starts[i]` to `row_starts[i + 1]`, below it at `row_weights`; columns likewise.
    """
    h, w = low_hw
    padded = -(-classes // LANES) * LANES
    widest = 1
    for j in range(w):
        widest = max(widest, column_starts[j + 1] - column_starts[j])
    above, below = np.empty(w, np.int32), np.empty(w, np.int32)
    corners = np.full(4 * padded, _FLOAT32_LOWEST, np.float32)
    margin = np.empty(padded, np.float32)
    candidates = np.empty(padded, np.int32)
    boundary = np.empty(w, np.int32)
    best, winner = np.empty(widest, np.float32), np.empty(widest, np.int32)
    known = -1
    for i in range(cell_rows[0], cell_rows[1]):
        top, bottom = row_starts[i], row_starts[i + 1]
        if top == bottom:
            continue
        if known == i:
            above, below = below, above
        elif not _argmax_row(low, bits, channels_last, classes, h, w, i, above):
            return False
        under = min(i + 1, h - 1)
        if not _argmax_row(low, bits, channels_last, classes, h, w, under, below):
            return False
        known = under
        count = _fill(above, below, column_starts, top, bottom, boundary, labels_HW)
        for place in range(count):
            j = boundary[place]
            right = min(j + 1, w - 1)
            _gather(low, channels_last, classes, h, w, i, j, corners, 0)
            _gather(low, channels_last, classes, h, w, i, right, corners, padded)
            _gather(low, channels_last, classes, h, w, under, j, corners, 2 * padded)
            _gather(low, channels_last, classes, h, w, under, right, corners, 3 * padded)
            left_over = _candidates(
                corners, padded, classes, above[j], above[right], below[j], below[right], margin, candidates
            )
            left, end = column_starts[j], column_starts[j + 1]
            for y in range(top, bottom):
                down = row_weights[y]
                up = np.float32(1) - down
                for n in range(left_over):
                    c = candidates[n]
                    from_left = corners[c] * up + corners[2 * padded + c] * down
                    from_right = corners[padded + c] * up + corners[3 * padded + c] * down
                    for x in range(end - left):
                        value = from_left * (np.float32(1) - column_weights[left + x]) + from_right * column_weights[left + x]
                        better = n == 0 or value > best[x]
                        best[x] = value if better else best[x]
                        winner[x] = c if better else winner[x]
                for x in range(end - left):
                    labels_HW[y, left + x] = winner[x]
    return True


@inner_njit
def _argmax_row(
    low: Float32Array, bits: Int32Array, channels_last: bool, classes: int, h: int, w: int, i: int, winners: Int32Array
) -> bool:
    """Write the first largest class of every place in low row i; return whether all its logits are finite."""
    largest = np.int32(0)
    if channels_last:
        start = i * w * classes
        for n in range(start, start + w * classes):
            largest = max(largest, bits[n] & np.int32(0x7FFFFFFF))
        for j in range(w):
            at = start + j * classes
            top, first = low[at], np.int32(0)
            for c in range(1, classes):
                better = low[at + c] > top
                top = low[at + c] if better else top
                first = np.int32(c) if better else first
            winners[j] = first
    else:
        tops = np.empty(w, np.float32)
        for c in range(classes):
            start = (c * h + i) * w
            for j in range(w):
                largest = max(largest, bits[start + j] & np.int32(0x7FFFFFFF))
                value = low[start + j]
                better = c == 0 or value > tops[j]
                tops[j] = value if better else tops[j]
                winners[j] = np.int32(c) if better else winners[j]
    return bool(largest < _INF_BITS)


@inner_njit
def _fill(
    above: Int32Array,
    below: Int32Array,
    column_starts: Int32Array,
    top: int,
    bottom: int,
    boundary: Int32Array,
    labels_HW: npt.NDArray[np.integer],
) -> int:
    """Fill the cells of one row whose corners agree; write down the others' columns and return their number."""
    w = len(above)
    count = 0
    for j in range(w):
        left, end = column_starts[j], column_starts[j + 1]
        if left == end:
            continue
        right = min(j + 1, w - 1)
        label = above[j]
        if label == above[right] and label == below[j] and label == below[right]:
            for x in range(left, end):
                labels_HW[top, x] = label
        else:
            boundary[count] = j
            count += 1
    for y in range(top + 1, bottom):
        labels_HW[y] = labels_HW[top]
    return count


@inner_njit
def _gather(
    low: Float32Array, channels_last: bool, classes: int, h: int, w: int, i: int, j: int, corners: Float32Array, at: int
) -> None:
    if channels_last:
        start = (i * w + j) * classes
        for c in range(classes):
            corners[at + c] = low[start + c]
    else:
        for c in range(classes):
            corners[at + c] = low[(c * h + i) * w + j]


@inner_njit
def _candidates(
    corners: Float32Array,
    padded: int,
    classes: int,
    first: int,
    second: int,
    third: int,
    fourth: int,
    margin: Float32Array,
    candidates: Int32Array,
) -> int:
    """Write, in ascending order, the classes that no corner's winner beats at all four corners; return their number.

    `margin` is a class's lead over the winner against which it does worst, at the corner where it does best; at 0 they are
    equal there, and the class stays, as the first of equal ones wins.
    """
    for n in range(padded):
        margin[n] = np.float32(3.4028235e38)
    for turn, rival in enumerate((first, second, third, fourth)):
        if (turn > 0 and rival == first) or (turn > 1 and rival == second) or (turn > 2 and rival == third):
            continue
        a, b = corners[rival], corners[padded + rival]
        c, d = corners[2 * padded + rival], corners[3 * padded + rival]
        for block in range(0, padded, LANES):
            for lane in range(LANES):
                n = block + lane
                lead = max(
                    max(corners[n] - a, corners[padded + n] - b),
                    max(corners[2 * padded + n] - c, corners[3 * padded + n] - d),
                )
                margin[n] = min(margin[n], lead)
    count = 0
    for n in range(classes):
        candidates[count] = n
        count += margin[n] >= 0
    return count


# The compiled cells on as many threads as torch uses (import this only where `jit.numba_available()`).
#
# Blocks of cell rows lie in a queue; the caller works on it together with threads of its own pool, and gives up those that did
# not get going in time. Nothing is shared but the labels' memory, so any number of callers may do this at once.


BLOCK_PIXELS = 2**16
"""Output pixels below which another thread costs more than it brings."""


def upsample_argmax_by_block(
    low_BCHW: torch.Tensor, rows: InterpolationAxis, columns: InterpolationAxis, labels_BHW: torch.Tensor
) -> bool:
    """Write the first largest class of every upsampled pixel; return False, labels unfinished, where a logit is not finite.

    `low_BCHW` is float32 on the CPU, in either memory layout; others are copied.
    """
    batch, classes, h, w = low_BCHW.shape
    if labels_BHW.numel() == 0:
        return True
    channels_last = classes > 1 and low_BCHW.is_contiguous(memory_format=torch.channels_last)
    low = (low_BCHW.permute(0, 2, 3, 1) if channels_last else low_BCHW.contiguous()).numpy().reshape(batch, -1)
    labels = labels_BHW.numpy()
    threads = torch.get_num_threads()
    count = max(1, min(h, 4 * threads, labels[0].size // BLOCK_PIXELS))
    queue = deque((b, block) for b in range(batch) for block in _blocks(rows, count))
    finite: list[bool] = []

    def work() -> None:
        while True:
            try:
                b, block = queue.popleft()
            except IndexError:
                return
            finite.append(
                upsample_argmax_cells(
                    low[b],
                    low[b].view(np.int32),
                    channels_last,
                    classes,
                    (h, w),
                    block,
                    rows.starts,
                    rows.weights,
                    columns.starts,
                    columns.weights,
                    labels[b],
                )
            )
            if not finite[-1]:
                queue.clear()

    helpers = [_pool(os.getpid()).submit(work) for _ in range(min(threads, len(queue)) - 1)]
    work()
    for helper in helpers:
        if not helper.cancel():
            helper.result()
    return all(finite)


def _blocks(rows: InterpolationAxis, count: int) -> list[tuple[int, int]]:
    """Ranges of cell rows with about equally many output rows."""
    edges = [int(rows.above[len(rows.above) * n // count]) for n in range(count)]
    edges = sorted({0, *edges, rows.source})
    return list(itertools.pairwise(edges))


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this very process: a fork inherits the pool but none of its threads."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="deeplabzoo-labels")
