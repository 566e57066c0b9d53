"""`python -m deeplabzoo.info MODEL`: everything that is known about one model and its weights, as a page or as JSON."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from deeplabzoo.cli.formatting import bold, paragraph
from deeplabzoo.cli.parser import Parser, run
from deeplabzoo.hub.manifest import WeightRow
from deeplabzoo.hub.model_info import Cost, Description, describe, get_cost, metric_conditions, rows_to_dicts
from deeplabzoo.hub.registry import parse_name

_TITLES = {"deeplabv3": "DeepLabV3", "deeplabv3plus": "DeepLabV3+"}
_EPILOG = """\
MODEL is architecture_encoder[_data][.tag]; with a tag only those weights are shown. `deeplabzoo list` names them all.

examples:
  deeplabzoo info deeplabv3_mobilenetv2_voc
  deeplabzoo info deeplabv3plus_resnet50 --json
"""


def info_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and print the page; raises UnknownNameError that names the nearest model."""
    args = _parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    about = describe(args.model)
    if args.json:
        print(json.dumps(_plain(about), indent=2, ensure_ascii=False))
    else:
        print("\n".join(_page(about)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 2 there is no such model."""
    return run(info_command, argv)


def _parser() -> Parser:
    parser = Parser("info", "Show everything that is known about one model and its weights.", _EPILOG)
    parser.add_argument("model", metavar="MODEL", help="a name, e.g. deeplabv3plus_resnet101_voc")
    parser.add_argument("--json", action="store_true", help="the same as JSON, with the manifest's rows")
    return parser


def _page(about: Description) -> Iterator[str]:
    cost = _cost(about)
    yield bold(about.name)
    yield paragraph("architecture", _TITLES[about.architecture])
    encoder = about.encoder
    total = f"{cost.params / 1e6:.2f} M, of which " if cost else ""
    yield paragraph("encoder", f"{encoder.name} ({encoder.family})")
    yield paragraph("parameters", f"{total}{encoder.params / 1e6:.2f} M in the encoder")
    for stride, rates in about.atrous_rates.items():
        arithmetic = f"{cost.flops[stride] / 1e9:.1f} GFLOPs at 513 x 513" if cost and stride in cost.flops else ""
        own = "" if about.weights else f"rates {', '.join(map(str, rates))}"
        yield paragraph(
            f"stride {stride}", "; ".join(filter(None, (own, arithmetic))) or "with other tensors than these weights'"
        )
    if not about.output_strides:
        yield paragraph("strides", f"none: {about.encoder.refused}")
    yield paragraph("", about.encoder.exactness)
    if about.data:
        yield paragraph("classes", f"{len(about.classes)} of {about.data}: {', '.join(about.classes)}")
    if not about.weights:
        yield paragraph("weights", "none released; `create` starts it untrained, or from an ImageNet encoder")
    for row in about.weights:
        yield ""
        yield bold(f"{row.full_name}{' (default)' if row.default and len(about.weights) > 1 else ''}")
        yield from _weights(row)


def _weights(row: WeightRow) -> Iterator[str]:
    yield paragraph("use", f'deeplabzoo.create("{row.full_name}", pretrained=True)')
    for metric in row.metrics:
        yield paragraph(metric.name, f"{metric.value:.2f} % ({metric_conditions(metric)})")
        if metric.command:
            yield paragraph("", metric.command)
    if not row.metrics:
        yield paragraph("mIoU", "no figure")
    yield paragraph("checked", row.verified)
    size = f"{row.bytes / 1e6:.1f} MB" if row.bytes else "size not published"
    yield paragraph("file", f"{size}, {row.source}")
    digest = row.sha256 or (f"{row.sha256_prefix}… (the publisher gives no more)" if row.sha256_prefix else "not published")
    yield paragraph("sha256", digest)
    config = row.config
    rates = f", rates {', '.join(map(str, config.atrous_rates))}" if config.atrous_rates else ""
    yield paragraph("network", f"output stride {config.output_stride}{rates}, {config.num_classes} classes")
    prep = row.preprocessing
    resize = "photo at its own size" if prep.resize == "none" else f"{prep.resize} side to {prep.size[0]} x {prep.size[1]}"
    yield paragraph("input", f"{prep.channel_order}, {resize}{', padded' if prep.pad else ''}")
    for what, terms in (("code", row.license.code), ("file", row.license.weights), ("data", row.license.data)):
        yield paragraph(f"{what} licence", terms)
    if row.training:
        yield paragraph("training", str(row.training))
        yield paragraph("", row.training.command)
    if row.notes:
        yield paragraph("notes", row.notes)


def _cost(about: Description) -> Cost | None:
    """Return the cost of the weights where one file is meant, else that of the network by itself."""
    name = parse_name(about.name)
    row = next((row for row in about.weights if row.default or name.tag), None)
    return get_cost(row.full_name if row else str(dataclasses.replace(name, data=None, tag=None)))


def _plain(about: Description) -> dict[str, Any]:
    cost = _cost(about)
    encoder = dataclasses.asdict(about.encoder)
    return {
        "name": about.name,
        "architecture": about.architecture,
        "encoder": {**encoder, "exactness": about.encoder.exactness},
        "output_strides": list(about.output_strides),
        "atrous_rates": {str(stride): list(rates) for stride, rates in about.atrous_rates.items()},
        "params": cost.params if cost else None,
        "flops_513": {str(stride): count for stride, count in cost.flops.items()} if cost else None,
        "data": about.data,
        "classes": list(about.classes),
        "weights": rows_to_dicts(about.weights),
    }
