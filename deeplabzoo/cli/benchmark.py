"""`python -m deeplabzoo.benchmark MODEL … --peers torchvision,onnxruntime`: how fast, against whom, on this machine.

The same weights run here and in the other libraries, in turns, after proof that both label alike. `--train …` measures a
training step. What is measured and how: docs/speed.md.
"""

import argparse
import dataclasses
import itertools
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from deeplabzoo.benchmark.backends import LIBRARY_OF, OURS, PEERS, PLAIN, TASKS, library, require_own_backend, require_peer
from deeplabzoo.benchmark.compare import ComparisonConfig, available_peers, compare
from deeplabzoo.benchmark.data_pipeline import measure_data
from deeplabzoo.benchmark.models import open_model
from deeplabzoo.benchmark.record import Record, Row, conditions, record_path
from deeplabzoo.benchmark.table import draw_chart, text_table
from deeplabzoo.benchmark.timing import all_threads_flush_denormals, gemm_peaks
from deeplabzoo.cli.parser import Parser, add_device_option, run
from deeplabzoo.device import choose_device
from deeplabzoo.errors import UsageError
from deeplabzoo.files import ensure_folder
from deeplabzoo.log import logger
from deeplabzoo.optimization.cpu_runtime import flush_denormals


def benchmark_command(argv: Sequence[str] | None = None) -> int:
    """Run the comparison, or with `--train` the benchmark of a training step."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--train" in words:
        from deeplabzoo.benchmark.training import training_command

        return training_command([word for word in words if word != "--train"])
    return comparison_command(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(benchmark_command, argv)


# The words of the comparison's command line.


_EPILOG = """\
MODEL is a name of the zoo, a checkpoint, or a network of SMP with its defaults: smp:deeplabv3plus_resnet50.

  python -m deeplabzoo.benchmark deeplabv3_mobilenetv3_voc --peers torchvision,onnxruntime --size 513 513 --json auto
  python -m deeplabzoo.benchmark --train --threads 2          a training step (its own options: --train --help)
"""


def comparison_parser() -> Parser:
    """Return the parser of everything but `--train`."""
    parser = Parser("benchmark", "Speed and memory of models, against other libraries with the same weights.", _EPILOG)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="what to run")
    parser.add_argument("--peers", default="", metavar="A,B", help=f"of {', '.join(PEERS)} (default: nobody)")
    parser.add_argument(
        "--engine",
        nargs="+",
        default=["torch"],
        help="ours: plain, torch, compiled, onnxruntime, openvino, or ENGINE:PRECISION",
    )
    parser.add_argument(
        "--precision", nargs="+", default=["fp32"], help="of each engine: fp32, bf16, fp16, int8 (default fp32)"
    )
    parser.add_argument("--calibrate", type=Path, metavar="FOLDER", help="photos that int8 is fitted to")
    parser.add_argument("--peer-precision", default="fp32", help="fp32, or autocast to bf16 or fp16 (default fp32)")
    parser.add_argument(
        "--size", nargs="+", type=int, default=[513, 513], metavar="PIXELS", help="height width, in pairs (default 513 513)"
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1], metavar="N", help="pictures a call (default 1)")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS), help="default: both")
    add_device_option(parser)
    parser.add_argument("--threads", type=int, metavar="N", default=2, help="of every side on a CPU (default 2)")
    parser.add_argument(
        "--pairs", type=int, metavar="N", default=7, help="turns of each side; 0 with --memory: no times (default 7)"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", default=0, help="of pictures, and of weights where none are at hand (default 0)"
    )
    parser.add_argument("--memory", action="store_true", help="also peak memory, each side in a process of its own")
    parser.add_argument(
        "--data", metavar="DIR", help="pictures for training, against torchvision's transforms: VOC's folder, or `made`"
    )
    parser.add_argument("--json", metavar="FILE", help="write the record; auto: benchmarks/<date>_<hardware>_….json")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="write the ratios as a PNG")
    return parser


# The comparison from top to bottom: read the call, check it, measure model after model, print, write.


SYNTHETIC = "made"
"""Value of `--data` for images drawn from a seed instead of a dataset folder."""
_MIN_SIDE = 32


def comparison_command(words: Sequence[str]) -> int:
    """Measure what the words ask for; raises DeepLabZooError for what cannot be measured, wrong calls before anything is."""
    args = comparison_parser().parse_args(words)
    _check(args)
    with flush_denormals():
        torch.set_num_threads(args.threads)
        config = _plan(args)
        for own in config.ours:
            require_own_backend(own)
        record = _empty_record(args, config, words)
        target = record_path(args.json, record)
        for found in _measurements(args, config):
            record = dataclasses.replace(record, rows=(*record.rows, *found))
            if target:
                record.write(target)  # after each, since a long run may be stopped
    print(text_table(record.rows))
    if target:
        logger.info(f"written: {target}")
    if args.chart:
        draw_chart(record, args.chart)
        logger.info(f"written: {args.chart}")
    return 0


def _measurements(args: argparse.Namespace, config: ComparisonConfig) -> Iterator[list[Row]]:
    """Yield rows, job after job and model after model; each network is let go before the next is made."""
    if args.data:
        library("torchvision")
        yield measure_data(None if args.data == SYNTHETIC else Path(args.data), pairs=config.pairs, seed=config.seed)
    for name in args.models:
        model = open_model(name, config.seed)
        own = dataclasses.replace(config, peers=available_peers(model, config.peers))
        for size, batch in itertools.product(config.sizes, config.batches):
            yield compare(model, own, size, batch)


def _plan(args: argparse.Namespace) -> ComparisonConfig:
    device = choose_device(args.device)
    return ComparisonConfig(
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
    if not (args.models or args.data):
        raise UsageError("Nothing to measure: name a MODEL; see `python -m deeplabzoo.benchmark --help`.")
    if len(args.size) % 2:
        raise UsageError(f"--size takes heights and widths in pairs, not {len(args.size)} numbers.")
    if min(args.size) < _MIN_SIDE:
        raise UsageError(f"--size {min(args.size)} is too small: both sides must be at least {_MIN_SIDE} pixels.")
    for name, value, least in (("batch", min(args.batch), 1), ("threads", args.threads, 1), ("pairs", args.pairs, 0)):
        if value < least:
            raise UsageError(f"--{name} must be at least {least}, not {value}.")
    if args.pairs == 0 and (args.data or not args.memory):
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


def _empty_record(args: argparse.Namespace, config: ComparisonConfig, words: Sequence[str]) -> Record:
    engines, precisions = zip(*(own.split(":") for own in config.ours), strict=True)
    settings = {
        "denormals": "zero in every thread" if all_threads_flush_denormals() else "zero in the main thread alone",
        "gemm_gflop_per_s": config.peaks,
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
        **conditions(config.device),
    )
