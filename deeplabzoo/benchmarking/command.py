"""The comparison from top to bottom: read the call, check it, measure model after model, print, write."""

import argparse
import dataclasses
import itertools
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from deeplabzoo.benchmarking.chart import draw_chart
from deeplabzoo.benchmarking.compare import Plan, compare, peers_of
from deeplabzoo.benchmarking.jobs import confusion_alone, data_alone, labels_alone, seams_alone
from deeplabzoo.benchmarking.libraries import library
from deeplabzoo.benchmarking.machine import gemm_peaks
from deeplabzoo.benchmarking.options import comparison_parser
from deeplabzoo.benchmarking.record import Record, Row, conditions
from deeplabzoo.benchmarking.scaling import MODEL as SCALED_MODEL
from deeplabzoo.benchmarking.scaling import scaling_rows
from deeplabzoo.benchmarking.scaling_chart import draw_scaling
from deeplabzoo.benchmarking.sides import LIBRARY_OF, OURS, PLAIN, require_ours, require_peer
from deeplabzoo.benchmarking.subjects import open_subject
from deeplabzoo.benchmarking.table import text_table
from deeplabzoo.benchmarking.turns import every_thread_flushes
from deeplabzoo.errors import UsageError
from deeplabzoo.inference.denormals import denormals_flushed
from deeplabzoo.inference.device import choose_device
from deeplabzoo.output import ensure_folder
from deeplabzoo.say import say

RECORDS = Path("benchmarks")
"""Where `--json auto` writes, below the current folder."""
_LEAST_SIDE = 32


def comparison_command(words: Sequence[str]) -> int:
    """Measure what the words ask for; raises DeepLabZooError for what cannot be measured, wrong calls before anything is."""
    args = comparison_parser().parse_args(words)
    _check(args)
    with denormals_flushed():
        torch.set_num_threads(args.threads)
        plan = _plan(args)
        for own in plan.ours:
            require_ours(own)
        record = _empty_record(args, plan, words)
        target = _target(args.json, record)
        for found in _measurements(args, plan):
            record = dataclasses.replace(record, rows=(*record.rows, *found))
            if target:
                record.write(target)  # after each, since a long run may be stopped
    print(text_table(record.rows))
    if target:
        say(f"written: {target}")
    if args.chart:
        (draw_scaling if args.scaling else draw_chart)(record, args.chart)
        say(f"written: {args.chart}")
    return 0


def _measurements(args: argparse.Namespace, plan: Plan) -> Iterator[list[Row]]:
    """Yield rows, job after job and model after model; each network is let go before the next is made."""
    if args.data:
        yield data_alone(args.data, plan.pairs, plan.seed)
    if args.confusion:
        yield confusion_alone(args.confusion, plan.pairs)
    if args.scaling:
        for name in args.models or [SCALED_MODEL]:
            yield from scaling_rows(name, args.megapixels, threads=plan.threads, seed=plan.seed, note=args.note)
        return
    if args.seams or args.mosaics:
        yield from seams_alone(args.models, args.seams or [], args.mosaics, args.note)
        return
    if args.labels:
        yield from labels_alone(args.models, args.labels, plan.sizes, plan.pairs)
        return
    for name in args.models:
        subject = open_subject(name, plan.seed)
        own = dataclasses.replace(plan, peers=peers_of(subject, plan.peers))
        for size, batch in itertools.product(plan.sizes, plan.batches):
            yield compare(subject, own, size, batch)


def _plan(args: argparse.Namespace) -> Plan:
    device = choose_device(args.device)
    return Plan(
        ours=tuple(
            engine if ":" in engine else f"{engine}:{precision}"
            for engine in args.engine
            for precision in ([args.precision[0]] if ":" in engine else args.precision)
        ),
        peers=tuple(_names(args.peers)),
        sizes=tuple(zip(args.size[::2], args.size[1::2], strict=True)),
        batches=tuple(args.batch),
        tasks=tuple(args.tasks),
        device=device,
        threads=args.threads,
        pairs=args.pairs,
        seed=args.seed,
        calibration=args.calibrate,
        memory=args.memory,
        peer_precision=args.peer_precision,
        peaks=gemm_peaks(device, args.threads),
    )


def _check(args: argparse.Namespace) -> None:
    """Raise UsageError or UnknownNameError for a call that cannot be meant, or that lacks a library."""
    if args.labels and not args.models:
        raise UsageError("--labels needs a MODEL whose logits are enlarged, with trained weights.")
    if (args.seams or args.mosaics) and not args.models:
        raise UsageError("--seams and --mosaics need a MODEL that is cut into tiles, with trained weights.")
    if min(args.megapixels) < 0.01:
        raise UsageError(f"--megapixels must be at least 0.01, not {min(args.megapixels)}.")
    if not (args.models or args.data or args.confusion or args.scaling):
        raise UsageError("Nothing to measure: name a MODEL; see `python -m deeplabzoo.benchmark --help`.")
    if len(args.size) % 2:
        raise UsageError(f"--size takes heights and widths in pairs, not {len(args.size)} numbers.")
    if min(args.size) < _LEAST_SIDE:
        raise UsageError(f"--size {min(args.size)} is too small: both sides must be at least {_LEAST_SIDE} pixels.")
    for name, value, least in (("batch", min(args.batch), 1), ("threads", args.threads, 1), ("pairs", args.pairs, 0)):
        if value < least:
            raise UsageError(f"--{name} must be at least {least}, not {value}.")
    if args.pairs == 0 and (args.labels or args.data or args.confusion or not args.memory):
        raise UsageError("--pairs 0 measures no times; ask for --memory, or for at least 1 pair.")
    for peer in _names(args.peers):
        require_peer(peer)
        if peer != OURS:
            library(LIBRARY_OF[peer])
    if args.chart:
        if args.chart.suffix != ".png":
            raise UsageError(f"--chart '{args.chart}' must end in .png.")
        library("matplotlib")
        ensure_folder(args.chart.parent)


def _names(peers: str) -> list[str]:
    return [name.strip() for name in peers.split(",") if name.strip()]


def _empty_record(args: argparse.Namespace, plan: Plan, words: Sequence[str]) -> Record:
    engines, precisions = zip(*(own.split(":") for own in plan.ours), strict=True)
    settings = {
        "denormals": "zero in every thread" if every_thread_flushes() else "zero in the main thread alone",
        "gemm_gflop_per_s": plan.peaks,
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
    }
    return Record(
        rows=(),
        command=shlex.join(["python", "-m", "deeplabzoo.benchmark", *words]),
        precision="+".join(dict.fromkeys(precisions)),
        layout="contiguous" if set(engines) == {PLAIN} else "channels-last",
        seed=args.seed,
        settings=settings,
        **conditions(plan.device),
    )


def _target(json: str | None, record: Record) -> Path | None:
    """Return the file to write: a name after the conditions for `auto`, numbered where that is taken."""
    if json is None:
        return None
    path = Path(json) if json != "auto" else RECORDS / record.file_name()
    ensure_folder(path.parent)
    if json != "auto":
        return path
    numbered = (path.with_name(f"{path.stem}_{number}{path.suffix}") for number in itertools.count(2))
    return next(one for one in itertools.chain([path], numbered) if not one.exists())
