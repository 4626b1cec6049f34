"""Features of many images, a row for each, in parts of which none need be in memory."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Rows:
    """The rows of several tensors (n, F), which may be mapped from files, one after the other."""

    def __init__(self, parts: Sequence[Tensor]):
        self.parts = [part for part in parts if len(part)]
        self.ends = torch.tensor([len(part) for part in self.parts]).cumsum(0)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def width(self) -> int:
        return self.parts[0].shape[1]

    def take(self, indices: Sequence[int]) -> Tensor:
        """The rows of these numbers, (len(indices), F), in this order."""
        indices = torch.as_tensor(indices)
        which = torch.bucketize(indices, self.ends, right=True)
        rows = self.parts[0].new_empty(len(indices), self.width)
        for number in which.unique().tolist():
            start = int(self.ends[number]) - len(self.parts[number])
            asked = which == number
            rows[asked] = self.parts[number][indices[asked] - start]
        return rows

    def chunks(self, size: int = 4096) -> Iterator[Tensor]:
        """All rows, in tensors of `size` rows; the last may have fewer."""
        for start in range(0, len(self), size):
            yield self.take(range(start, min(start + size, len(self))))
