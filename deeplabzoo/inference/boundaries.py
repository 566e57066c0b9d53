"""Labels from small logits by torch alone: fill the cells whose corners agree, interpolate only the pixels of the others.

What `cells` does pixel by pixel in compiled loops is done here with whole tensors, on any device. See `cells` for why it is
exact.
"""

import torch

from deeplabzoo.models.bilinear import Axis

MOST_BOUNDARY = 0.25
"""Share of cells above which interpolating everything is cheaper than gathering single pixels (measured on noise)."""


def labels_by_boundary(low_BCHW: torch.Tensor, rows: Axis, columns: Axis, labels_BHW: torch.Tensor, band_values: int) -> bool:
    """Write the first largest class of every upsampled pixel; return False, nothing written, where that would not pay.

    `low_BCHW` holds float32 logits on the labels' device; if they are not finite, False is returned, too. At most about
    `band_values` float32 values are held at once, in each of five temporary tensors.
    """
    batch, classes, h, w = low_BCHW.shape
    device = low_BCHW.device
    winners_Bhw = low_BCHW.argmax(dim=1)
    right = _after(winners_Bhw, 2)
    boundary_Bhw = (winners_Bhw != right) | (winners_Bhw != _after(winners_Bhw, 1)) | (winners_Bhw != _after(right, 1))
    if not bool(low_BCHW.sum().isfinite() & (boundary_Bhw.float().mean() <= MOST_BOUNDARY)):
        return False
    winners_Bhw = winners_Bhw.to(labels_BHW.dtype)
    places_NC = low_BCHW.permute(0, 2, 3, 1).reshape(-1, classes)
    above_H, down_H = torch.from_numpy(rows.above).long().to(device), torch.from_numpy(rows.weights).to(device)
    left_W, along_W = torch.from_numpy(columns.above).long().to(device), torch.from_numpy(columns.weights).to(device)
    at_once = max(1, band_values // classes)
    step = max(1, at_once // max(1, batch * len(left_W)))
    for top in range(0, len(above_H), step):
        above = above_H[top : top + step]
        band_BHW = winners_Bhw[:, above][:, :, left_W]
        boundary_N3 = boundary_Bhw[:, above][:, :, left_W].nonzero()
        for start in range(0, len(boundary_N3), at_once):
            b, y, x = boundary_N3[start : start + at_once].unbind(1)
            i, j = above[y], left_W[x]
            under, beside = (i + 1).clamp_(max=h - 1), (j + 1).clamp_(max=w - 1)
            down, along = down_H[top + y, None], along_W[x, None]
            upper, lower = (b * h + i) * w, (b * h + under) * w
            left = places_NC[upper + j].mul_(1 - down).add_(places_NC[lower + j].mul_(down))
            other = places_NC[upper + beside].mul_(1 - down).add_(places_NC[lower + beside].mul_(down))
            band_BHW[b, y, x] = left.mul_(1 - along).add_(other.mul_(along)).argmax(dim=1).to(band_BHW.dtype)
        labels_BHW[:, top : top + step] = band_BHW
    return True


def _after(x_Bhw: torch.Tensor, dim: int) -> torch.Tensor:
    """Return every place's neighbour; the last one is its own."""
    last = x_Bhw.shape[dim] - 1
    return torch.cat([x_Bhw.narrow(dim, 1, last), x_Bhw.narrow(dim, last, 1)], dim)
