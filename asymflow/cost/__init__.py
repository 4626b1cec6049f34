"""What a model costs: parameters, operations and memory, counted on tensors that have shapes but no numbers.

    cost = count(model, lambda model: model(x).square().mean())     # of forward and backward
    cost.flops, cost.kept, cost.peak
    training_memory(trained=10**9, gpus=8, stage=2)                 # all that does not grow with the batch

Counting needs neither the weights, nor a GPU, nor the memory that it counts. A JiT-H takes seconds on a laptop.
"""

import copy
import math
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from asymflow.conditions import conditions_needed, unwrapped
from asymflow.cost.repeated import NotAlikeError, Repeats, Stretch, totals, watch
from asymflow.errors import InputError
from asymflow.model import AsymFlow

PRECISIONS = ("autocast", "bfloat16", "float32")
PEAKS = {  # for GPUs whose names have these words: 10^12 operations a second in bfloat16, dense, from the data sheets
    "B200": 2250,
    "GB200": 2500,
    "H100": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "GH200": 989,
    "H200": 989,
    "H200 NVL": 835,
    "H20": 148,
    "A100": 312,
    "A30": 165,
    "A40": 150,
    "A10": 125,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "RTX A6000": 155,
    "RTX 6000 Ada": 364,
    "RTX 3090": 71,
    "RTX 4090": 165,
    "RTX 5090": 210,
}
PARTS = {"MIG", "Laptop", "Ti", "D"}  # a name with one of these words is of another GPU, or of a slice of one


