"""The running average of the weights (EMA): smoother than the last step, and what is evaluated and published."""

import copy

import torch

from deeplabzoo.models.deeplab import DeepLab


class Average:
    """A copy of the network that follows it: average = d x average + (1 - d) x weights, statistics of norms included.

    d rises as (1 + step) / (10 + step) up to `decay`, so that the first steps do not linger: a function of the step alone.
    """

    def __init__(self, net: DeepLab, decay: float) -> None:
        self.net = copy.deepcopy(net).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def follow(self, net: DeepLab, step: int) -> None:
        """Take in the weights after update number `step`, counted from 0."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for mine, its in zip(self.net.state_dict().values(), net.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(its.to(mine), weight)
            else:
                mine.copy_(its)
