"""What a training step costs: the loss of the real objective, counted without numbers, and the memory beside it."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from asymflow import cost
from asymflow.model import AsymFlow
from asymflow.training.config.derived import bf16_weights
from asymflow.training.config.reading import Config, load_config
from asymflow.training.loader import Batch
from asymflow.training.objectives import Objective
from asymflow.training.objectives.class_conditional import ClassConditional

PRECISIONS = {  # those of asymflow.cost, in the words of a configuration
    "autocast": ("train.precision=bf16",),
    "bfloat16": ("train.precision=bf16", "deepspeed.bf16.enabled=true"),
    "float32": ("train.precision=fp32",),
}


class Step(nn.Module):
    """A micro-batch of a training: `step(batch)` is the loss whose gradient its engine computes.

    model: of `objective.model`. Its weights are counted in the dtypes that they have.
    The networks that the objective holds beside it (DINOv2, LPIPS) are submodules, so that they are counted.
    """

    def __init__(self, config: Config, objective: Objective, model: nn.Module):
        super().__init__()
        self.config, self.model, self.objective = config, model, copy.copy(objective)
        vars(self.objective).pop("dataset", None)  # the loss does not need it, and it may not be copied
        held = [getattr(beside, "model", beside) for beside in vars(objective).values()]
        self.beside = nn.ModuleList(network for network in held if isinstance(network, nn.Module))
        self.precision = {"bf16": "autocast", "fp32": "float32"}[config.train.precision]
        self.precision = "bfloat16" if bf16_weights(config) else self.precision

    def forward(self, batch: Batch) -> Tensor:
        terms = self.objective.losses(Called(self.model, self.precision == "autocast"), batch)
        return (terms * torch.tensor(self.objective.weights, device=terms.device)).sum(1).mean()

    def memory(self, gpus: int = 1, stage: int = 0, offload: str | None = None) -> dict[str, int]:
        """`asymflow.cost.training_memory` of this model, with the configured precision and averages."""
        total, trained = cost.parameters(self.model)
        options, ema = self.config.deepspeed, self.config.ema
        kinds = cost.training_memory(
            trained,
            total - trained,
            gpus=gpus,
            stage=stage,
            precision=self.precision,
            float32_sums=(options.get("data_types") or {}).get("grad_accum_dtype") == "fp32",
            averages=len(ema.decays) + len(ema.sigma_rel),
            largest_layer=cost.largest_layer(self.model),
            offload=offload,
        )
        known = {id(p) for p in self.model.parameters()}
        beside = sum(p.numel() * p.element_size() for p in self.beside.parameters() if id(p) not in known)
        return kinds | {"weights": kinds["weights"] + beside}  # these are whole on every GPU


class Called:
    """A model as objectives get it: like DeepSpeed's engine it has the model as `module`, and calls it."""

    def __init__(self, module: nn.Module, autocast: bool):
        self.module, self.autocast = module, autocast

    def __call__(self, *args: Any, **conditions: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.module(*args, **conditions)


def needed_flops(step: Step, batch: Batch) -> int:
    """The FLOPs of a training step for each image of a batch, without those of what is recomputed."""
    kinds = []
    batch.map_tensors(lambda tensor: kinds.append((tensor.shape, tensor.dtype)) or tensor)

    def run(step: Step) -> Tensor:
        cost.recompute(step, blocks=False)
        empty = iter([torch.empty(shape, dtype=dtype) for shape, dtype in kinds])
        return step(batch.map_tensors(lambda tensor: next(empty)))

    return cost.count(step, run).flops // len(batch.samples)


# ---- Of a class-conditional model ------------------------------------------------------------------------------------
def class_conditional_step(flow: AsymFlow, precision: str = "autocast") -> Step:
    """A step of the configuration imagenet, of a model of these shapes, on the meta device."""
    cost.check_precision(precision)
    config = load_config("imagenet", ["data.path=none", *PRECISIONS[precision]])
    flow = cost.stand_in(flow, "meta").to(torch.bfloat16 if precision == "bfloat16" else torch.float32).train()
    return Step(config, ClassConditional(config, flow), flow)


def images(count: int, shape: tuple[int, ...]) -> Batch:
    """A batch of black images (C, H, W) without noise, all of class 0."""
    return Batch(
        pixels=torch.zeros(count, *shape, dtype=torch.uint8),
        eps=torch.zeros(count, *shape),
        labels=torch.zeros(count, dtype=torch.int64),
        normal=torch.zeros(count),
        samples=list(range(count)),
        problems=[],
    )
