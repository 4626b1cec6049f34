"""Networks of many blocks that are alike: a few are run, and one of them stands for the others.

A step goes through alike blocks one after the other, in the forward pass, in the backward pass and wherever they are
recomputed. Each of them does the same operations, and allocates and frees the same bytes. So a stretch of the step,
from one block to the next, is measured once and repeated. Whether it is the same as the stretch of a neighbouring block
is checked each time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor, nn

KEPT = 5  # blocks of each list: the last one but one is repeated, and those at either end may differ from it

Repeats = dict[nn.Module, int]
"""How often a block is there in the whole network."""


def shorten(*lists: nn.ModuleList) -> Repeats:
    """Take blocks out of each list whose blocks are alike, and return which of those that stay stand for them."""
    repeats = {}
    for blocks in lists:
        if (count := len(blocks)) > KEPT and len({description(block) for block in blocks}) == 1:
            del blocks[KEPT - 1 : -1]  # the last one stays
            repeats |= dict.fromkeys(blocks, 1) | {blocks[-2]: count - KEPT + 1}
    return repeats


def description(block: nn.Module) -> tuple:
    """What the blocks of a list must have in common: layers, and the kinds of their parameters."""
    kinds = [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters()]
    return repr(block), *kinds


class NotAlikeError(Exception):
    """A block that stands for others is unlike its neighbours."""


@dataclass
class Stretch:
    """What happens from one mark to the next. block: of the mark that begins it; None at the beginning of the step.

    flops: operations. change: bytes that are allocated and not freed. high: the most bytes in between. Both are
    relative to the beginning.
    """

    block: nn.Module | None
    flops: int = 0
    change: int = 0
    high: int = 0

    def figures(self) -> tuple[int, int, int]:
        return self.flops, self.change, self.high


def watch(repeats: Repeats, mark: Callable[[nn.Module], None], in_backward: Callable[[], bool]) -> None:
    """Have `mark` called where a block begins, and in the backward pass where the gradient of its input is known.

    Blocks that are recomputed begin again in the backward pass, and no other marks are needed there.
    """
    recomputing = False

    def begins(block: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal recomputing
        mark(block)
        if in_backward():
            recomputing = True
            return
        inputs = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad)
        if (x := next(inputs, None)) is not None:
            x.register_hook(lambda gradient: None if recomputing else mark(block))

    for block in repeats:
        block.register_forward_pre_hook(begins, with_kwargs=True)


def repeated(stretches: Sequence[Stretch], repeats: Repeats) -> Iterator[tuple[int, list[Stretch]]]:
    """(how often, stretches of one block) in the order of the step.

    Raises NotAlikeError if a block that stands for others is unlike its neighbours.
    """
    groups = [list(group) for _, group in groupby(stretches, key=lambda stretch: stretch.block)]
    figures = [[stretch.figures() for stretch in group] for group in groups]
    for i, group in enumerate(groups):
        times = repeats.get(group[0].block, 1)
        if times > 1 and figures[i] not in figures[max(i - 1, 0) : i] + figures[i + 1 : i + 2]:
            raise NotAlikeError
        yield times, group


def totals(stretches: Sequence[Stretch], repeats: Repeats = {}) -> Stretch:  # noqa: B006
    """Everything together, as if all blocks had been run."""
    total = Stretch(None)
    for times, group in repeated(stretches, repeats):
        one = Stretch(None)
        for stretch in group:
            add(one, stretch)
        add(total, one)
        if times > 1:
            add(total, Stretch(None, (times - 2) * one.flops, (times - 2) * one.change))
            add(total, one)
    return total


def add(total: Stretch, then: Stretch) -> None:
    total.high = max(total.high, total.change + then.high)
    total.flops += then.flops
    total.change += then.change
