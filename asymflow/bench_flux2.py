"""Finetuning and sampling of a FLUX.2-sized pixel model, timed and weighed: `python -m asymflow.bench_flux2`.

The model is FLUX.2 klein with random weights, made on the GPU: nothing is downloaded. Without arguments it is the 9B,
at 1024 x 1024 pixels, for one card of 80 GB. What is measured is printed beside what `asymflow info` counts.
"""

import argparse
import json
import time
from collections.abc import Callable

from asymflow.packages import importing

with importing(__name__):
    import torch
    from diffusers import Flux2Transformer2DModel
    from torch import Tensor

    from asymflow import cost
    from asymflow import cost_flux2 as counted
    from asymflow.cli.common import Parser, at_least, default_device, image_size, usable_device
    from asymflow.errors import InputError
    from asymflow.sampling import guided
    from asymflow.subspace import Subspace

TINY = dict(
    in_channels=16,
    num_layers=1,
    num_single_layers=2,
    num_attention_heads=2,
    attention_head_dim=32,
    joint_attention_dim=96,
    axes_dims_rope=(8, 8, 8, 8),
    guidance_embeds=False,
)
SIZES = {"9B": counted.KLEIN["FLUX.2-klein-9B"], "4B": counted.KLEIN["FLUX.2-klein-4B"], "tiny": TINY}


def main(argv: list[str] | None = None) -> None:
    p = Parser(prog="python -m asymflow.bench_flux2", description=__doc__)
    p.add_argument("--size", choices=SIZES, default="9B", help="of the transformer; tiny runs on a CPU in seconds")
    p.add_argument("--batch", type=at_least(1), default=1, metavar="N", help="images in a step")
    p.add_argument("--image-size", type=image_size, metavar="N|HxW", help="in pixels (default: 1024; tiny: 64)")
    p.add_argument("--text-length", type=at_least(1), metavar="N", help="tokens of a prompt (default: 512; tiny: 32)")
    p.add_argument("--lora-rank", type=at_least(1), metavar="R", help="of the adapters (default: 256; tiny: 8)")
    p.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    p.add_argument("--no-lpips", action="store_true", help="without the perceptual term")
    p.add_argument("--steps", type=at_least(1), default=5, metavar="N", help="timed, after one that is not")
    p.add_argument("--device", default=default_device(), help="such as cpu or cuda")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    args = p.parse_args(argv)
    try:
        found = measure(args)
    except InputError as e:
        p.error(str(e))
    print(json.dumps(found, indent=2) if args.json else as_text(found))


