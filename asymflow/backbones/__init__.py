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
    blocks                  a list of modules, all of one class: its repeated   train.compile, model.checkpoint_every
                            layers, for torch.compile and ZeRO-3                are refused
    argument                of its class: recompute every n-th block in the     train_ddp.py wraps its `blocks`
    `checkpoint_every`      backward pass
    seed_patch_embedding    a method of a `Subspace`, called before training    training starts from its own weights
    float32_attention       of any layer in it: whether its attention is in     it follows autocast
                            float32, see `asymflow.precision`

To train one of your own, name it in the configuration, `model.backbone: mypackage.net:MyNet`, and give the arguments of
its class in `model.options`; the page docs/backbones.md shows it. It needs a patch_size, and the condition `labels`.

A saved model whose backbone is not in this library is loaded by `AsymFlow.from_pretrained(folder, backbone=MyNet)`: no
code is ever taken from a file.
"""

TABLE = {"JiT": "asymflow.backbones.jit:JiT"}
"""By the names that configurations and saved models have; what is in a file is looked up here, never imported."""
