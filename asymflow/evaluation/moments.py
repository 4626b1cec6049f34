"""Mean and covariance of features that come in parts, in float64, whatever their number."""

import numpy as np
import torch
from torch import Tensor

Statistics = dict[str, np.ndarray]
"""mu (F,) and sigma (F, F) of features, float64."""


class Moments:
    """The mean and covariance of all features that were added. The memory is that of one matrix (F, F).

    Sums are taken about the mean of the first part, so that large features lose no digits.
    """

    def __init__(self):
        self.count, self.origin, self.sum, self.products = 0, None, None, None

    def add(self, features: Tensor) -> None:
        """features: (n, F) of any floating dtype and device."""
        features = features.detach().cpu().double()
        if self.origin is None:
            self.origin = features.mean(0)
            self.sum, self.products = torch.zeros_like(self.origin), self.origin.new_zeros(2 * features.shape[1:])
        centered = features - self.origin
        self.count += len(features)
        self.sum += centered.sum(0)
        self.products += centered.mT @ centered

    def statistics(self) -> Statistics:
        """mu and sigma, as `np.mean` and `np.cov` of all features have them. At least two are needed."""
        mean = self.sum / self.count
        sigma = (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return {"mu": (self.origin + mean).numpy(), "sigma": sigma.numpy()}
