"""The decoder of V3+ in the form for inference: two maps that are not put together, and large ones in strips of rows.

At stride 4 the decoder's maps are the network's largest beside the stem's. Convolutions of 3x3 read one row further on each
side, so a strip needs no more of its inputs than its own rows and a few around them: the same numbers in a fraction of the
memory.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from deeplabzoo.models.bilinear import enlarged_rows
from deeplabzoo.models.fast_head import FastASPP, SlicedConv, fast_block
from deeplabzoo.models.fused_conv import FusedConv, fold
from deeplabzoo.models.heads import V3PlusHead
from deeplabzoo.models.layers import SeparableConvNormAct

STRIP_BYTES = 2**25
"""Most that one of the decoder's maps takes on a processor; it reads and writes larger ones strip by strip of rows."""
_LEAST_ROWS_PER_REACH = 16
"""The rows around a strip are computed twice; at least so many strip rows for each keep that below an eighth."""


class JoinedConv(nn.Module):
    """The decoder's first convolution over two maps, dense or separable."""

    def __init__(self, block: nn.Module, widths: Sequence[int]) -> None:
        super().__init__()
        self.depthwise = nn.ModuleList()
        if isinstance(block, SeparableConvNormAct):
            depthwise = fast_block(block.depthwise)
            assert isinstance(depthwise, FusedConv)
            places = (slice(0, widths[0]), slice(widths[0], sum(widths)))
            self.depthwise.extend(depthwise.part(place) for place in places)
            block = block.pointwise
        self.dense = SlicedConv(block, widths)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return what the block would answer to the maps put together."""
        if len(self.depthwise):
            maps = [depthwise(x) for depthwise, x in zip(self.depthwise, maps, strict=True)]
        joined: torch.Tensor = self.dense(list(enumerate(maps)))
        return joined


def _splits(block: nn.Module) -> bool:
    """Whether a decoder block may be split over its input's channels: a group norm over both maps may not."""
    return not isinstance(block, SeparableConvNormAct) or isinstance(fast_block(block.depthwise), FusedConv)


class FastV3PlusHead(nn.Module):
    """The V3+ decoder: the upsampled high map and the low-level map are not put together, if its norms allow that."""

    def __init__(self, head: V3PlusHead) -> None:
        super().__init__()
        self.aspp = FastASPP(head.aspp)
        self.refine = fast_block(head.refine)
        self.low_level = fast_block(head.low_level)
        self.align_corners = head.align_corners
        low, high = head.low_level.conv.out_channels, head.aspp.project.conv.out_channels
        self.high_place, self.low_place = (1, 0) if head.low_level_first else (0, 1)
        widths = [low, high] if head.low_level_first else [high, low]
        blocks = list(head.decoder)
        self.joined: JoinedConv | None = JoinedConv(blocks.pop(0), widths) if blocks and _splits(blocks[0]) else None
        self.later = nn.Sequential(*(fast_block(block) for block in blocks))
        self.classifier: FusedConv | SlicedConv
        if len(head.decoder):
            self.classifier = fold(head.classifier, None, None)
        else:
            self.classifier = SlicedConv(head.classifier, widths)
        self.reach = _reach(self.joined, self.later)
        self.widest = max([high, *(block.weight.shape[0] for block in self.later.modules() if isinstance(block, FusedConv))])

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Map [B x C x h x w, the stride-4 feature B x C' x H x W] to logits B x num_classes x H x W.

        The list is emptied, so that each map's memory serves again as soon as it has been read.
        """
        low = self.low_level(features.pop())
        high = self.refine(self.aspp(features.pop()))
        classifier = self.classifier
        if isinstance(classifier, SlicedConv):
            scores = self._enlarged(classifier.part(self.high_place)(high), low)
            answer: torch.Tensor = classifier([(self.low_place, low)], scores)
            return answer
        height, rows = low.shape[2], self._rows_at_once(high, low)
        if rows >= height:
            return self._decoded(self._enlarged(high, low), low)
        assert self.reach is not None
        parts = [
            self._rows_decoded(high, low, slice(top, min(top + rows, height)), self.reach) for top in range(0, height, rows)
        ]
        return torch.cat(parts, dim=2)

    def _decoded(self, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        both = (low, high) if self.low_place == 0 else (high, low)
        decoded = torch.cat(both, dim=1) if self.joined is None else self.joined(both)
        logits: torch.Tensor = self.classifier(self.later(decoded))
        return logits

    def _rows_decoded(self, high: torch.Tensor, low: torch.Tensor, rows: slice, reach: int) -> torch.Tensor:
        """Return some rows of the logits, made of those rows of the maps and as many around them as the convolutions reach."""
        height, width = low.shape[2:]
        read = slice(max(rows.start - reach, 0), min(rows.stop + reach, height))
        enlarged = enlarged_rows(high, (height, width), read, align_corners=self.align_corners)
        return self._decoded(enlarged, low[:, :, read])[:, :, rows.start - read.start : rows.stop - read.start]

    def _rows_at_once(self, high: torch.Tensor, low: torch.Tensor) -> int:
        """Return how many rows are decoded in one go: all of them, but on a processor no more than fit `STRIP_BYTES`."""
        height, width = low.shape[2:]
        if self.reach is None or high.device.type != "cpu" or torch.compiler.is_compiling():
            return height
        row_bytes = high.shape[0] * self.widest * width * high.element_size()
        return max(STRIP_BYTES // row_bytes, _LEAST_ROWS_PER_REACH * self.reach, 1)

    def _enlarged(self, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        return F.interpolate(high, size=low.shape[-2:], mode="bilinear", align_corners=self.align_corners)


def _reach(joined: JoinedConv | None, later: nn.Sequential) -> int | None:
    """Return how many rows away the decoder's convolutions read, or None where a row may depend on the whole map."""
    known = (nn.ModuleList, nn.Sequential, nn.Identity, JoinedConv, SlicedConv, FusedConv)
    if joined is None or any(not isinstance(one, known) for part in (joined, later) for one in part.modules()):
        return None
    first = [*joined.depthwise][:1] + [*joined.dense.parts][:1]
    convolutions = [one for part in (*first, later) for one in part.modules() if isinstance(one, FusedConv)]
    return sum(one.dilation[0] * (one.kernel_size[0] - 1) // 2 for one in convolutions)
