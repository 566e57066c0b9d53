"""Write `docs/encoders.md` from what the probe measured, so that no figure in it is typed by hand."""

from collections.abc import Sequence
from pathlib import Path

from deeplabzoo.models.encoder_table import EncoderInfo

_HEAD = """<!-- Written by `python -m tools.encoders.probe`; do not edit. -->
# Encoders

{count} encoders: our own DRN and those of timm {timm_version}.

A name in the first column is what a model name contains (`deeplabv3plus_{example}`); every full timm name works too.
`deeplabzoo.supports(name, output_stride)` and `deeplabzoo.list_encoders("*pattern*", output_stride=8)` answer from the same
table, and a test measures it again.

## Does dilation preserve the function?

Running an encoder at output stride 16 or 8 replaces strides by dilation. With an exact conversion, every cell that the strided
network computes is found in the dense map, unchanged. The two last columns give the largest difference, relative to the largest
value, between those cells for images of 128 / 129 pixels and random weights with every layer at work:

- `0` is exact up to rounding: weights from ImageNet at stride 32 mean the same at stride 8.
- Squeeze-and-excitation, and every other layer that pools over the whole map, sees more cells: such encoders differ although
  each convolution is converted exactly. {se_example}.
- Average-pooling shortcuts (the `d` ResNets) are exact at stride 16 for even sizes only. {pool_example}.
- ConvNeXt and Inception-NeXt are exact because we pad their dilated 2x2 convolutions on one side; timm pads both sides at
  stride 8, which moves the map by one cell. {convnext_example}; ConvNeXt V2 also normalises over the whole map.
- TensorFlow's 'SAME' padding (`tf_*`) pads even sizes on one side, and the side moves with the stride.
- `drnd54` is by nature a stride-8 network: its published weights belong to stride 8, 16 and 32 are our extension.
- `moved` means that the two maps have different sizes (MobileViTv2 resizes to whole patches).
- An empty cell was not measured: only encoders with an alias, and those below 30 M parameters, are.

Random weights show the worst; a network that is fine-tuned at the stride it runs at adapts. A star marks what cannot
adapt: there the network has other tensors at that stride, so `set_output_stride` refuses and ImageNet weights do not fit.

| encoder | timm name | family | M parameters | channels | output strides | 16: 128 / 129 | 8: 128 / 129 |
|---|---|---|---|---|---|---|---|
"""


def write_docs(info: Sequence[EncoderInfo], path: Path, timm_version: str) -> None:
    """Write the page; `info` are the usable encoders."""
    by_name = {one.name: one for one in info}
    head = _HEAD.format(
        count=len(info),
        timm_version=timm_version,
        example="mobilenetv2",
        se_example=_example(by_name, "seresnet50"),
        pool_example=_example(by_name, "resnet50d"),
        convnext_example=_example(by_name, "convnext_tiny"),
    )
    rows = "\n".join(map(_row, sorted(info, key=lambda one: (one.family, one.name))))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + rows + "\n", encoding="utf-8")


def _row(info: EncoderInfo) -> str:
    cells = (
        f"`{info.short_name}`",
        f"`{info.name}`" if info.family != "drn" else "our own",
        info.family,
        f"{info.params / 1e6:.2f}",
        " ".join(map(str, info.channels)),
        " ".join(f"{stride}{'' if info.shares_weights(stride, info.strides[-1]) else '*'}" for stride in info.strides),
        _differences(info.exact16),
        _differences(info.exact8),
    )
    return f"| {' | '.join(cells)} |"


def _differences(measured: tuple[float | None, ...] | None) -> str:
    if measured is None:
        return ""
    return " / ".join("moved" if one is None else f"{one:g}" for one in measured)


def _example(by_name: dict[str, EncoderInfo], name: str) -> str:
    info = by_name[name]
    return f"`{name}`: {_differences(info.exact16)} at stride 16, {_differences(info.exact8)} at stride 8"
