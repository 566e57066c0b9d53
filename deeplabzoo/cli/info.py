"""`python -m deeplabzoo.info MODEL`: full details of one model and its checkpoints, as text or JSON."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from deeplabzoo.cli.formatting import bold, paragraph
from deeplabzoo.cli.parser import Parser, run
from deeplabzoo.hub.manifest import WeightRow
from deeplabzoo.hub.model_info import Cost, Description, describe, get_cost, metric_conditions, rows_to_dicts
from deeplabzoo.models.names import parse_name

_TITLES = {"deeplabv3": "DeepLabV3", "deeplabv3plus": "DeepLabV3+"}
_EPILOG = """\
MODEL is architecture_encoder[_data][.tag]; with a tag only that checkpoint is shown. \
`python -m deeplabzoo.list` lists all names.

examples:
  python -m deeplabzoo.info deeplabv3_mobilenetv2_voc
  python -m deeplabzoo.info deeplabv3plus_resnet50 --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(info_command, argv)


def build_parser() -> Parser:
    """Return the command's argument parser."""
    parser = Parser("info", "Show full details of one model and its checkpoints.", _EPILOG)
    parser.add_argument("model", metavar="MODEL", help="model name, e.g. deeplabv3plus_resnet101_voc")
    parser.add_argument("--json", action="store_true", help="print JSON, with the manifest's rows")
    return parser


def info_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and print the details; raises UnknownNameError that names the nearest model."""
    args = build_parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    description = describe(args.model)
    if args.json:
        print(json.dumps(_plain(description), indent=2, ensure_ascii=False))
    else:
        print("\n".join(_page(description)))
    return 0


def _page(model: Description) -> Iterator[str]:
    cost = _cost(model)
    yield bold(model.name)
    yield paragraph("architecture", _TITLES[model.architecture])
    encoder = model.encoder
    total = f"{cost.params / 1e6:.2f} M, of which " if cost else ""
    yield paragraph("encoder", f"{encoder.name} ({encoder.family})")
    yield paragraph("parameters", f"{total}{encoder.params / 1e6:.2f} M in the encoder")
    for stride, rates in model.atrous_rates.items():
        flops = f"{cost.flops[stride] / 1e9:.1f} GFLOPs at 513 x 513" if cost and stride in cost.flops else ""
        atrous = "" if model.weights else f"atrous rates {', '.join(map(str, rates))}"
        text = "; ".join(filter(None, (atrous, flops))) or "needs other tensors than these checkpoints hold"
        yield paragraph(f"stride {stride}", text)
    if not model.output_strides:
        yield paragraph("strides", f"none: {encoder.refused}")
    yield paragraph("", encoder.exactness)
    if model.data:
        yield paragraph("classes", f"{len(model.classes)} of {model.data}: {', '.join(model.classes)}")
    if not model.weights:
        yield paragraph("weights", "none released; `create` starts from random initialization or an ImageNet encoder")
    for row in model.weights:
        yield ""
        yield bold(f"{row.full_name}{' (default)' if row.default and len(model.weights) > 1 else ''}")
        yield from _checkpoint(row)


def _checkpoint(row: WeightRow) -> Iterator[str]:
    yield paragraph("use", f'deeplabzoo.create("{row.full_name}", pretrained=True)')
    for metric in row.metrics:
        yield paragraph(metric.name, f"{metric.value:.2f} % ({metric_conditions(metric)})")
        if metric.command:
            yield paragraph("", metric.command)
    if not row.metrics:
        yield paragraph("mIoU", "not measured")
    yield paragraph("verified", row.verified)
    size = f"{row.bytes / 1e6:.1f} MB" if row.bytes else "size not published"
    yield paragraph("file", f"{size}, {row.source}")
    partial = f"{row.sha256_prefix}… (the publisher gives no more)" if row.sha256_prefix else "not published"
    yield paragraph("sha256", row.sha256 or partial)
    config, prep = row.config, row.preprocessing
    rates = f", atrous rates {', '.join(map(str, config.atrous_rates))}" if config.atrous_rates else ""
    yield paragraph("model", f"output stride {config.output_stride}{rates}, {config.num_classes} classes")
    resize = "image at its own size" if prep.resize == "none" else f"{prep.resize} side to {prep.size[0]} x {prep.size[1]}"
    yield paragraph("input", f"{prep.channel_order}, {resize}{', padded' if prep.pad else ''}")
    for what, terms in (("code", row.license.code), ("weights", row.license.weights), ("data", row.license.data)):
        yield paragraph(f"{what} licence", terms)
    if row.training:
        yield paragraph("training", str(row.training))
        yield paragraph("", row.training.command)
    if row.notes:
        yield paragraph("notes", row.notes)


def _cost(model: Description) -> Cost | None:
    """Return the cost of the default or tagged checkpoint, or else of the model with 21 classes."""
    name = parse_name(model.name)
    row = next((row for row in model.weights if row.default or name.tag), None)
    return get_cost(row.full_name if row else str(dataclasses.replace(name, data=None, tag=None)))


def _plain(model: Description) -> dict[str, Any]:
    cost = _cost(model)
    return {
        "name": model.name,
        "architecture": model.architecture,
        "encoder": {**dataclasses.asdict(model.encoder), "exactness": model.encoder.exactness},
        "output_strides": list(model.output_strides),
        "atrous_rates": {str(stride): list(rates) for stride, rates in model.atrous_rates.items()},
        "params": cost.params if cost else None,
        "flops_513": {str(stride): count for stride, count in cost.flops.items()} if cost else None,
        "data": model.data,
        "classes": list(model.classes),
        "weights": rows_to_dicts(model.weights),
    }
