"""FLUX.2 as a backbone: the stock transformer of diffusers, on latent tokens or lifted to pixels.

A latent model predicts the velocity of latent tokens z of dimension r. `fit_procrustes` gives an orthonormal basis A
(D, r) and a scale s for which A^T x / s is about z, where x are the pixel tokens of the same squares. With these the
latent model becomes a model of pixels: the input projection W_in becomes W_in A^T, the output projection W_out becomes
A W_out, and nothing between them changes. Its output is then an asymmetric velocity, so `AsymFlow` around it returns
the velocity of pixels; inside of the subspace it is exactly that of the latent model (arXiv 2605.12964).

    latent = latent_flow(transformer)                     # of latents (B, r, h, w), rank r of r: u-prediction
    flow = latent_to_pixel(transformer, subspace)         # of normalized Oklab images (B, 3, H, W)
    u = flow(x_sigma, sigma, encoder_hidden_states=text)  # text embeddings (B, L, joint_attention_dim)

Both share all weights of `transformer`, except that `flow` has projections of its own.
"""

from collections.abc import Sequence

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn

from asymflow.errors import InputError
from asymflow.model import AsymFlow
from asymflow.numerics import has_float64
from asymflow.patches import CHANNEL_FIRST, patchify
from asymflow.subspace import Subspace

REFERENCE_TIME = 10  # the time in the position ids of the first reference image; 20, 30, ... for the next ones
SIGMA_MIN = 1e-4  # with which the published pixel model is sampled
PROMPT_LENGTH = 512  # positions of a prompt, with which FLUX.2 and the published pixel model were trained


