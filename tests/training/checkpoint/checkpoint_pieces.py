"""Small checkpoints, and damage to them."""

import errno
import os

import torch

from asymflow.training.run import checkpoint
from asymflow.training.run.checkpoint import Piece
from asymflow.training.run.ranks import rank0_broadcast

SHAPES = {"a": (2, 3), "b": (5,)}


def pieces(seed):
    g = torch.Generator().manual_seed(seed)
    for kind in ("weights", "exp_avg"):
        for name, shape in SHAPES.items():
            yield Piece(kind, name, 0, torch.randn(torch.Size(shape).numel(), generator=g))


def save(folder, step):
    checkpoint.save(checkpoint.folder_of(folder, step), pieces(step), SHAPES, {"step": step})
    rank0_broadcast(lambda: checkpoint.prune(folder, 1, None))


def check(folder):
    """All checkpoints there are have the right content. Returns their steps."""
    steps = checkpoint.steps(folder)
    for step in steps:
        path = checkpoint.folder_of(folder, step)
        assert checkpoint.fault(path) is None
        reader = checkpoint.Reader(path)
        assert reader.state["step"] == step
        for piece in pieces(step):
            assert torch.equal(reader.full(piece.kind)[piece.name].flatten(), piece.values)
    return steps


def refuse(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x10
    path.write_bytes(content)


DAMAGE = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
}
