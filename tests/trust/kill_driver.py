"""Starts training and publishing in processes of their own, quickly: libraries are imported once, each run is a fork.

usage: python kill_driver.py; every line on stdin is an order in JSON, every line on stdout an answer. `{"run": "train" or
"publish", "words": [...], "told": FILE, "doing": FILE}` answers with the process's number, `{"ask": PID}` with its exit status
(negative: the signal; null: it runs). FILE `logged` gets what the run prints, `doing` what it is at, for the record.

What a run meets, each optional: `aim` [MODULE:NAME, N, WHEN, SIGNAL, WORD] sends itself a signal before or after the N-th call
of a function whose first argument holds WORD (empty: any); `largest_file_bytes` with `full_from` [MODULE:NAME, N] is a disk
that is full from that call on; `clock_s` moves `time.time` by that much at every call; `environment` is added to its own.
"""

import functools
import importlib
import json
import mmap
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

PHASES = {
    "deeplabzoo.training.train:open_splits": "opening the data",
    "deeplabzoo.training.train:build_model": "building the network",
    "deeplabzoo.training.dataloader:BatchDataset.__getitem__": "reading pictures",
    "deeplabzoo.training.trainer:class_weights_from_data": "reading the labels",
    "deeplabzoo.training.train:RunLog": "opening the log",
    "deeplabzoo.training.trainer:Trainer.train_step": "a step",
    "deeplabzoo.training.train:validate": "an evaluation",
    "deeplabzoo.training.trainer:Trainer.save_weights": "writing weights",
    "deeplabzoo.training.run_dir:save_state": "writing a state",
    "deeplabzoo.training.train:write_report": "the report",
    "deeplabzoo.publish.publish:_write_release": "writing the release",
    "deeplabzoo.publish.publish:_write_card": "writing the card",
    "deeplabzoo.publish.publish:add_release_to_manifest": "adding to the manifest",
}
"""Functions by which the record tells where a kill came down; outside of them it is `after` the last one."""

Function = Callable[..., Any]


def _replace(target: str, wrap: Callable[[Function], Function]) -> None:
    """Put `wrap(function)` where MODULE:NAME points."""
    module, _, names = target.partition(":")
    *path, last = names.split(".")
    place: Any = functools.reduce(getattr, path, importlib.import_module(module))
    setattr(place, last, wrap(getattr(place, last)))


def _at_call(target: str, number: int, happens: Callable[[], None], when: str = "before", word: str = "") -> None:
    calls = 0

    def wrap(function: Function) -> Function:
        @functools.wraps(function)
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal calls
            fits = not word or word in str(args[:1])
            calls += fits
            due = fits and calls == number
            if due and when == "before":
                happens()
            result = function(*args, **options)
            if due and when == "after":
                happens()
            return result

        return wrapped

    _replace(target, wrap)


def _note_phases(file: Path) -> None:
    with file.open("r+b") as opened:
        page = mmap.mmap(opened.fileno(), 64)

    def note(phase: str) -> None:
        page[:64] = phase.encode().ljust(64)

    def noting(phase: str) -> Callable[[Function], Function]:
        def wrap(function: Function) -> Function:
            @functools.wraps(function, updated=())
            def wrapped(*args: Any, **options: Any) -> Any:
                before = bytes(page[:64]).decode().strip()
                note(phase)
                result = function(*args, **options)
                note(before if before in ("an evaluation", "the report") else f"after {phase}")
                return result

            return wrapped

        return wrap

    for target, phase in PHASES.items():
        _replace(target, noting(phase))
    note("starting")


def _go_back(seconds: float) -> None:
    """Let the clock lose time at every look at it, as one that is set again and again."""
    now, looks = time.time(), 0

    def wrong() -> float:
        nonlocal looks
        looks += 1
        return now + seconds * looks

    time.time = wrong
    time.time_ns = lambda: int(wrong() * 1e9)


def _work(order: dict[str, Any]) -> NoReturn:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that started the tests with `&` has it ignored
    os.environ.update(order.get("environment", {}))
    logged = os.open(order["told"], os.O_WRONLY | os.O_APPEND)
    for stream, there in ((0, os.open(os.devnull, os.O_RDONLY)), (1, logged), (2, logged)):
        os.dup2(there, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    if "doing" in order:
        _note_phases(Path(order["doing"]))
    if "aim" in order:
        target, number, when, name, word = order["aim"]
        _at_call(target, number, lambda: os.kill(os.getpid(), signal.Signals[name]), when, word)
    if "full_from" in order:
        limit = order["largest_file_bytes"]
        _at_call(*order["full_from"], lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    if "clock_s" in order:
        _go_back(order["clock_s"])
    sys.argv = [f"deeplabzoo.{order['run']}", *order["words"]]
    module = importlib.import_module({"train": "deeplabzoo.cli.train", "publish": "deeplabzoo.cli.publish"}[order["run"]])
    status = int(module.main(order["words"]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # tearing down what the fork shares takes as long as a run, and no kill in it could cost anything


def _warm_up() -> None:
    """Import all that a run imports, so that forks have it; one thread, since threads do not survive a fork."""
    import matplotlib.backends.backend_agg
    import timm
    import torch
    from PIL import Image

    torch.set_num_threads(1)
    Image.init()
    for name in (
        "data.datasets.folder",
        "data.transforms",
        "cli.train",
        "training.train",
        "publish.publish",
        "evaluation.evaluate",
    ):
        importlib.import_module(f"deeplabzoo.{name}")
    importlib.import_module("deeplabzoo.data.transforms").load_kernel()
    assert matplotlib.backends.backend_agg
    assert timm.__version__


def _serve() -> None:
    """Answer orders until stdin ends; the fork of a run does not come back."""
    statuses: dict[int, int] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if "ask" in order:
            pid = order["ask"]
            if pid not in statuses:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
            answer = statuses.get(pid)
        else:
            answer = os.fork()
            if answer == 0:
                _work(order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _warm_up()
    print(json.dumps("ready"), flush=True)
    _serve()