class Flux2(nn.Module):
    """A `Flux2Transformer2DModel` with the interface of a backbone. It adds no weights.

    transformer: has as many input and output channels as tokens have dimensions, and no guidance embedding.
    patch_size: of the tokens; 1 for latents, which have one token for each of their "pixels".
    scale: that of the subspace of the `AsymFlow` around it; tokens of reference images are divided by it.
    prompt_length: positions of the prompts that it was trained on.
    Raises InputError if the transformer has different numbers of input and output channels, patches of its own, or a
    guidance embedding.
    """

    token_order = CHANNEL_FIRST

    def __init__(
        self,
        transformer: Flux2Transformer2DModel,
        patch_size: int,
        scale: float = 1.0,
        prompt_length: int = PROMPT_LENGTH,
    ):
        super().__init__()
        check_transformer(transformer)
        self.transformer, self.patch_size, self.scale = transformer, patch_size, scale
        self.prompt_length = prompt_length

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it computes. With diffusers' layerwise casting, weights are stored in another one."""
        return self.transformer.dtype

    def forward(
        self,
        tokens: Tensor,
        tau: Tensor,
        encoder_hidden_states: Tensor,
        grid: tuple[int, int],
        condition_images: Sequence[Tensor] = (),
        joint_attention_kwargs: dict | None = None,
    ) -> Tensor:
        """The prediction for tokens (B, N, D) at the noise levels tau (B,), in the dtype of the transformer.

        encoder_hidden_states: text embeddings (B, L, joint_attention_dim). grid: (h, w) with h w = N.
        condition_images: reference images (B, C, H_i, W_i), each of its own size, in the units of the flow's x0. They
        become additional tokens, divided by the scale, so that inside of the subspace they are clean latents. Each
        image has its own time in the position ids. joint_attention_kwargs: see diffusers; {"scale": 0.5} weakens LoRAs.
        """
        ids, count, dtype = [positions(grid, tokens.device)], tokens.shape[1], self.transformer.dtype
        parts = [tokens]
        for number, image in enumerate(condition_images, start=1):
            reference = patchify(image, self.patch_size, self.token_order) / self.scale
            size = [length // self.patch_size for length in image.shape[-2:]]
            parts.append(reference.to(tokens).expand(len(tokens), -1, -1))
            ids.append(positions(size, tokens.device, REFERENCE_TIME * number))
        text = encoder_hidden_states.to(dtype)
        text_ids = torch.zeros(text.shape[1], 4, dtype=torch.int64, device=tokens.device)
        text_ids[:, 3] = torch.arange(text.shape[1], device=tokens.device)
        output = self.transformer(
            hidden_states=torch.cat(parts, dim=1).to(dtype),
            encoder_hidden_states=text,
            timestep=tau,
            img_ids=torch.cat(ids),
            txt_ids=text_ids,
            joint_attention_kwargs=joint_attention_kwargs,
            return_dict=False,
        )[0]
        return output[:, :count]


def positions(grid: Sequence[int], device: torch.device, time: int = 0) -> Tensor:
    """Position ids (h w, 4) of the tokens of an image: time, row, column, and 0 for the place in a text."""
    ids = torch.zeros(*grid, 4, dtype=torch.int64, device=device)
    ids[..., 0] = time
    ids[..., 1] = torch.arange(grid[0], device=device)[:, None]
    ids[..., 2] = torch.arange(grid[1], device=device)
    return ids.flatten(0, 1)


def latent_flow(transformer: Flux2Transformer2DModel) -> AsymFlow:
    """The latent model as an AsymFlow: u-prediction of latents (B, r, h, w), as the transformer sees them.

    Raises InputError as `Flux2`.
    """
    return AsymFlow(Flux2(transformer, patch_size=1), Subspace.full(transformer.config.in_channels), sigma_min=0.0)


def latent_to_pixel(
    transformer: Flux2Transformer2DModel, subspace: Subspace, patch_size: int = 16, sigma_min: float = SIGMA_MIN
) -> AsymFlow:
    """A pixel model whose velocity, inside of the subspace, is exactly that of the latent model (arXiv 2605.12964).

    transformer: that of a latent model with r channels. subspace: of rank r, with its scale, see `fit_procrustes`; its
    tokens are channel_first. patch_size: the side, in pixels, of the square that one latent token covers. sigma_min:
    see `AsymFlow`.

    The lifted projections are computed in float64, and rounded to the dtype of the transformer. `transformer` is not
    changed; the new one shares its other weights. The result is on the device of `transformer`. Raises InputError if
    the subspace does not fit the transformer or the patch size.
    """
    check_transformer(transformer)
    if subspace.rank != transformer.config.in_channels:
        raise InputError(
            f"the latent model has {transformer.config.in_channels} channels, but the subspace has the rank "
            f"{subspace.rank}: fit it to the latents of this model (asymflow subspace procrustes)"
        )
    device = transformer.device if has_float64(transformer.device) else torch.device("cpu")
    into, out_of, basis = (
        tensor.detach().to(device).double()
        for tensor in (transformer.x_embedder.weight, transformer.proj_out.weight, subspace.basis)
    )
    lifted = with_projections(transformer, into @ basis.mT, basis @ out_of)
    flow = AsymFlow(Flux2(lifted, patch_size, subspace.scale), subspace, sigma_min=sigma_min)
    return flow.to(transformer.device)


def with_projections(transformer: Flux2Transformer2DModel, into: Tensor, out_of: Tensor) -> Flux2Transformer2DModel:
    """A transformer for tokens of another dimension D, with these projections. It shares all other weights.

    into: x_embedder.weight, (inner, D). out_of: proj_out.weight, (D, inner). Both are cast to the dtype of the weights
    that they replace.
    """
    config = {**transformer.config, "in_channels": into.shape[1], "out_channels": out_of.shape[0]}
    config.pop("_use_default_values", None)  # from_config would reset the keys that it lists to their defaults
    with torch.device("meta"):  # initializes no weights, and allocates no memory for them
        other = Flux2Transformer2DModel.from_config(config)
    for name, module in transformer.named_children():
        if name not in ("x_embedder", "proj_out"):
            setattr(other, name, module)
    for name, weight in (("x_embedder", into), ("proj_out", out_of)):
        old = getattr(transformer, name).weight
        getattr(other, name).weight = nn.Parameter(weight.detach().to(old).contiguous(), old.requires_grad)
    return other.train(transformer.training)


def check_transformer(transformer: Flux2Transformer2DModel) -> None:
    c = transformer.config
    if (c.out_channels or c.in_channels) != c.in_channels or c.patch_size != 1:
        raise InputError(
            f"the transformer must put out tokens as it takes them in, but takes {c.in_channels} channels and puts out "
            f"{c.out_channels} in patches of {c.patch_size}"
        )
    if c.guidance_embeds:
        raise InputError(
            "the transformer has a guidance embedding, as that of FLUX.2-dev: it is a distilled model. Take a base "
            "model, such as FLUX.2-klein-base-9B"
        )
