"""The loss outside of a subspace alone: what does a network do there if nothing is asked of it inside?"""

from functools import partial

from torch import Tensor, nn

from asymflow.flow_matching import flow_matching_loss, noise_level, noisy
from asymflow.model import AsymFlow
from asymflow.patches import patchify
from asymflow.subspace import Subspace
from asymflow.training.config.reading import Config
from asymflow.training.loader import Batch
from asymflow.training.objectives.class_conditional import ClassConditional


class Outside(ClassConditional):
    """Flow matching without the error along the directions of a subspace. subspace: its file."""

    def __init__(self, config: Config, flow: AsymFlow, subspace: str):
        super().__init__(config, flow)
        self.subspace = Subspace.load(subspace).to(flow.subspace.basis.device)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        c, x0, eps = self.config.loss, batch.x0, batch.eps
        sigma = noise_level(batch.normal, c.sigma_mean, c.sigma_std, c.sigma_shift)
        velocity = model(noisy(x0, eps, sigma), sigma, labels=batch.labels)
        tokens = partial(patchify, patch_size=self.flow.patch_size, token_order=self.flow.token_order)
        inside = self.subspace.project(tokens(velocity - (eps - x0)))
        return flow_matching_loss(tokens(velocity) - inside, tokens(x0), tokens(eps), sigma, c.sigma_floor)[:, None]
