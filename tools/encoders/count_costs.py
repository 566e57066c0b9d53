"""Count what every network costs and write `cost_table.json`: `python -m tools.encoders.count_costs [--missing]`.

Networks are built and run on the meta device, on shapes alone, so the largest of them needs no memory.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from deeplabzoo.errors import UsageError
from deeplabzoo.files import write_atomically
from deeplabzoo.hub.manifest import released
from deeplabzoo.hub.model_info import SIDE, TABLE, Cost
from deeplabzoo.models.config import ARCHITECTURES, Architecture, DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.encoder_table import encoder_info, list_encoders, short_name
from deeplabzoo.models.encoders import build_feature_extractor, probe_features
from deeplabzoo.models.heads import V3Head, V3PlusHead


def count_encoder(encoder: str) -> dict[str, Cost]:
    """Return the cost of each architecture on one encoder, by name, at every stride that it runs at.

    The encoder is built and run once a stride, and both heads on what came out of it; parameters are those at stride 16,
    or at the largest below it.
    """
    strides = encoder_info(encoder).strides
    default = 16 if 16 in strides else strides[0]
    flops: dict[Architecture, dict[int, int]] = {architecture: {} for architecture in ARCHITECTURES}
    params: dict[Architecture, int] = {}
    for stride in strides:
        with torch.device("meta"):
            extractor = build_feature_extractor(encoder, stride).eval()
        plan = probe_features(extractor, 3)
        features, arithmetic = _run(extractor, torch.empty(1, 3, SIDE, SIDE, device="meta"))
        high, low = features[plan.last], features[plan.low_level]
        for architecture in ARCHITECTURES:
            config = DeepLabConfig(architecture=architecture, encoder=encoder, output_stride=stride)
            with torch.device("meta"):
                head = (
                    V3Head(config, high.shape[1])
                    if architecture == "deeplabv3"
                    else V3PlusHead(config, high.shape[1], low.shape[1])
                )
            inputs = (high,) if architecture == "deeplabv3" else (high, low)
            flops[architecture][stride] = arithmetic + _run(head.eval(), *inputs)[1]
            if stride == default:
                params[architecture] = _params(extractor) + _params(head)
    return {f"{one}_{short_name(encoder)}": Cost(params[one], flops[one]) for one in ARCHITECTURES}


def count_model(config: DeepLabConfig) -> Cost:
    """Return the cost of one network as its configuration describes it, at every stride that its weights can run at."""
    with torch.device("meta"):
        net = DeepLab(config).eval()
        image = torch.empty(1, config.in_chans, SIDE, SIDE)
    info = encoder_info(config.encoder)
    flops = {}
    for stride in info.strides:
        if stride == config.output_stride or info.shares_weights(config.output_stride, stride):
            try:
                with torch.device("meta"):
                    net.set_output_stride(stride)
            except UsageError:  # a multi-grid that has no whole dilations there
                continue
            with torch.no_grad(), FlopCounterMode(display=False) as counted:
                net.forward_low_resolution(image)
            flops[stride] = counted.get_total_flops()
    return Cost(_params(net), flops)


def _run(module: nn.Module, *inputs: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        out = module(*inputs)
    return list(out), counted.get_total_flops()


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def write_table(costs: Mapping[str, Cost], path: Path = TABLE) -> None:
    """Write the table, one network a line."""
    rows = [f"{json.dumps(name)}: {json.dumps(vars(cost))}" for name, cost in sorted(costs.items())]
    text = f'{{"side": {SIDE}, "networks": {{\n' + ",\n".join(rows) + "\n}}\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_table(path: Path = TABLE) -> dict[str, Cost]:
    """Return the whole table; empty where there is none yet."""
    if not path.is_file():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["networks"]
    return {
        name: Cost(row["params"], {int(stride): flops for stride, flops in row["flops"].items()}) for name, row in rows.items()
    }


def expected_names() -> Iterable[str]:
    """Yield every name that the table should have: both architectures on each encoder, and every released file."""
    for encoder in list_encoders():
        yield from (f"{architecture}_{short_name(encoder)}" for architecture in ARCHITECTURES)
    yield from (row.full_name for row in released())


def main(arguments: Sequence[str] | None = None) -> int:
    """Count every network, or those that the table lacks, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.encoders.count_costs", description=__doc__.split("\n")[0])
    parser.add_argument("--missing", action="store_true", help="keep what is in the table and count what is not")
    known = read_table() if parser.parse_args(arguments).missing else {}
    costs = {name: known[name] for name in expected_names() if name in known}
    encoders = [one for one in list_encoders() if not {f"{arch}_{short_name(one)}" for arch in ARCHITECTURES} <= costs.keys()]
    for encoder in tqdm(encoders, desc="encoders"):
        costs |= count_encoder(encoder)
    for row in tqdm([row for row in released() if row.full_name not in costs], desc="released"):
        costs[row.full_name] = count_model(row.config)
    write_table(costs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
