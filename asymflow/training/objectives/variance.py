"""The variance-reduced loss of latent-to-pixel finetuning, and its perceptual term (arXiv 2605.12964).

All tensors are tokens (B, N, D), channel_first, of normalized Oklab images. The same noise eps is added to the pixels
x0 and to the lifted latents x0_low = s A z. From the noisy latents the frozen latent model, the reference, predicts
x0_ref. The errors of the two models, d = x0 - x0_pred and d_low = x0_low - x0_ref, have much of their randomness in
common. So d_low is subtracted from the target, as far as it agrees with d, patch by patch and channel by channel. With
<a, b> the mean of a b over the pixels of a patch:

    c = clamp(<d, d_low> / max(<d_low, d_low>, 1e-4), 0, 1)
    target = x0 - (1 - w) c d_low        with w = (1 - sigma)^2 / ((1 - sigma)^2 + (shift sigma)^2)
    loss = mean (x0_pred - target)^2 / max(sigma, floor)^2

If the reference predicts the mean of x0_low given its noisy image, then d_low has mean zero, and subtracting it does
not bias the target, except that c depends on d. Near sigma = 0 the noisy pixels know more than the reference, and w
leaves the target unchanged.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from asymflow import opening
from asymflow.color import oklab_to_rgb
from asymflow.errors import InputError
from asymflow.flow_matching import SIGMA_FLOOR
from asymflow.numerics import no_autocast

SHIFT = 0.3
ENERGY_FLOOR = 1e-4


def agreement(error: Tensor, low_error: Tensor, channels: int) -> Tensor:
    """c, (B, N, C, 1) in [0, 1], of two errors (B, N, D): how much of `low_error` is in `error`, for each patch."""
    d, d_low = (e.unflatten(-1, (channels, -1)) for e in (error, low_error))
    energy = d_low.square().mean(-1, keepdim=True).clamp(min=ENERGY_FLOOR)
    return ((d * d_low).mean(-1, keepdim=True) / energy).clamp(0, 1)


def signal_share(sigma: Tensor, shift: float = SHIFT) -> Tensor:
    """w, for noise levels of any shape: 1 at sigma = 0, 0 at sigma = 1."""
    signal, noise = (1 - sigma).square(), (shift * sigma).square()
    return signal / (signal + noise)


def variance_reduced_target(x0: Tensor, low_error: Tensor, c: Tensor, sigma: Tensor, shift: float = SHIFT) -> Tensor:
    """`x0 - (1 - w) c d_low`, (B, N, D). low_error: d_low. c: from `agreement`. sigma: (B,)."""
    share = (1 - signal_share(sigma, shift))[:, None, None, None] * c
    return x0 - (share * low_error.unflatten(-1, (c.shape[2], -1))).flatten(-2)


def denoising_loss(x0_pred: Tensor, target: Tensor, sigma: Tensor, floor: float = SIGMA_FLOOR) -> Tensor:
    """The mean over each image (B,). For target = x0 it is `flow_matching_loss` of the velocity that gives x0_pred."""
    return (x0_pred - target).flatten(1).square().mean(1) / sigma.clamp(min=floor).square()


class PerceptualLoss:
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924) of VGG16 between decoded images, weighted pixel by pixel.

    weights: a file with torchvision's weights of VGG16 (safetensors, or a pickle of plain tensors); None for that of
    `torchvision_vgg`; "random" for random weights from a fixed seed, which are enough for tests.

    It is not an nn.Module, so that neither the engine nor checkpoints see it. Raises InputError if the file has other
    weights.
    """

    def __init__(self, weights: str | None, device: torch.device | str, dtype: torch.dtype = torch.float32):
        import lpips  # here, because it imports torchvision and takes seconds

        file = weights or torchvision_vgg()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # so that all ranks, and a resumed training, have the same random weights
            model = lpips.LPIPS(net="vgg", spatial=True, pnet_rand=True, verbose=False)
        if file != "random":
            load_vgg(model.net, Path(file))
        self.model = model.eval().requires_grad_(False).to(device, dtype)
        self.dtype = dtype

    def __call__(self, x0_pred: Tensor, x0: Tensor, weight: Tensor) -> Tensor:
        """The mean of `weight` times the LPIPS distance over each image (B,).

        x0_pred, x0: (B, 3, H, W), normalized Oklab. weight: (B, 1, H, W). Differentiable in x0_pred.
        """
        with no_autocast(x0):
            images = (oklab_to_rgb(x).to(self.dtype) for x in (x0_pred, x0))
            return (self.model(*images).float() * weight).flatten(1).mean(1)


def torchvision_vgg() -> Path:
    """The file of VGG16 in torchvision's cache, downloaded if it is missing. InputError if that fails."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from torchvision.models import VGG16_Weights

    url = VGG16_Weights.IMAGENET1K_V1.url
    name = url.rpartition("/")[2]  # vgg16-HASH.pth
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    instead = "give loss.perceptual.vgg, the file of torchvision's VGG16"
    if not path.exists():
        if HF_HUB_OFFLINE:
            raise InputError(f"{path} is missing, and HF_HUB_OFFLINE is set: {instead}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), Path(name).stem.partition("-")[2], progress=False)
        except (OSError, RuntimeError) as e:  # the network failed, or the file has another hash
            raise InputError(f"{url} could not be downloaded ({e}): {instead}") from None
    return path


def load_vgg(net: nn.Module, path: Path) -> None:
    """Load torchvision's weights of VGG16 (features.N.weight, ...) into lpips's network, which has them in slices."""
    read = opening.read_tensors(path)[0] if path.suffix == ".safetensors" else opening.read_pickle(path)
    own = net.state_dict()  # slice1.0.weight, ...: the numbers after the dot are torchvision's
    names = {name: "features." + name.split(".", 1)[1] for name in own}
    try:
        found = {name: read[theirs] for name, theirs in names.items()}
        net.load_state_dict(found)
    except (KeyError, TypeError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"{path} does not hold torchvision's weights of VGG16: {reason}") from None
