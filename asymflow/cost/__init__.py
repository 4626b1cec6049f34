"""What a model costs: parameters, operations and memory, counted on tensors that have shapes but no numbers.

Counting needs neither the weights, nor a GPU, nor the memory that it counts. A JiT-H takes seconds on a laptop.
"""

import copy
import math
import re
import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from asymflow.conditions import conditions_needed
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


# ---- Operations ------------------------------------------------------------------------------------------------------
def flops(
    flow: AsymFlow,
    image_shape: tuple[int, ...],
    training: bool = False,
    recomputed: bool = True,
    **conditions: Tensor,
) -> int:
    """Floating point operations for one image: of a forward pass, or of forward and backward if `training`.

    A multiply-add is two operations (tables in papers, such as that of arXiv 2511.13720, often call it one "flop").
    Only matrix products are counted, including those of attention and of the subspace; all else is small. If
    `recomputed`, blocks that `checkpoint_every` computes twice count twice. Attention is counted as if its scores were
    kept for the backward pass, whichever kernel runs it.

    image_shape: (C, H, W), or (T, C, H, W) of a video. conditions: for one image, (1, ...); only shapes and dtypes
    matter. A backbone with num_classes, as JiT, needs no labels. Raises InputError if the shape does not fit the model,
    or a condition is missing.
    """
    flow = stand_in(flow, "meta").train(training)
    if not recomputed and hasattr(flow.backbone, "checkpoint_every"):
        flow.backbone.checkpoint_every = 0
    with FlopCounterMode(display=False) as counter:
        loss = loss_of_noise(flow, 1, image_shape, "meta", conditions)
        if training:
            loss.backward()
    return counter.get_total_flops()


def peak_flops(device: torch.device) -> float | None:
    """The peak of a GPU in bfloat16, in FLOPs per second; None for CPUs, unknown GPUs and slices of a GPU.

    From the data sheet, for dense matrix products that are accumulated in float32.
    """
    if device.type != "cuda":
        return None
    words = set(re.findall(r"\w+", torch.cuda.get_device_name(device)))
    known = [name for name in PEAKS if set(name.split()) <= words and not words & PARTS]
    return PEAKS[max(known, key=lambda name: len(name.split()))] * 1e12 if known else None


# ---- Memory for activations ------------------------------------------------------------------------------------------
def activation_bytes(
    flow: AsymFlow, image_shape: tuple[int, ...], batch: int = 1, precision: str = "autocast", **conditions: Tensor
) -> tuple[int, int]:
    """`(kept, peak)`: the bytes of a training step of `batch` images, without weights, buffers and their gradients.

    kept: what the forward pass keeps for the backward pass. Under autocast this includes the bfloat16 copies of the
        weights, which do not grow with the batch.
    peak: the most at any time. It also has the gradients of activations, the gradient of one weight before it is added
        to the stored one, and what is recomputed of blocks with `checkpoint_every`.

    The step runs on fake tensors with the CPU's kernels, whose attention keeps no scores, like flash attention; each
    storage counts once. For GPUs this is an upper bound: their fused RMSNorm (torch >= 2.9) would save 17 % of a JiT-H
    under autocast and 33 % in bfloat16, and their dropout keeps one byte for each number. On the other hand, gaps of
    the allocator and workspaces of kernels are not counted.

    precision: "autocast" to bfloat16 with float32 weights; "bfloat16", weights included, as with DeepSpeed's bf16; or
    "float32". The dtype of the given model does not matter. The rest: as for `flops`.
    """
    check_precision(precision)
    flow = stand_in(flow, "meta").to(torch.bfloat16 if precision == "bfloat16" else torch.float32).train()

    def loss(flow: AsymFlow) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            return loss_of_noise(flow, batch, image_shape, "cpu", conditions)

    return step_bytes(flow, loss)


