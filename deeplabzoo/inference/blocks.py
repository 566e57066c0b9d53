"""The compiled cells on as many threads as torch uses (import this only where `jit.available()`).

Blocks of cell rows lie in a queue; the caller works on it together with threads of its own pool, and gives up those that did
not get going in time. Nothing is shared but the labels' memory, so any number of callers may do this at once.
"""

import functools
import itertools
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from deeplabzoo.inference.cells import label_cells
from deeplabzoo.models.bilinear import Axis

BLOCK_PIXELS = 2**16
"""Output pixels below which another thread costs more than it brings."""


def labels_by_block(low_BCHW: torch.Tensor, rows: Axis, columns: Axis, labels_BHW: torch.Tensor) -> bool:
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
                label_cells(
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


def _blocks(rows: Axis, count: int) -> list[tuple[int, int]]:
    """Ranges of cell rows with about equally many output rows."""
    edges = [int(rows.above[len(rows.above) * n // count]) for n in range(count)]
    edges = sorted({0, *edges, rows.source})
    return list(itertools.pairwise(edges))


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this very process: a fork inherits the pool but none of its threads."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="deeplabzoo-labels")
