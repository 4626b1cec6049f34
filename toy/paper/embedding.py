"""The network of shapes64.yaml with another start of its patch embedding, for `embedding`."""

from asymflow.backbones.jit import JiT
from asymflow.subspace import Subspace


def network(image_size: int, num_classes: int, directions: str | None = None, **sizes) -> JiT:
    """A JiT whose patch embedding starts with these directions, a file, or at random, whatever subspace it gets."""
    made = JiT.from_name("S/16", image_size=image_size, num_classes=num_classes, **sizes)
    seed = made.seed_patch_embedding
    made.seed_patch_embedding = lambda subspace: seed(Subspace.load(directions)) if directions else None
    return made
