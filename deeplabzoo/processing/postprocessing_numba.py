"""Fused upsampling and arg-max in compiled loops (import this module only where `numba_jit.numba_available()`).

A cell is the rectangle between four neighbouring low-resolution logits. Bilinear weights are convex, so a class that loses to
one and the same other class at all four corners cannot win inside the cell: where the corners agree on the winner the cell is
filled, and elsewhere only the remaining classes are interpolated, rows first, in the order of
`models.interpolation.interpolate_rows`.

Equal logits give the first class, as in torch.argmax: where two classes are equal at some corner, both remain candidates.
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
"""Classes are compared in blocks of this length, which LLVM compiles to one or two vector instructions."""

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

    Args:
        low: Logits of one image, flat: h x w x classes if `channels_last`, else classes x h x w.
        bits: The same memory as int32, for the test for NaN and infinity.
        channels_last: Memory layout of `low`.
        classes: Number of classes.
        low_hw: Height and width of the logits.
        cell_rows: First cell row and the one after the last.
        row_starts: Cell row i covers the output rows `row_starts[i]` to `row_starts[i + 1]`.
        row_weights: For every output row the weight of the logits below it.
        column_starts: The same for columns.
        column_weights: The same for columns.
        labels_HW: Labels, overwritten.
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
    """Write the arg-max of every cell of row i of the logits; return whether all logits of the row are finite."""
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
    """Fill the cells of one row whose corners agree; write the columns of the others to `boundary` and return their number."""
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
    """Write, in ascending order, the classes that do not lose to any one corner's winner at all four corners.

    `margin` is a class's lead over a winner at the corner where that lead is largest, minimal over the winners; at 0 they are
    equal there, and the class remains, as the first of equal ones wins. Returns the number of classes written.
    """
    for n in range(padded):
        margin[n] = np.float32(3.4028235e38)
    for position, rival in enumerate((first, second, third, fourth)):
        if (position > 0 and rival == first) or (position > 1 and rival == second) or (position > 2 and rival == third):
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


# Threads: blocks of cell rows lie in a queue; the caller works on it together with a pool of as many threads as torch uses, and
# cancels those that have not started when the queue is empty. Only the labels' memory is shared, so calls may run concurrently.

BLOCK_PIXELS = 2**16
"""Output pixels per thread below which another thread costs more time than it saves."""


def upsample_argmax_by_block(
    low_BCHW: torch.Tensor, rows: InterpolationAxis, columns: InterpolationAxis, labels_BHW: torch.Tensor
) -> bool:
    """Write the arg-max of every upsampled pixel with the compiled loops.

    Args:
        low_BCHW: Logits, float32 on the CPU; contiguous or channels_last memory is used without a copy.
        rows: Interpolation of the rows.
        columns: Interpolation of the columns.
        labels_BHW: Labels on the CPU, overwritten.

    Returns:
        False, with labels unfinished, where a logit is not finite.
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
    """Return ranges of cell rows with about equal numbers of output rows."""
    edges = [int(rows.above[len(rows.above) * n // count]) for n in range(count)]
    edges = sorted({0, *edges, rows.source})
    return list(itertools.pairwise(edges))


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Return the thread pool of this process (by process id: a fork inherits the pool object but none of its threads)."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="deeplabzoo-labels")
