"""Networks that an asymmetric flow can wrap, and what a network must have for that. None knows about asymmetric flow.

A backbone is a torch module with

    forward(tokens (B, N, D), tau (B,), **conditions) -> (B, N, D)

tokens: k x_sigma in the backbone's dtype; tau: their noise level in [0, 1], in float32 or better. conditions: those
that `flow(x_sigma, sigma, **conditions)` is called with. It may return a tuple, whose first element is the prediction:
`flow` then returns (velocity, *the other elements). Nothing else is required.

    what it may have        what that is                                        without it
    argument `grid`         of `forward`: the number of tokens along each       forward is called without it
                            axis, (h, w), or (T, h, w) of a video
    patch_size              pixels along the side of a token                    the subspace or AsymFlow must have it
    token_order             see `asymflow.patchify`                             that of the subspace or AsymFlow, or
                                                                                else channel_last
    noise_scale             standard deviation of the noise                     1
    dtype                   the dtype in which it computes                      that of its weights
    grid                    (h, w) of the images that it is trained with        `generate` must be given a size
    num_classes             of the condition `labels` (B,), integers from 0;    `generate` must be given a null_label
                            num_classes itself means "no class"                 for guidance; labels are not checked
    config                  a dict for config.json: the arguments that make     a saved model does not have them, and
                            the backbone again                                  saving warns of that
    blocks                  a list of modules, all of one class: its repeated   train.compile, model.checkpoint_every
                            layers, for torch.compile and ZeRO-3                are refused
    argument                of its class: recompute every n-th block in the     train_ddp.py wraps its `blocks`
    `checkpoint_every`      backward pass
    seed_patch_embedding    a method, called with the `Subspace` before         training starts from its own weights
                            training from scratch
    config["width"], and    of `forward`: also return the tokens (B, n, width)  loss.repa is refused
    return_tokens_after     after so many blocks
    float32_attention       of any layer in it: whether its attention is in     it follows autocast
                            float32, see `asymflow.precision`

To train your own, name it in the configuration, `model.backbone: mypackage.net:MyNet`, and give the arguments of its
class in `model.options`; the page docs/backbones.md shows it. It needs a patch_size, and the condition `labels`. If it
has num_classes, grid or noise_scale, they must be those of the section `model`; but model.noise_scale, if it is given,
is used instead of its own.

A saved model whose backbone is not in this library is loaded by `AsymFlow.from_pretrained(folder, backbone=MyNet)`:
code that only a file names is never run.
"""

TABLE = {"JiT": "asymflow.backbones.jit:JiT"}
"""Backbones by their names in configurations and saved models. A name in a file is looked up here, never imported."""
