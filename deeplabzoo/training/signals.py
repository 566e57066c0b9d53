"""SIGTERM and Ctrl-C: a train step or a file is finished first, everything else is interrupted; exit code 128 + signal."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

from deeplabzoo.errors import StoppedError


class ImmediateStop(KeyboardInterrupt):
    """Raised by a signal where nothing is being changed; not an `Exception`, so that no handler of errors catches it."""


class StopRequest:
    """Context in which the first SIGTERM or SIGINT requests a stop, and a second one ends the process.

    Inside `deferred` the first signal only sets `signal`, which the training loop answers between two steps, with its state
    saved. Elsewhere, and inside `immediate`, nothing is being changed (reading, evaluating), so ImmediateStop is raised at
    once; the block ends in StoppedError.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._deferred = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handled = [
                one for one in self._SIGNALS if signal.getsignal(one) is not signal.SIG_IGN
            ]  # a shell's `&` ignores SIGINT
            self._before = {one: signal.signal(one, self._on_signal) for one in handled}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore_handlers()
        if isinstance(error, ImmediateStop):
            raise self.stop_error("; what was saved stays, and --resume goes on from there") from None

    def stop_error(self, where: str) -> StoppedError:
        """Return the error that ends the run; its exit code is 128 + the signal's number, as shells report it."""
        number = self.signal or signal.SIGTERM  # where another process of the run was the one that got it
        return StoppedError(f"Stopped by {number.name}{where}.", 128 + number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let signals wait in `signal`; one that was not handled is handled when the block ends."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self._raise_if_signaled()

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """Raise ImmediateStop at once within a block of `deferred`."""
        self._deferred = False
        try:
            self._raise_if_signaled()
            yield
        finally:
            self._deferred = True

    def _raise_if_signaled(self) -> None:
        if self.signal is not None:
            raise ImmediateStop

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore_handlers()
        if not self._deferred:
            raise ImmediateStop

    def _restore_handlers(self) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)
