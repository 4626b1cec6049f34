"""Images whose patches lie in a subspace, and the commands that look for it."""

import torch

from asymflow.pixels import tensor_to_pil

PCA = ["subspace", "pca", "--patch-size=4", "--image-size=8", "--device=cpu"]
PROCRUSTES = ["subspace", "procrustes", "--patch-size=4", "--device=cpu"]


def replaced(argv, *options):
    """The words of a command with these, such as --rank=3, instead of its own of the same names."""
    names = [option.partition("=")[0] for option in options]
    return [*(word for word in argv if word.partition("=")[0] not in names), *options]


def write_images(folder, n=40, size=8, seed=0):
    """Images whose 4 x 4 patches lie in three directions, but for the rounding to 8 bits."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(3, 48, generator=torch.Generator().manual_seed(99)).mT).Q.mT
    count = (size // 4) ** 2
    weights = (torch.rand(n, count, 3, generator=g) * 2 - 1) * torch.tensor([2.0, 1.0, 0.7])
    tokens = (weights @ directions).clamp(-1, 1)
    folder.mkdir(parents=True, exist_ok=True)
    for i, t in enumerate(tokens):
        image = t.reshape(size // 4, size // 4, 4, 4, 3).permute(4, 0, 2, 1, 3).reshape(3, size, size)
        tensor_to_pil(image).save(folder / f"{i:03}.png")
    return folder
