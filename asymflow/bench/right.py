"""Checks that everything works on this machine. Each compares with a reference, to a tolerance that it states."""

import torch
from torch import Tensor

from asymflow import cost
from asymflow.backbones.jit import JiT
from asymflow.bench.kit import Check, Kit, WrongError, matmul_precision
from asymflow.bench.trainings import FailedError
from asymflow.model import AsymFlow
from asymflow.parameterization import asymmetric_velocity, recover_velocity
from asymflow.subspace import Subspace
from asymflow.training.loader import Batch, on_device
from asymflow.training.objectives.cost import class_conditional_step, images

STEPS, CHECKPOINT = 8, 4
SAME_SUMS = 1e-4  # relative difference from float32 sums in another order, which 8 steps of Adam amplify


def small(kit: Kit) -> dict:
    """Settings of a model that takes milliseconds a step.

    Its blocks have 85 or 725 hidden units. The number is odd, as in H/16, so that weights are misaligned in memory: see
    `engine.compile_blocks`.
    """
    width, depth, heads = (32, 2, 2) if kit.tiny else (272, 4, 4)
    sizes = f"width: {width}, depth: {depth}, heads: {heads}, bottleneck: 16"
    return {
        "model.size": "tiny/4",
        "model.image_size": 16 if kit.tiny else 32,
        "model.options": f"{{{sizes}, in_context_start: 1, in_context_tokens: 2}}",
        "subspace.images": 64,
        "data.size": 256,
        "train.steps": STEPS,
        "train.global_batch_size": 8 if kit.tiny else 32,
        "ema.decays": "[0.5, 0.9]",
        "ema.snapshot_every": None,
        "sample.every": None,
        "optimizer.warmup_steps": 2,
        "checkpoint.every": CHECKPOINT,
    }


def losses(found: dict) -> list[float]:
    return [step["loss"] for step in found["metrics"]]


def furthest(values: list[float], reference: list[float]) -> float:
    """The largest relative difference."""
    if len(values) != len(reference):
        raise WrongError(f"{len(values)} steps were logged, not {len(reference)}")
    return max(abs(value / expected - 1) for value, expected in zip(values, reference, strict=True))


# ---- Recovery --------------------------------------------------------------------------------------------------------
def recovery(kit: Kit) -> tuple[str, dict]:
    """`recover_velocity` against float64, with every setting for float32 products, and from bfloat16 inputs.

    Errors must be below the bound of tests/library/velocity_problems.py, which no rounding can exceed, and below a
    hundred roundings of the largest number divided by sigma, about what they should add up to. No setting may more than
    double the error. The control is the plain formula, without our care for products: with TF32 it is far worse.
    """
    tokens, sigma = (64 if kit.tiny else 16384), 0.01
    subspace = Subspace.random(768, 8, scale=0.7).to(kit.device)
    generator = torch.Generator(kit.device).manual_seed(0)
    x0, eps = torch.randn(2, tokens, 768, generator=generator, device=kit.device)
    x_sigma, u_a = (1 - sigma) * x0 + sigma * eps, asymmetric_velocity(x0, eps, subspace)
    hundred = 100 * torch.finfo(torch.float32).eps * max(u_a.abs().max().item(), x_sigma.abs().max().item()) / sigma
    bound = rounding(subspace, sigma, u_a, x_sigma).clamp(max=hundred)
    exact = Subspace(subspace.basis.double(), subspace.scale).to(kit.device)

    def errors(recover, u_a: Tensor, x_sigma: Tensor) -> Tensor:
        expected = recover_velocity(u_a.double(), x_sigma.double(), sigma, exact)
        return (recover(u_a, x_sigma, sigma, subspace).double() - expected).abs()

    figures, wrong = {"bound": bound.max().item()}, []
    for setting in ("highest", "high", "medium"):
        with matmul_precision(setting):
            found = errors(recover_velocity, u_a, x_sigma)
            low = errors(recover_velocity, u_a.bfloat16(), x_sigma.bfloat16())
            figures[setting] = found.max().item()
            figures[f"{setting}, bfloat16 inputs"] = low.max().item()
            figures[f"{setting}, control"] = errors(plain_recovery, u_a, x_sigma).max().item()
        for name, error in ((setting, found), (f"{setting}, bfloat16 inputs", low)):
            if not (error <= 1.01 * bound).all():  # 1 % more, because rounded inputs have slightly other norms
                wrong.append(f"{name}: beyond the bound")
            if figures[name] > 2 * figures["highest"] and setting != "highest":
                wrong.append(f"{name}: more than twice that of float32")
    if kit.cuda:
        before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
        try:
            figures["allow_tf32"] = errors(recover_velocity, u_a, x_sigma).max().item()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        if figures["allow_tf32"] > 2 * figures["highest"]:
            wrong.append("allow_tf32: more than twice that of float32")
    if wrong:
        raise WrongError("; ".join(wrong), figures)
    worst = max(value for name, value in figures.items() if name != "bound" and "control" not in name)
    control = figures["medium, control"]
    return f"largest error {worst:.1e}, bound {figures['bound']:.1e}; without care it would be {control:.1e}", figures


