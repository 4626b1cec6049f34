"""Counting a few of many blocks that are alike gives what counting all of them gives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from asymflow import cost
from asymflow.cost.repeated import KEPT, shorten


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.up, self.down, self.times = nn.Linear(width, hidden), nn.Linear(hidden, width), 1

    def forward(self, x, condition):
        for _ in range(self.times):
            x = x + self.down(nn.functional.gelu(self.up(x * condition)))
        return x


class Network(nn.Module):
    """Two lists of blocks, between layers of their own. The condition of all blocks is computed once."""

    def __init__(self, depths, hidden=12, recomputed=False, frozen=False):
        super().__init__()
        self.embed, self.modulation, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.lists = nn.ModuleList(nn.ModuleList(Block(8, hidden) for _ in range(depth)) for depth in depths)
        self.recomputed = recomputed
        if frozen:
            self.lists.requires_grad_(False)

    def forward(self, x):
        x = self.embed(x)
        condition = self.modulation(x)
        for block in (block for blocks in self.lists for block in blocks):
            x = checkpoint(block, x, condition, use_reentrant=False) if self.recomputed else block(x, condition)
        return self.head(x).square().mean()


def counts(network, batch, backward, passes=1):
    """The cost as counted in full, and with few blocks; and how many blocks the latter ran."""
    ran = []

    def run(network):
        ran.append(sum(map(len, network.lists)))
        with torch.no_grad():
            for _ in range(passes - 1):
                network(torch.empty(batch, 5))
        return network(torch.empty(batch, 5))

    whole = cost.count(network, run, backward)
    del ran[:]
    return whole, cost.count(network, run, backward, lambda network: shorten(*network.lists)), ran


def check_few_cost_what_all_cost(depths, batch, recomputed, frozen, backward, passes):
    network = Network(depths, recomputed=recomputed, frozen=frozen)
    whole, few, ran = counts(network, batch, backward, passes)
    assert few == whole
    assert ran == [sum(min(depth, KEPT) for depth in depths)]
    assert [len(blocks) for blocks in network.lists] == list(depths)  # the network itself is as it was


@pytest.mark.parametrize("recomputed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_few_blocks_cost_what_all_cost(recomputed):
    check_few_cost_what_all_cost((6, 7), 2, recomputed, frozen=False, backward=True, passes=2)


@pytest.mark.slow
@given(
    st.tuples(st.integers(0, 12), st.integers(1, 12)),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(1, 2),
)
def test_few_blocks_of_any_network_cost_what_all_cost(depths, batch, recomputed, frozen, backward, passes):
    check_few_cost_what_all_cost(depths, batch, recomputed, frozen, backward, passes)


@pytest.mark.slow
@pytest.mark.parametrize("odd", range(7))
@pytest.mark.parametrize("seen", [True, False])
def test_blocks_that_differ_are_all_counted(odd, seen):
    """seen: their layers differ. Otherwise it is only in what they do."""
    network = Network((7,))
    if seen:
        network.lists[0][odd] = Block(8, 50)
    else:
        network.lists[0][odd].times = 3
    whole, few, ran = counts(network, 2, True)
    assert few == whole or (not seen and odd in (4, 5))  # these two are taken out
    assert not seen or ran == [7]
