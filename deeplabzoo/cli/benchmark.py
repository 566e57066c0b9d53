"""`python -m deeplabzoo.benchmark MODEL … --peers torchvision,onnxruntime`: speed and memory against other libraries.

The same weights run here and in the other libraries, interleaved, after a check that both give the same labels. `--train`
measures training steps. What is measured and how: docs/speed.md.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deeplabzoo.benchmark import (
    LIBRARY_OF,
    OURS,
    PEERS,
    PLAIN,
    TASKS,
    TRAINING_BACKENDS,
    TRAINING_MODELS,
    library,
    require_peer,
)
from deeplabzoo.cli.parser import STDOUT, Parser, add_device_option, require_at_least, run, write_json
from deeplabzoo.errors import UsageError
from deeplabzoo.files import ensure_folder
from deeplabzoo.log import logger

if TYPE_CHECKING:
    from deeplabzoo.benchmark.compare import ComparisonConfig
    from deeplabzoo.benchmark.record import Record, Row

SYNTHETIC = "synthetic"
"""Value of `--data` for images generated from a seed instead of a dataset."""
_MIN_SIDE = 32
_EPILOG = """\
MODEL is a model name, a checkpoint, or a model of SMP with its defaults: smp:deeplabv3plus_resnet50.

examples:
  python -m deeplabzoo.benchmark deeplabv3_mobilenetv3_voc --peers torchvision,onnxruntime --size 513 513 --json auto
  python -m deeplabzoo.benchmark --train --threads 2
  python -m deeplabzoo.benchmark --train --help
"""
_TRAIN_EPILOG = """\
examples:
  python -m deeplabzoo.benchmark --train --threads 2 --json benchmarks/training/mobilenetv3.json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(benchmark_command, argv)