def rounding(subspace: Subspace, sigma: float, *vectors: Tensor) -> Tensor:
    basis, s = subspace.basis.double(), subspace.scale
    skew = (basis.mT @ basis - torch.eye(subspace.rank, dtype=torch.float64, device=basis.device)).norm()
    relative = 4 * (subspace.dim + subspace.rank + 2) * (subspace.rank + 1) * torch.finfo(torch.float32).eps + 2 * skew
    size = sum(v.double().norm(dim=-1, keepdim=True) for v in vectors)
    return relative * size * (s + 2 + 1 / s) * (1 + 1 / sigma)


def plain_recovery(u_a: Tensor, x_sigma: Tensor, sigma: float, subspace: Subspace) -> Tensor:
    basis, s = subspace.basis, subspace.scale
    k = 1 / (s + (1 - s) * sigma)
    rest = x_sigma + s * u_a
    outside = (rest - (rest @ basis) @ basis.mT) / sigma
    return outside + ((k * (s * u_a + (1 - s) * x_sigma) - outside) @ basis) @ basis.mT


# ---- Data ------------------------------------------------------------------------------------------------------------
def copies(kit: Kit) -> tuple[str, dict]:
    """Batches that are copied to the device while it computes arrive unchanged, from the first to the last."""
    count, side, n = (4, 16, 64) if kit.tiny else (24, 256, 8192)
    generator, busy = torch.Generator().manual_seed(0), torch.randn(n, n, device=kit.device)

    def made(number: int) -> Batch:
        eps = torch.randn(8, 3, side, side, generator=generator)
        pixels = (eps * 40 + 128).clamp(0, 255).byte()
        batch = Batch(pixels, eps, torch.arange(8), eps[:, 0, 0, 0].clone(), [number], [])
        return batch.pin_memory() if kit.cuda else batch

    batches, seen = [made(number) for number in range(count)], []
    for batch in on_device(iter(batches), kit.device):
        early = batch.map_tensors(torch.clone)  # wrong if this batch is yielded before its copy is done
        busy = (busy @ busy).tanh_()
        seen += [early, batch.map_tensors(torch.clone)]  # wrong if the next batch is copied over this one
    there = zip(*[iter(batch.map_tensors(Tensor.cpu) for batch in seen)] * 2, strict=True)
    pairs = zip(batches, there, strict=True)
    wrong = [batch.samples[0] for batch, others in pairs if not all(same(batch, other) for other in others)]
    if wrong:
        raise WrongError(f"of {count} batches, these are others on the device: {wrong}")
    return f"{count} batches arrived as they were made, copied beside a computation", {}


def same(batch: Batch, other: Batch) -> bool:
    pairs = zip(vars(batch).values(), vars(other).values(), strict=True)
    return all(torch.equal(one, two) if isinstance(one, Tensor) else one == two for one, two in pairs)


# ---- Training --------------------------------------------------------------------------------------------------------
def autocast(kit: Kit) -> tuple[str, dict]:
    figures = {}
    for name, settings, expected in (
        ("train.precision fp32", {}, {"weights": ["float32"], "linear": ["float32"]}),
        ("train.precision bf16", {"train.precision": "bf16"}, {"weights": ["float32"], "linear": ["bfloat16"]}),
        (
            "deepspeed.bf16",
            {"train.precision": "bf16", "deepspeed.bf16.enabled": True},
            {"weights": ["bfloat16"], "linear": ["bfloat16"]},
        ),
    ):
        found = kit.train(name.replace(" ", "-"), small(kit) | settings | {"train.steps": 2}, dtypes=True)
        figures[name] = found["dtypes"]
        if found["dtypes"] != expected:
            raise WrongError(f"{name}: {found['dtypes']}, not {expected}", figures)
    return "linear layers compute in bfloat16 over float32 weights; with deepspeed.bf16 over bfloat16 ones", figures