def step_bytes(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> tuple[int, int]:
    """`(kept, peak)` as in `activation_bytes`, but of any model, in its own dtypes, and of `loss(model).backward()`.

    loss: called with a copy of the model that has no numbers; it makes its own inputs, on the CPU.
    """
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it has no fused RMSNorm for mixed dtypes
        model = stand_in(model, "cpu")
        for weight in model.parameters():
            weight.grad = torch.empty_like(weight) if weight.requires_grad else None
        gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
        with LiveBytes([*model.parameters(), *model.buffers(), *gradients]) as live:
            value = loss(model)
            kept = live.now
            value.backward()
    return kept, live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is active: each storage once, as long as it is alive.

    now, peak: bytes. known: tensors that, like views of them, are not counted.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.known, self.now, self.peak = known, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.watch(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            weakref.finalize(storage, self.forget, key).atexit = False

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


# ---- Memory for everything else --------------------------------------------------------------------------------------
def training_memory(
    trainable: int,
    frozen: int = 0,
    *,
    gpus: int = 1,
    stage: int = 0,
    precision: str = "autocast",
    ema: bool = True,
    largest_layer: int = 0,
) -> dict[str, int]:
    """The bytes on each GPU that do not depend on the batch, by kind, for Adam under DeepSpeed ZeRO.

    trainable, frozen: numbers of parameters. stage: 0 (plain data parallelism) to 3. From stage 1 on the optimizer's
    state is divided among the GPUs, from 2 on also the gradients, at 3 also the weights.

        bytes for each trainable parameter           autocast, float32   bfloat16   divided from stage
        weights (and of frozen parameters)                    4              2              3
        gradients                                             4              2              2
        step_gradients, float32 for the optimizer             0              4              1
        master_weights, float32                      4 in stages 1, 2        4              1
        adam, its two moments                                 8              8              1
        ema, float32                                          4              4              1 (if kept by shards)

    This is how DeepSpeed 0.19 keeps them, with its AdamW and gradients accumulated in the dtype of the weights. For
    bfloat16 at stage 2 it equals DeepSpeed's own estimate, 2 + 18 / n bytes. At stages 1 and 2 DeepSpeed copies a GPU's
    share of the weights even if they are float32. Its buffers for communication are not included; their sizes are set
    in its configuration, and by default they take some GB.

    largest_layer: parameters of the largest layer, whose weights and gradients stage 3 gathers (gathered_layer).
    Raises InputError for an impossible stage, precision or number.
    """
    check_precision(precision)
    if stage not in range(4):
        raise InputError(f"a ZeRO stage is 0, 1, 2 or 3, but it is {stage}")
    if gpus < 1 or min(trainable, frozen, largest_layer) < 0:
        raise InputError(f"there must be at least 1 GPU, and no negative number of parameters ({gpus} GPUs given)")
    size = 2 if precision == "bfloat16" else 4
    shared = {first: gpus if stage >= first else 1 for first in (1, 2, 3)}
    kinds = {
        "weights": size * (trainable + frozen) / shared[3],
        "gradients": size * trainable / shared[2],
        "step_gradients": (4 if size == 2 else 0) * trainable / shared[1],
        "master_weights": (4 if size == 2 or stage in (1, 2) else 0) * trainable / shared[1],
        "adam": 8 * trainable / shared[1],
        "ema": (4 if ema else 0) * trainable / shared[1],
        "gathered_layer": (2 * size if stage == 3 else 0) * largest_layer,
    }
    return {kind: math.ceil(number) for kind, number in kinds.items()}


# ---- Stand-ins -------------------------------------------------------------------------------------------------------
def stand_in(flow: nn.Module, device: str) -> nn.Module:
    """A copy of a module whose parameters and buffers have the same shapes and dtypes, but no values."""
    memo = {}
    for tensor in [*flow.parameters(), *flow.buffers()]:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        trained = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if trained else empty
    return copy.deepcopy(flow, memo)


def loss_of_noise(flow: AsymFlow, batch: int, image_shape: tuple[int, ...], device: str, conditions: dict) -> Tensor:
    """The loss of a training step. Only shapes matter: all tensors are empty."""
    needed = conditions_needed(flow.backbone)
    if "labels" in needed and hasattr(flow.backbone, "num_classes"):
        conditions = {"labels": torch.empty(1, dtype=torch.long), **conditions}
    if missing := [name for name in needed if name not in conditions]:
        raise InputError(
            f"{type(flow.backbone).__name__} needs {', '.join(missing)}: give tensors for one image, (1, ...), by name"
        )
    conditions = {
        name: torch.empty((batch, *value.shape[1:]), dtype=value.dtype, device=device)
        for name, value in conditions.items()
    }
    x_sigma, u = torch.empty((2, batch, *image_shape), device=device)
    return (flow(x_sigma, torch.empty(batch, device=device), **conditions) - u).square().mean()


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, but it is {precision!r}")