def benchmark_command(argv: Sequence[str] | None = None) -> int:
    """Run the comparison, or with `--train` the benchmark of training steps."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--train" in arguments:
        return _benchmark_training([argument for argument in arguments if argument != "--train"])
    return _benchmark_inference(arguments)


def build_parser(subcommand: str = "") -> Parser:
    """Return the parser of the comparison, or for `--train` that of the training benchmark."""
    return _training_parser() if subcommand == "--train" else _comparison_parser()


def _comparison_parser() -> Parser:
    parser = Parser("benchmark", "Speed and memory of models, against other libraries with the same weights.", _EPILOG)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="models to measure")
    parser.add_argument("--peers", default="", metavar="A,B", help=f"of {', '.join(PEERS)} (default: none)")
    parser.add_argument(
        "--backend",
        nargs="+",
        default=["torch"],
        metavar="NAME",
        help="our backends: plain, torch, compiled, onnxruntime, openvino, or BACKEND:PRECISION",
    )
    parser.accept_old_spelling("--engine", "--backend")
    parser.add_argument("--precision", nargs="+", default=["fp32"], help="of each backend: fp32, bf16, fp16, int8")
    parser.add_argument("--calibrate", type=Path, metavar="FOLDER", help="images to calibrate int8 with")
    parser.add_argument("--peer-precision", default="fp32", help="of the peers: fp32, or autocast to bf16 or fp16")
    parser.add_argument(
        "--size", nargs="+", type=int, default=[513, 513], metavar="PIXELS", help="heights and widths, in pairs"
    )
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1], metavar="N", help="images per call")
    parser.accept_old_spelling("--batch", "--batch-size")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS), help="what is timed")
    add_device_option(parser)
    parser.add_argument("--threads", type=int, metavar="N", default=2, help="CPU threads per backend")
    parser.add_argument("--pairs", type=int, metavar="N", default=7, help="interleaved runs of each backend; 0: memory only")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of images, and of weights that are not available")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory, each backend in its own process")
    parser.add_argument(
        "--data", metavar="NAME", help=f"also measure training input against torchvision's transforms: voc or {SYNTHETIC}"
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="folder of the dataset of --data voc")
    parser.add_argument("--json", metavar="FILE", help="write the record; auto: benchmarks/<date>_<hardware>_….json")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the ratios as a PNG")
    return parser


def _training_parser() -> Parser:
    parser = Parser(
        "benchmark", "Images per second and peak memory of training, against torchvision's reference recipe.", _TRAIN_EPILOG
    )
    parser.prog += " --train"
    models = tuple(TRAINING_MODELS)
    parser.add_argument("model", nargs="?", choices=models, default=models[0], help="what is trained")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it is trained")
    parser.add_argument("--batch-size", type=int, metavar="N", default=8, help="images per step")
    parser.accept_old_spelling("--batch", "--batch-size")
    parser.add_argument("--crop", type=int, metavar="N", default=321, help="side of the crop in pixels")
    parser.add_argument("--workers", type=int, metavar="N", default=0, help="data loader workers, on each side")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads (default: torch's choice)")
    parser.add_argument("--rounds", type=int, metavar="N", default=7, help="interleaved rounds of each side")
    parser.add_argument("--steps", type=int, metavar="N", default=4, help="measured steps per round")
    parser.add_argument("--warmup", type=int, metavar="N", default=1, help="steps before those")
    parser.add_argument("--memory-steps", type=int, metavar="N", default=4, help="steps for which peak memory is measured")
    parser.add_argument("--images", type=int, metavar="N", default=64, help="images to generate")
    parser.accept_old_spelling("--photos", "--images")
    parser.add_argument("--longest", type=int, metavar="N", default=500, help="their longer side in pixels, 500 in VOC")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of images, weights and augmentation")
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=tuple(TRAINING_BACKENDS),
        help="what is compared (default: all; ours_bf16 where the device computes it natively)",
    )
    parser.accept_old_spelling("--sides", "--backends")
    parser.add_argument("--json", metavar="FILE", help=f"write the record as JSON; {STDOUT} for standard output")
    return parser


def _benchmark_inference(arguments: Sequence[str]) -> int:
    args = _comparison_parser().parse_args(arguments)
    _check(args)

    import torch  # after the arguments have been checked: it takes seconds to import

    from deeplabzoo.benchmark.backends import require_own_backend
    from deeplabzoo.benchmark.record import draw_chart, record_path, text_table
    from deeplabzoo.optimization.cpu_runtime import flush_denormals

    with flush_denormals():
        torch.set_num_threads(args.threads)
        config = _comparison_config(args)
        for backend in config.ours:
            require_own_backend(backend)
        record = _empty_record(args, config, arguments)
        target = record_path(args.json, record)
        for rows in _measurements(args, config):
            record = dataclasses.replace(record, rows=(*record.rows, *rows))
            if target:
                record.write(target)  # after each measurement, since a long run may be stopped
    print(text_table(record.rows))
    if target:
        logger.info(f"wrote {target}")
    if args.chart:
        draw_chart(record, args.chart)
        logger.info(f"wrote {args.chart}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise UsageError or UnknownNameError for an invalid call, or for a library that is not installed."""
    if not (args.models or args.data):
        raise UsageError("Nothing to measure: name a MODEL; see `python -m deeplabzoo.benchmark --help`.")
    if len(args.size) % 2:
        raise UsageError(f"--size takes heights and widths in pairs, not {len(args.size)} numbers.")
    if min(args.size) < _MIN_SIDE:
        raise UsageError(f"--size {min(args.size)} is too small: both sides must be at least {_MIN_SIDE} pixels.")
    require_at_least(1, (("batch-size", min(args.batch_size)), ("threads", args.threads)))
    require_at_least(0, [("pairs", args.pairs)])
    if args.pairs == 0 and (args.data or not args.memory):
        raise UsageError("--pairs 0 measures no times; use --memory, or at least 1 pair.")
    if args.data == "voc" and args.root is None:
        raise UsageError("--data voc needs --root DIR, the folder of the dataset.")

    for peer in _peers(args):
        require_peer(peer)
        if peer != OURS:
            library(LIBRARY_OF[peer])
    if args.data:
        library("torchvision")
    if args.chart:
        if args.chart.suffix != ".png":
            raise UsageError(f"--chart '{args.chart}' must end in .png.")
        library("matplotlib")
        ensure_folder(args.chart.parent)


