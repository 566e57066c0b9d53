"""`python -m benchmarks.suite BENCHMARK`: single parts of the pipeline, or the tables of the recorded runs.

`upsample`: upsampling and arg-max; `confusion`: the confusion matrix; `scaling`: time and memory against image area; `seams`:
tiled against whole-image inference; `table`: the records as Markdown tables in documents.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.suite.components import bench_confusion_matrix, bench_tile_seams, bench_upsample_argmax
from benchmarks.suite.scaling import MEGAPIXELS, scaling_rows
from benchmarks.suite.scaling import MODEL as SCALED_MODEL
from benchmarks.suite.scaling_chart import draw_scaling
from benchmarks.suite.tables import table_command
from deeplabzoo.benchmark.record import Record, Row, conditions, record_path, reproduce_command, runtime_settings, text_table
from deeplabzoo.benchmark.timing import gemm_peaks
from deeplabzoo.cli.parser import Parser, require_at_least, run
from deeplabzoo.device import choose_device
from deeplabzoo.errors import UsageError
from deeplabzoo.log import logger
from deeplabzoo.optimization.cpu_runtime import flush_denormals

_EPILOG = """\
examples:
  python -m benchmarks.suite scaling --threads 1 --json benchmarks/large_images/scaling.json --chart docs/images/scaling.png
  python -m benchmarks.suite seams deeplabv3plus_mobilenetv2_camvid --images street.png --mosaics camvid DIR
  python -m benchmarks.suite upsample deeplabv3plus_mobilenetv2_voc --images cat.jpg --size 513 513
  python -m benchmarks.suite confusion --masks *.png
  python -m benchmarks.suite table --write docs/speed.md benchmarks/README.md
"""

BENCHMARKS = ("upsample", "confusion", "scaling", "seams", "table")


def suite_command(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark, print its rows and write its record; raises DeepLabZooError, for an invalid call before measuring."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["table"]:
        return table_command(arguments[1:])
    args = build_parser().parse_args(arguments)
    _check(args)
    device = choose_device("cpu")
    with flush_denormals():
        torch.set_num_threads(args.threads)
        record = Record(
            rows=(),
            command=reproduce_command("benchmarks.suite", arguments),
            precision="fp32",
            layout="channels-last",
            seed=args.seed,
            settings=runtime_settings(gemm_peaks(device, args.threads)),
            **conditions(device),
        )
        target = record_path(args.json, record)
        for rows in _measurements(args):
            record = dataclasses.replace(record, rows=(*record.rows, *rows))
            if target:
                record.write(target)  # after each measurement, since a long run may be stopped
    print(text_table(record.rows))
    if target:
        logger.info(f"wrote {target}")
    if args.chart:
        draw_scaling(record, args.chart)
        logger.info(f"wrote {args.chart}")
    return 0


def build_parser() -> Parser:
    """Return the parser of all benchmarks; `table` has its own."""
    parser = Parser("benchmark", "Benchmarks of single parts of the pipeline.", _EPILOG)
    parser.prog = "python -m benchmarks.suite"
    parser.add_argument("benchmark", choices=BENCHMARKS, help="what to measure; `table --help` shows other options")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="models with trained weights (upsample, seams, scaling)")
    parser.add_argument("--images", nargs="+", type=Path, default=[], metavar="IMAGE", help="images of upsample and seams")
    parser.add_argument("--masks", nargs="+", type=Path, default=[], metavar="MASK", help="label PNGs of confusion")
    parser.add_argument(
        "--mosaics", nargs=2, metavar=("DATA", "ROOT"), help="seams, and mIoU, on mosaics of a dataset's frames"
    )
    parser.add_argument(
        "--megapixels", nargs="+", type=float, default=list(MEGAPIXELS), metavar="N", help="image areas of scaling"
    )
    parser.add_argument(
        "--size", nargs=2, type=int, default=[513, 513], metavar=("H", "W"), help="image size of upsample in pixels"
    )
    parser.add_argument("--threads", type=int, metavar="N", default=2, help="CPU threads")
    parser.add_argument("--pairs", type=int, metavar="N", default=7, help="interleaved runs of each side")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of generated images")
    parser.add_argument("--note", default="", metavar="TEXT", help="note in the rows of scaling and seams")
    parser.add_argument("--json", metavar="FILE", help="write the record; auto: benchmarks/<date>_<hardware>_….json")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="chart of scaling as a PNG")
    return parser


def _check(args: argparse.Namespace) -> None:
    if args.benchmark in ("upsample", "seams") and not args.models:
        raise UsageError(f"{args.benchmark} needs a MODEL with trained weights.")
    if (args.benchmark == "upsample" and not args.images) or (args.benchmark == "seams" and not (args.images or args.mosaics)):
        raise UsageError(f"{args.benchmark} needs --images{' or --mosaics' if args.benchmark == 'seams' else ''}.")
    if args.benchmark == "confusion" and not args.masks:
        raise UsageError("confusion needs --masks.")
    if min(args.megapixels) < 0.01:
        raise UsageError(f"--megapixels must be at least 0.01, not {min(args.megapixels)}.")
    require_at_least(1, (("threads", args.threads), ("pairs", args.pairs)))
    if args.chart and (args.benchmark != "scaling" or args.chart.suffix != ".png"):
        raise UsageError("--chart draws scaling only, into a file that ends in .png.")


def _measurements(args: argparse.Namespace) -> Iterator[list[Row]]:
    if args.benchmark == "confusion":
        yield bench_confusion_matrix(args.masks, args.pairs)
    elif args.benchmark == "scaling":
        for name in args.models or [SCALED_MODEL]:
            yield from scaling_rows(name, args.megapixels, threads=args.threads, seed=args.seed, note=args.note)
    elif args.benchmark == "seams":
        yield from bench_tile_seams(args.models, args.images, args.mosaics, args.note)
    else:
        yield from bench_upsample_argmax(args.models, args.images, [(args.size[0], args.size[1])], args.pairs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite and return its exit code."""
    return run(suite_command, argv)


if __name__ == "__main__":
    sys.exit(main())