def zero_stages(kit: Kit) -> tuple[str, dict]:
    """The losses on one rank are the same at every ZeRO stage, and with the optimizer on the CPU."""
    reference, curves = None, {}
    variants = {f"stage {stage}": {"deepspeed.zero_optimization.stage": stage} for stage in range(3)}
    variants["stage 2, offload"] = {"deepspeed.zero_optimization": "{stage: 2, offload_optimizer: {device: cpu}}"}
    variants["stage 2, bf16"] = {
        "deepspeed.zero_optimization.stage": 2,
        "train.precision": "bf16",
        "deepspeed.bf16.enabled": True,
        "deepspeed.data_types": "{grad_accum_dtype: fp32}",
    }
    # Stage 3 comes last, because DeepSpeed then changes torch's linear layers for the rest of the process.
    variants["stage 3"] = {"deepspeed.zero_optimization.stage": 3}
    wrong = []
    for name, settings in variants.items():
        found = kit.train(name.replace(", ", "-").replace(" ", ""), small(kit) | settings, deterministic=True)
        curves[name] = losses(found)
        reference = reference or curves[name]
        most = 0.05 if "bf16" in name else SAME_SUMS  # bfloat16 has 8 bits: errors of a few thousandths at each layer
        if (difference := furthest(curves[name], reference)) > most:
            wrong.append(f"{name} differs by {difference:.1e}, more than {most:g}")
    kit.trainings.end()
    if not reference[-1] < reference[0]:
        wrong.append(f"the loss does not fall: {reference}")
    if wrong:
        raise WrongError("; ".join(wrong), {"losses": curves})
    exact = max(furthest(curve, reference) for name, curve in curves.items() if "bf16" not in name)
    bf16 = furthest(curves["stage 2, bf16"], reference)
    return (
        f"losses of {STEPS} steps agree to {exact:.1e} (at most {SAME_SUMS:g}) for stages 0 to 3 and CPU offload; with "
        f"bfloat16 weights to {bf16:.1e}",
        {"losses": curves},
    )


def resume(kit: Kit) -> tuple[str, dict]:
    """A training killed in step 7, after a checkpoint at step 4, and resumed, equals one that was never stopped."""
    from asymflow.training.run import checkpoint

    settings = small(kit) | {"data.workers": 2, "train.precision": "bf16"}
    figures = {}
    for deterministic in (False, True):  # with deterministic algorithms only if the bits differ without
        how = "with torch.use_deterministic_algorithms" if deterministic else "as it is"
        options = {"deterministic": deterministic}
        names = [f"{end}-{int(deterministic)}" for end in ("straight", "killed")]
        straight = kit.train(names[0], settings, **options)
        try:
            kit.train(names[1], settings, kill_at=7, **options)
            raise WrongError("the training that was to be killed went on to its end")
        except FailedError as e:
            if kit.left <= 0:
                raise
            figures[f"{how}: killed"] = str(e)
        left = checkpoint.steps(kit.work / names[1] / "checkpoints")
        if left != [CHECKPOINT] or "died with -9" not in figures[f"{how}: killed"]:
            raise WrongError(f"it was to be killed after a checkpoint at {CHECKPOINT}, but left {left}", figures)
        killed = kit.train(names[1], settings, **options)
        if killed["begun_at"] != CHECKPOINT:
            raise WrongError(f"it was to go on from step {CHECKPOINT}, not {killed['begun_at']}", figures)
        same_losses = without_speed(straight["metrics"]) == without_speed(killed["metrics"])
        figures[how] = {"losses": same_losses, "weights": same_bits(kit, *names)}
        if all(figures[how].values()):
            return f"killed and resumed, {how}: the same losses and weights to the bit", figures
    raise WrongError(f"not the same bits after a kill, not even {how}: {figures[how]}", figures)


def without_speed(metrics: list[dict]) -> list[dict]:
    return [{key: step[key] for key in ("step", "loss", "grad_norm", "lr")} for step in metrics]