def parameters(model: nn.Module) -> tuple[int, int]:
    """`(total, trainable)` numbers of parameters. A shared parameter counts once; buffers do not count."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trainable in sizes if trainable)


def largest_layer(model: nn.Module) -> int:
    """The number of parameters of the layer with the most."""
    return max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())


def peak_flops(device: torch.device) -> float | None:
    """The peak of a GPU in bfloat16, in FLOPs per second; None for CPUs, unknown GPUs and slices of a GPU.

    From the data sheet, for dense matrix products that are accumulated in float32.
    """
    if device.type != "cuda":
        return None
    words = set(re.findall(r"\w+", torch.cuda.get_device_name(device)))
    known = [name for name in PEAKS if set(name.split()) <= words and not words & PARTS]
    return PEAKS[max(known, key=lambda name: len(name.split()))] * 1e12 if known else None


# ---- Operations and activations --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Cost:
    """flops: floating point operations. kept: bytes that are alive after the forward pass, for the backward pass.
    peak: the most bytes at any time."""

    flops: int
    kept: int
    peak: int


def count(
    model: nn.Module,
    run: Callable[[nn.Module], Tensor],
    backward: bool = True,
    shorten: Callable[[nn.Module], Repeats] | None = None,
) -> Cost:
    """What `run(model)` costs, which returns a loss, and its backward pass.

    run: called with a copy of the model that has shapes but no numbers; it makes its own inputs, on the CPU.
    shorten: called with the same copy, takes out most of the blocks that are alike, and returns which stand for them
    (see repeated.py). The cost is the same, and counted several times faster. If the blocks are not alike after all,
    all of them are counted.

    A multiply-add is two operations (tables in papers, such as that of arXiv 2511.13720, often call it one "flop").
    Only matrix products and convolutions are counted; all else is small. What is recomputed in the backward pass counts
    twice, but attention is counted as if its scores were kept for it, whichever kernel runs it.

    The bytes are without weights, buffers and the gradients of weights. Under autocast they include the bfloat16 copies
    of the weights, which do not grow with the batch. At the peak there are also the gradients of activations, the
    gradient of one weight before it is added to the stored one, and what is recomputed. The kernels are those of the
    CPU, whose attention keeps no scores, like flash attention; each storage counts once. For GPUs this is an upper
    bound: their fused RMSNorm (torch >= 2.9) would save 17 % of a JiT-H under autocast and 33 % in bfloat16, and their
    dropout keeps one byte for each number. On the other hand, gaps of the allocator and workspaces of kernels are not
    counted.
    """
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it has no fused RMSNorm for mixed dtypes
        whole, model = model, stand_in(model)
        repeats = shorten(model) if shorten else {}
        for weight in model.parameters():
            weight.grad = torch.empty_like(weight) if weight.requires_grad else None
        gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
        with Counter([*model.parameters(), *model.buffers(), *held_tensors(model), *gradients]) as counter:
            forward: list[Stretch] = []
            watch(repeats, counter.mark, in_backward=lambda: bool(forward))
            result = run(model)
            forward += counter.stretches
            if backward:
                counter.mark(None)
                result.backward()
    try:
        kept, total = totals(forward, repeats).change, totals(counter.stretches, repeats)
    except NotAlikeError:
        return count(whole, run, backward)
    return Cost(total.flops, kept, total.high)


def forward_flops(
    flow: AsymFlow,
    image_shape: tuple[int, ...],
    shorten: Callable[[nn.Module], Repeats] | None = None,
    **conditions: Tensor,
) -> int:
    """FLOPs of a forward pass for one image, see `count`.

    image_shape: (C, H, W), or (T, C, H, W) of a video. conditions: for one image, (1, ...); only shapes and dtypes
    matter. A backbone with num_classes, as JiT, needs no labels. Raises InputError if the shape does not fit the model,
    or a condition is missing.
    """
    backbone = unwrapped(flow.backbone)
    needed = conditions_needed(backbone)
    if "labels" in needed and hasattr(backbone, "num_classes"):
        conditions = {"labels": torch.empty(1, dtype=torch.long), **conditions}
    if missing := [name for name in needed if name not in conditions]:
        raise InputError(
            f"{type(backbone).__name__} needs {', '.join(missing)}: give tensors for one image, (1, ...), by name"
        )
    kinds = {name: (tuple(value.shape), value.dtype) for name, value in conditions.items()}

    def run(flow: AsymFlow) -> Tensor:
        given = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in kinds.items()}
        return flow(torch.empty(1, *image_shape), torch.empty(1), **given)

    return count(flow, run, backward=False, shorten=shorten).flops


def attention_flops(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Of the products of queries with keys, and of the weights with the values; each (..., tokens, width)."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


FLOPS = {  # of each operator, from its arguments: torch's own table, and the CPU's attention, which that lacks
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *args, **_: attention_flops(*args[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *args, **_: (
        2 * attention_flops(*args[1:4])
    ),
}


class Counter(TorchDispatchMode):
    """Counts the operations done and the bytes of all tensors made while it is active: each storage once, as long as it
    is alive.

    flops; alive, peak: bytes. stretches: the same from each `mark` to the next. known: tensors not to be counted, nor
    views of them.

    Not torch's FlopCounterMode, which keeps the gradients of activations alive.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.known, self.stretches = known, []
        self.mark(None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if flops := FLOPS.get(func._overloadpacket):
            self.now.flops += flops(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.watch(tensor.untyped_storage())
        self.now.high = max(self.now.high, self.now.change)
        return result

    @property
    def flops(self) -> int:
        return totals(self.stretches).flops

    @property
    def alive(self) -> int:
        return totals(self.stretches).change

    @property
    def peak(self) -> int:
        return totals(self.stretches).high

    def mark(self, block: nn.Module | None) -> None:
        """Begin another stretch."""
        self.now = Stretch(block)
        self.stretches.append(self.now)

    def watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now.change += self.sizes[key]
            weakref.finalize(storage, self.forget, key).atexit = False

    def forget(self, key: int) -> None:
        self.now.change -= self.sizes.pop(key)


def stand_in(model: nn.Module, device: str = "cpu") -> nn.Module:
    """A copy of a module whose tensors have the same shapes and dtypes, but no values.

    These are its parameters and buffers, and what it holds besides, itself or in an object, such as an objective.
    """
    memo = {}
    for tensor in [*model.parameters(), *model.buffers(), *held_tensors(model)]:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        trained = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if trained else empty
    return copy.deepcopy(model, memo)


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for value in vars(module).values():
            inside = vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, type) else ()
            yield from (found for found in (value, *inside) if isinstance(found, Tensor))


def recompute(model: nn.Module, blocks: bool) -> bool:
    """Set whether the backward pass recomputes every block of a model, or none. Returns False if it cannot."""
    found = False
    for module in model.modules():
        if hasattr(module, "checkpoint_every"):
            module.checkpoint_every, found = int(blocks), True
        elif hasattr(module, "gradient_checkpointing"):  # of diffusers
            module.gradient_checkpointing, found = blocks, True
        elif hasattr(module, "recomputed") and not blocks:  # a block of one's own, see make_backbone
            vars(module).pop("forward", None)
            found = True
    return found


# ---- Memory for everything else --------------------------------------------------------------------------------------
# Bytes for each trained parameter at ZeRO stages 0 to 3: (on every GPU, divided among them). Of bfloat16 weights there
# are gradients of the backward pass in bfloat16, and others in float32 for the step. DeepSpeed cannot add up in float32
# at stage 0.
GRADIENTS = {
    "float32": ((4, 0), (4, 0), (0, 4), (0, 4)),
    "bfloat16": ((6, 0), (2, 4), (0, 6), (0, 6)),
    "bfloat16, added up in float32": ((6, 0), (6, 0), (0, 4), (0, 8)),
}
BUCKET = 500_000_000  # numbers: DeepSpeed's default of zero_optimization.reduce_bucket_size
OFFLOADS = ("optimizer", "weights")


def training_memory(
    trained: int,
    frozen: int = 0,
    *,
    gpus: int = 1,
    stage: int = 0,
    precision: str = "autocast",
    float32_sums: bool = False,
    averages: int = 1,
    largest_layer: int = 0,
    bucket: int = BUCKET,
    offload: str | None = None,
) -> dict[str, int]:
    """The bytes on each GPU that do not depend on the batch, by kind, for AdamW under DeepSpeed ZeRO; "host": those in
    host memory for each GPU.

    trained, frozen: numbers of parameters. stage: 0 (plain data parallelism) to 3. precision: "autocast" to bfloat16
    with float32 weights; "bfloat16", weights included, as with DeepSpeed's bf16; or "float32".
    float32_sums: whether gradients of bfloat16 weights are added up in float32 (data_types.grad_accum_dtype). averages:
    the number of moving averages. largest_layer: its parameters, of which stage 3 gathers weights and gradients.
    bucket: numbers that are communicated at a time (reduce_bucket_size). offload: "optimizer" moves optimizer and
    averages to the host (from stage 1 on), "weights" also the weights (at stage 3); gradients stay where they are made.

        bytes for each parameter                    float32, autocast   bfloat16   divided from stage
        weights, of frozen parameters                       4              2              3
        trained, their weights                              4              2              3
        gradients                                      see GRADIENTS
        optimizer: moments and float32 originals    8; 12 at 1 and 2      12              1
        ema, for each average                               4              4              1

    This is how DeepSpeed 0.19 keeps them. In bfloat16 at stage 2 it equals DeepSpeed's own estimate, 2 + 18 / n bytes,
    plus average and bucket. At stages 1 and 2 DeepSpeed copies a GPU's share of the weights even if they are float32.

    Raises InputError for an impossible stage, precision, offload or number.
    """
    check_precision(precision)
    if stage not in range(4):
        raise InputError(f"a ZeRO stage is 0, 1, 2 or 3, but it is {stage}")
    if gpus < 1 or min(trained, frozen, averages, largest_layer, bucket) < 0:
        raise InputError(f"there must be at least 1 GPU, and no negative number of anything ({gpus} GPUs given)")
    if offload not in (None, *OFFLOADS):
        raise InputError(f"offload must be one of {', '.join(OFFLOADS)}, but it is {offload!r}")
    size = 2 if precision == "bfloat16" else 4
    sums = 4 if float32_sums else size
    whole, divided = GRADIENTS["float32" if size == 4 else precision + ", added up in float32" * float32_sums][stage]
    originals = 4 if size == 2 or stage in (1, 2) else 0
    share = {first: gpus if stage >= first else 1 for first in (1, 3)}
    kinds = {
        "weights": size * frozen / share[3],
        "trained": size * trained / share[3],
        "gradients": trained * (whole + divided / gpus),
        "buckets": bucket * (0, sums, size, size)[stage],
        "optimizer": (8 + originals) * trained / share[1],
        "ema": 4 * averages * trained / share[1],
        "gathered": (2 * size if stage == 3 else 0) * largest_layer,
    }
    kinds = {kind: math.ceil(number) for kind, number in kinds.items()}
    away = ["optimizer", "ema"] if offload and stage >= 1 else []
    away += ["weights", "trained"] if offload == "weights" and stage == 3 else []
    return kinds | dict.fromkeys(away, 0) | {"host": sum(kinds[kind] for kind in away)}


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, but it is {precision!r}")