def measure(args: argparse.Namespace) -> dict:
    """Bytes, seconds and FLOPs a second: of training steps, and of one guided evaluation as in sampling."""
    device, tiny = usable_device(args.device), args.size == "tiny"
    size = args.image_size or ((64, 64) if tiny else (1024, 1024))
    length = args.text_length or (32 if tiny else counted.TEXT_LENGTH)
    torch.manual_seed(0)
    step = make_step(args, device)
    batch = counted.inputs(step, size, args.batch, length, device)
    flops = counted.step_flops(step, size, length) * args.batch
    with counted.all_kept(step):
        useful = counted.step_flops(step, size, length) * args.batch
    states = sum(counted.training_memory(step).values())
    _, activations = counted.activations(step, size, args.batch, length)
    guided_flops = 2 * counted.forward_flops(step, size, length) * args.batch

    optimizer = Originals(step)
    before = allocated(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def train() -> float:
        loss = step(**batch)
        loss.backward()
        optimizer.step()
        return loss.item()

    (first, *seconds), losses = timed(train, args.steps, device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    text = batch["text"]  # and another prompt, for the two of them in one call
    prompts = ({"encoder_hidden_states": prompt} for prompt in (text, text.flip(1)))
    velocity = torch.inference_mode()(guided(step.model.eval(), *prompts, scale=4.0, orthogonal=1.0))
    (_, *evaluations), _ = timed(lambda: velocity(batch["eps"], batch["sigma"]), args.steps, device)
    a_step, an_evaluation, most = median(seconds), median(evaluations), cost.peak_flops(device)
    return {
        "model": args.size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "image": (counted.CHANNELS, *size),
        "batch": args.batch,
        "checkpointing": not args.no_checkpointing,
        "lpips": not args.no_lpips,
        "parameters": counted.parameters(step),
        "losses": losses,
        "memory": {
            "states": {"counted": states, "measured": before},
            "peak": {"counted": states + activations, "measured": peak},
        },
        "training_step": {
            "first_seconds": first,
            "seconds": a_step,
            "flops": flops,
            "flops_per_second": flops / a_step,
            "mfu": useful / a_step / most if most else None,  # of what is needed, without what is computed twice
        },
        "guided_evaluation": {
            "seconds": an_evaluation,
            "flops": guided_flops,
            "flops_per_second": guided_flops / an_evaluation,
            "mfu": guided_flops / an_evaluation / most if most else None,
        },
    }


def make_step(args: argparse.Namespace, device: torch.device) -> counted.Step:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # so that the weights never take twice their memory
    try:
        with device:
            latent = Flux2Transformer2DModel.from_config(SIZES[args.size])
    finally:
        torch.set_default_dtype(default)
    dim = counted.CHANNELS * counted.PATCH**2
    subspace = Subspace.random(dim, latent.config.in_channels)
    rank = args.lora_rank or (8 if args.size == "tiny" else counted.LORA_RANK)
    model = counted.finetuned(latent, subspace, rank, checkpointing=not args.no_checkpointing).to(device)
    return counted.Step(model, None if args.no_lpips else counted.random_perceptual(device))


class Originals:
    """AdamW on float32 originals of bfloat16 weights, with their average, as DeepSpeed keeps them on one GPU."""

    def __init__(self, step: counted.Step):
        self.weights = [p for p in step.parameters() if p.requires_grad]
        self.originals = [p.detach().float().requires_grad_() for p in self.weights]
        self.average = [p.detach().clone() for p in self.originals]
        for weight, original in zip(self.weights, self.originals, strict=True):
            weight.grad, original.grad = torch.zeros_like(weight), torch.zeros_like(original)
        self.adam = torch.optim.AdamW(self.originals, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.adam.step()  # which makes the moments
        self.adam.param_groups[0]["lr"] = 1e-4

    @torch.no_grad()
    def step(self) -> None:
        for weight, original in zip(self.weights, self.originals, strict=True):
            original.grad.copy_(weight.grad)
            weight.grad.zero_()
        self.adam.step()
        torch._foreach_lerp_(self.average, self.originals, 1e-3)
        for weight, original in zip(self.weights, self.originals, strict=True):
            weight.copy_(original)

    def tensors(self) -> dict[str, list[Tensor]]:
        """Of the kinds of `counted.training_memory`."""
        moments = [state[name] for state in self.adam.state.values() for name in ("exp_avg", "exp_avg_sq")]
        return {
            "trained": self.weights,
            "gradients": [p.grad for p in self.weights],
            "optimizer": [*self.originals, *(p.grad for p in self.originals), *moments],
            "ema": self.average,
        }


def timed(function: Callable, times: int, device: torch.device) -> tuple[list[float], list]:
    """(seconds, results) of one call more than `times`: the first warms up."""
    seconds, results = [], []
    for _ in range(times + 1):
        synchronize(device)
        started = time.perf_counter()
        results.append(function())
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds, results


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device: torch.device) -> int | None:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


# ---- For people ------------------------------------------------------------------------------------------------------
def as_text(found: dict) -> str:
    height, width = found["image"][1:]
    images = f"{found['batch']} of {height} x {width}"
    lines = [f"FLUX.2 klein {found['model']}, {images}, {found['device']}, torch {found['torch']}"]
    for name, number in found["memory"].items():
        measured = "not measured on a CPU" if number["measured"] is None else f"{number['measured'] / 2**30:.2f} GiB"
        lines.append(f"{name + ' of memory':20}{measured}, counted: {number['counted'] / 2**30:.2f} GiB")
    for name in ("training_step", "guided_evaluation"):
        one = found[name]
        mfu = "" if one["mfu"] is None else f", MFU {one['mfu']:.1%}"
        speed = f"{one['flops_per_second'] / 1e12:.3g} TFLOP/s{mfu}"
        lines.append(f"{name.replace('_', ' '):20}{one['seconds']:.3f} s, {speed}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
