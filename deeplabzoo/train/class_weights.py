"""Class weights from pixel counts: what rare classes are worth in the loss."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from deeplabzoo.errors import UsageError

ClassWeights = Literal["none", "median_frequency", "enet", "inverse_sqrt"]
CLASS_WEIGHTS: tuple[ClassWeights, ...] = ("none", "median_frequency", "enet", "inverse_sqrt")


def class_weights(
    kind: str, pixels_C: NDArray[np.int64], present_pixels_C: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Return one weight a class from the training set's pixel counts; a class that never occurs gets 1.

    `pixels_C` counts the pixels of each class; `present_pixels_C` the valid pixels of the images that hold the class
    (None: of all images). Raises UsageError for an unknown kind.

    - `median_frequency`: median(f) / f with f = pixels / present_pixels (Eigen and Fergus, arXiv:1411.4734, section 6.3.2);
    - `enet`: 1 / ln(1.02 + share) (ENet, arXiv:1606.02147, section 5.2), between 1.42 and 50.5;
    - `inverse_sqrt`: share^-0.5, scaled so that the mean over pixels is 1.
    """
    if kind not in CLASS_WEIGHTS:
        raise UsageError(f"There are no class weights {kind!r}; there are {', '.join(CLASS_WEIGHTS)}, or numbers of your own.")
    weights = np.ones(len(pixels_C))
    seen = pixels_C > 0
    if kind == "none" or not seen.any():
        return weights
    share = pixels_C[seen] / pixels_C.sum()
    if kind == "enet":
        weights[seen] = 1 / np.log(1.02 + share)
    elif kind == "inverse_sqrt":
        weights[seen] = share**-0.5 / np.sum(share**0.5)
    else:
        images = np.full(len(pixels_C), pixels_C.sum()) if present_pixels_C is None else present_pixels_C
        frequency = pixels_C[seen] / images[seen]
        weights[seen] = np.median(frequency) / frequency
    return weights
