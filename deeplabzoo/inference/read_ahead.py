"""Reading the next pictures, and counting the last one, while the network is busy with this one.

Decoding and counting hold the Python lock for moments only, so threads suffice: no picture is copied between processes, and
the network's own threads stay as they are.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, ParamSpec, Self

from deeplabzoo.data.base import Sample, SegmentationData

Arguments = ParamSpec("Arguments")


def read_ahead(
    data: SegmentationData, indices: Iterable[int], *, readers: int = 1, ahead: int = 2
) -> Generator[Sample, None, None]:
    """Yield `data[i]` for each of `indices`, in their order, while `readers` threads read the next ones.

    At most `ahead` pictures wait, so memory is bounded. What reading a picture raises is raised at that picture's turn, when
    all before it have been yielded. Close the generator (`contextlib.closing`) to stop early: it waits for what is being read,
    and no further picture is begun.
    """
    waiting: deque[Future[Sample]] = deque()
    pool = ThreadPoolExecutor(readers, thread_name_prefix="deeplabzoo-reader")
    try:
        for index in indices:
            waiting.append(pool.submit(data.__getitem__, index))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class OneBehind(Generic[Arguments]):
    """Calls `work` in a thread of its own, one call at a time and in order, a call behind the caller.

    What a call raises is raised by the next one, or at the end of the `with` block; after it, all calls are done.
    """

    def __init__(self, work: Callable[Arguments, object]) -> None:
        self._work = work
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="deeplabzoo-behind")
        self._last: Future[object] | None = None

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        """Wait for the call before, then begin this one."""
        self._finish()
        self._last = self._pool.submit(self._work, *args, **kwargs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _finish(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()
