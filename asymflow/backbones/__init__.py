"""Networks that an asymmetric flow can wrap, and what it asks of them. None of them knows about asymmetric flow.

A backbone is a module of torch with

    forward(tokens (B, N, D), tau (B,), **conditions) -> (B, N, D)

tokens: k x_sigma in the backbone's dtype; tau: their noise level in [0, 1], in float32 or better. conditions: whatever
`flow(x_sigma, sigma, **conditions)` is called with. It may return a tuple, whose first element is the prediction:
`flow` then returns (velocity, *the others), untouched. Nothing else is required.

    what it may have        what that is                                        without it
    argument `grid`         of `forward`: the number of tokens along each       it is not told
                            axis, (h, w), or (T, h, w) of a video
    patch_size              pixels along the side of a token                    the subspace or AsymFlow has to have it
    token_order             see `asymflow.patchify`                             the same; or else channel_last
    noise_scale             standard deviation of the noise                     1
    dtype                   in which it computes                                that of its weights
    grid                    (h, w) of the images that it is trained with        `generate` has to be given a size
    num_classes             of the condition `labels` (B,), integers from 0;    `generate` has to be given a null_label
                            num_classes itself means "no class"                 for guidance; labels are not checked
    config                  a dict for config.json: the arguments that make     it is not in a saved model, and saving
                            the backbone again                                  warns of that
    checkpoint_every        recompute every n-th block in the backward pass     nothing is recomputed by request
    float32_attention       of any layer in it: whether its attention is in     it follows autocast
                            float32, see `asymflow.precision`

A saved model whose backbone is not in this library is loaded by `AsymFlow.from_pretrained(folder, backbone=...)`, with
a backbone of the same shapes: no code is ever taken from a file.
"""

import inspect
from collections.abc import Mapping

from torch import Tensor, nn

from asymflow.errors import InputError


def forward_parameters(backbone: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Of a backbone, or of what it wraps (as torch.compile and DistributedDataParallel do)."""
    for module in backbone.modules():
        parameters = inspect.signature(module.forward).parameters
        if not all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()):  # not just passed on
            return parameters
    return {}


def conditions_needed(backbone: nn.Module) -> list[str]:
    """The conditions that its forward cannot do without, by name."""
    named = [p for p in forward_parameters(backbone).values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [p.name for p in named[2:] if p.default is p.empty and p.name != "grid"]


def check_labels(labels: Tensor, num_classes: int) -> None:
    """InputError, naming the first, unless all labels are classes or `num_classes`, which means "no class"."""
    wrong = labels[(labels < 0) | (labels > num_classes)]
    if len(wrong):
        raise InputError(
            f"label {wrong[0].item()} is not a class: they run from 0 to {num_classes - 1}, and {num_classes} means no "
            "class"
        )