def same_bits(kit: Kit, *runs: str) -> bool:
    from asymflow.training.run import checkpoint

    def tensors(run: str) -> dict[tuple[str, str], Tensor]:
        reader = checkpoint.Reader(checkpoint.folder_of(kit.work / run / "checkpoints", STEPS))
        return {(kind, name): value for kind in reader.kinds() for name, value in reader.full(kind).items()}

    one, other = map(tensors, runs)
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def compiled(kit: Kit) -> tuple[str, dict]:
    kit.on_a_gpu()  # for CPUs there are tests; compiling takes long, and a compiler
    figures, most = {"eager": losses(kit.train("eager", small(kit)))}, 1e-3  # compiled kernels round differently
    for stage in (1, 3):  # at stage 1 all weights begin at multiples of 16 bytes, at stage 3 not all do
        settings = {"train.compile": True, "deepspeed.zero_optimization.stage": stage}
        fast = kit.train(f"compiled{stage}", small(kit) | settings)
        figures |= {f"stage {stage}": losses(fast), f"graphs at stage {stage}": fast.get("graphs")}
        if (difference := furthest(losses(fast), figures["eager"])) > most:
            raise WrongError(f"at stage {stage} the losses differ by {difference:.1e}, more than {most:g}", figures)
        graphs = fast.get("graphs")
        if not graphs or graphs["end"] != graphs["warm"]:
            raise WrongError(f"at stage {stage} something was compiled after the warm-up: {graphs}", figures)
    kit.trainings.end()  # stage 3 has changed torch's linear layers in that process
    exact = max(furthest(figures[f"stage {stage}"], figures["eager"]) for stage in (1, 3))
    return f"losses as in eager mode to {exact:.1e} (at most {most:g}); {graphs['end']} graphs, none later", figures


def memory(kit: Kit) -> tuple[str, dict]:
    """The memory of a JiT-B/16 at ZeRO-1 under autocast, in eager mode, is what `asymflow info` counts."""
    micro, size = (1, "tiny/16") if kit.tiny else (32, "B/16")
    settings = shapes() | {"model.size": size, "train.compile": False, "train.steps": 3, "data.workers": 0}
    settings |= {"train.global_batch_size": micro, "train.micro_batch_size": micro}
    found = kit.train("memory", settings, config="imagenet256_b16", states=True, unsaved=True)
    flow = without_numbers(size)
    step = class_conditional_step(flow)
    kinds, states = step.memory(stage=1), found["states"]
    counted = {name: kinds[name] for name in ("trained", "optimizer", "ema")}
    optimizer = states["master_weights"] + states["adam"]
    kept = {"trained": states["weights"], "optimizer": optimizer, "ema": states["ema"]}
    figures = {"counted": counted, "kept": kept, "allocator": found["memory"]}
    if kept != counted:
        raise WrongError("weights, originals and moments, or averages are not as large as counted", figures)
    if not kit.cuda:
        return "states as counted, to the byte; the allocator: not on a CPU", figures
    before, peak = found["memory"]["before"], found["memory"]["peak"]
    expected = sum(counted.values()) + states["buffers"]
    activations = cost.count(step, lambda step: step(images(micro, image_shape(flow)))).peak
    most = expected + kinds["gradients"] + activations + kinds["buckets"]
    figures |= {"before": before, "before_counted": expected, "peak": peak, "peak_counted": most, "kinds": kinds}
    if abs(before - expected) > 0.01 * expected + 2**21:
        raise WrongError(f"before the first step {before:,} bytes are held, but {expected:,} are counted", figures)
    if peak > 1.05 * most:
        raise WrongError(f"at most {peak:,} bytes were held, more than the {most:,} that are counted", figures)
    gib = [number / 2**30 for number in (before, expected, peak, most - kinds["buckets"], kinds["buckets"])]
    return (
        f"B/16, {micro} images: states {gib[0]:.3f} GiB, counted {gib[1]:.3f}; peak {gib[2]:.2f} GiB, counted "
        f"{gib[3]:.2f} and a bucket of {gib[4]:.2f}",
        figures,
    )


def without_numbers(size: str) -> AsymFlow:
    """A JiT of rank 8 on the meta device, for counting."""
    with torch.device("meta"):
        jit = JiT.from_name(size)
    return AsymFlow(jit, Subspace(torch.eye(jit.dim, 8)))


def image_shape(flow: AsymFlow) -> tuple[int, int, int]:
    return flow.channels, *(flow.patch_size * tokens for tokens in flow.backbone.grid)


def shapes() -> dict:
    """Settings that make a configuration for ImageNet train on generated images."""
    return {
        "data.kind": "shapes",
        "data.size": 100_000,
        "data.fewer_classes": True,
        "subspace.images": 64,
        "sample.every": None,
        "ema.snapshot_every": None,
        "checkpoint.every": 10**6,
        "checkpoint.keep_every": None,
    }


CHECKS = [
    Check("recovery against float64", recovery, 2, anywhere=True),
    Check("copies beside a computation", copies, 2),
    Check("autocast inside of the engine", autocast, 22),
    Check("ZeRO 0 to 3 on one rank", zero_stages, 15),
    Check("killed and resumed", resume, 35),
    Check("compiled against eager", compiled, 50),
    Check("memory as counted", memory, 15),
]