def _peers(args: argparse.Namespace) -> list[str]:
    return [name.strip() for name in args.peers.split(",") if name.strip()]


def _comparison_config(args: argparse.Namespace) -> "ComparisonConfig":
    from deeplabzoo.benchmark.compare import ComparisonConfig
    from deeplabzoo.benchmark.timing import gemm_peaks
    from deeplabzoo.device import choose_device

    device = choose_device(args.device)
    return ComparisonConfig(
        ours=tuple(
            backend if ":" in backend else f"{backend}:{precision}"
            for backend in args.backend
            for precision in ([args.precision[0]] if ":" in backend else args.precision)
        ),
        peers=tuple(_peers(args)),
        sizes=tuple(zip(args.size[::2], args.size[1::2], strict=True)),
        batches=tuple(args.batch_size),
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


def _empty_record(args: argparse.Namespace, config: "ComparisonConfig", arguments: Sequence[str]) -> "Record":
    from deeplabzoo.benchmark.record import Record, conditions, reproduce_command, runtime_settings

    backends, precisions = zip(*(backend.split(":") for backend in config.ours), strict=True)
    return Record(
        rows=(),
        command=reproduce_command("deeplabzoo.benchmark", arguments),
        precision="+".join(dict.fromkeys(precisions)),
        layout="contiguous" if set(backends) == {PLAIN} else "channels-last",
        seed=args.seed,
        settings=runtime_settings(config.peaks),
        **conditions(config.device),
    )


def _measurements(args: argparse.Namespace, config: "ComparisonConfig") -> "Iterator[list[Row]]":
    """Yield the rows of one measurement after the other; a model is freed before the next is loaded."""
    from deeplabzoo.benchmark.compare import available_peers, compare
    from deeplabzoo.benchmark.data_pipeline import measure_data
    from deeplabzoo.benchmark.models import open_model

    if args.data:
        # `made` and a folder are the spellings of 0.1: `--data made`, `--data DIR`
        root = None if args.data in (SYNTHETIC, "made") else args.root or Path(args.data)
        yield measure_data(root, pairs=config.pairs, seed=config.seed)
    for name in args.models:
        model = open_model(name, config.seed)
        own = dataclasses.replace(config, peers=available_peers(model, config.peers))
        for size, batch in itertools.product(config.sizes, config.batches):
            yield compare(model, own, size, batch)


def _benchmark_training(arguments: Sequence[str]) -> int:
    args = _training_parser().parse_args(arguments)
    names = ("batch-size", "crop", "images", "rounds", "steps", "warmup", "memory-steps", "threads")
    require_at_least(1, [(name, getattr(args, name.replace("-", "_"))) for name in names])
    require_at_least(0, [("workers", args.workers)])
    if args.json not in (None, STDOUT):
        ensure_folder(Path(args.json).parent)

    import torch  # after the arguments have been checked: it takes seconds to import

    from deeplabzoo.benchmark.record import reproduce_command
    from deeplabzoo.benchmark.training import measure, record_table, select_backends
    from deeplabzoo.benchmark.training_backends import Settings
    from deeplabzoo.device import choose_device

    torch.set_flush_denormal(True)  # random weights give denormals, which would slow down the side that meets more of them
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = Settings(
        model=args.model,
        device=args.device,
        batch=args.batch_size,
        crop=args.crop,
        workers=args.workers,
        seed=args.seed,
        images=args.images,
        longest=args.longest,
        rounds=args.rounds,
        steps=args.steps,
        warmup=args.warmup,
        memory_steps=args.memory_steps,
    )
    record = measure(settings, select_backends(args.backends, choose_device(args.device)))
    record["command"] = reproduce_command("deeplabzoo.benchmark", ["--train", *arguments])
    print(record_table(record), file=sys.stderr if args.json == STDOUT else sys.stdout)
    if args.json is not None:
        write_json(args.json, json.dumps(record, indent=2))
    return 0
