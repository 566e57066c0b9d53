"""A graph whose sizes are open, and a closed one for each size that comes back: engines plan those 5 to 10 % better."""

import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from deeplabzoo.inference.onnx_graph import Runner

_KEPT = 2
"""Closed graphs kept at a time; each may hold a copy of the weights."""


class BySize:
    """Runs every size at once, and from its second picture on in a graph that was made for that size alone.

    `open_graph(shape)` returns a runner: for any size where `shape` is None, else for exactly that B x C x H x W. Any number of
    threads may call at once, if the runners allow it.
    """

    def __init__(self, open_graph: Callable[[tuple[int, ...] | None], Runner]) -> None:
        self._open_graph = open_graph
        self._any_size = open_graph(None)
        self._last: tuple[int, ...] | None = None
        self._closed: OrderedDict[tuple[int, ...], Runner] = OrderedDict()
        self._choosing = threading.Lock()

    def __call__(self, image_BCHW: npt.NDArray[np.float32]) -> npt.NDArray[np.generic]:
        """Return the graph's output for one batch."""
        return self._runner_for(image_BCHW.shape)(image_BCHW)

    def _runner_for(self, shape: tuple[int, ...]) -> Runner:
        with self._choosing:
            if shape in self._closed:
                self._closed.move_to_end(shape)
            elif shape == self._last:
                self._closed[shape] = self._open_graph(shape)
                if len(self._closed) > _KEPT:
                    self._closed.popitem(last=False)
            self._last = shape
            return self._closed.get(shape, self._any_size)
