"""What does not fit together in a configuration: the key that is to blame, and why."""

from collections.abc import Iterator

from pydantic import ValidationError

from asymflow import backbones, data
from asymflow.averages import Profile
from asymflow.backbones.jit import check_sizes
from asymflow.errors import InputError
from asymflow.extensions import check_name, is_own
from asymflow.sampling import METHODS
from asymflow.training.config.derived import disagreement, network, same
from asymflow.training.config.faults import faults_of
from asymflow.training.config.objectives import TABLE as OBJECTIVES
from asymflow.training.config.optimizers import TABLE as OPTIMIZERS
from asymflow.training.config.sections import Options, Sections
from asymflow.yaml12 import short, shown


def contradictions(c: Sections) -> Iterator[tuple[str, str]]:
    """In all but the section deepspeed."""
    for key, name, table in (
        ("data.kind", c.data.kind, data.TABLE),
        ("sample.method", c.sample.method, METHODS),
        ("optimizer.kind", c.optimizer.kind, OPTIMIZERS),
        ("model.backbone", c.model.backbone if c.model else "JiT", backbones.TABLE),
        ("loss.objective", c.loss.objective or "class_conditional", OBJECTIVES),
    ):
        if wrong := check_name(name, table):
            yield key, wrong
    for key, own, section in (
        ("optimizer", is_own(c.optimizer.kind), c.optimizer),
        ("loss", is_own(c.loss.objective or ""), c.loss),
    ):
        if section.options and not own:
            yield f"{key}.options", "is for code of your own: leave it out"
    yield from finetune_contradictions(c) if c.finetune else model_contradictions(c)
    for key, names in (
        ("ema.decays", [Profile(decay=decay).name for decay in c.ema.decays]),
        ("ema.sigma_rel", [Profile(sigma_rel=width).name for width in c.ema.sigma_rel]),
    ):
        if len(set(names)) < len(names):
            yield key, f"has two that are the same when rounded as in their names: {short(', '.join(names))}"
    if c.ema.snapshot_every and not c.ema.sigma_rel:
        yield "ema.snapshot_every", "needs ema.sigma_rel: there is nothing to take snapshots of"
    if c.checkpoint.keep_every and c.checkpoint.keep_every % c.checkpoint.every:
        yield "checkpoint.keep_every", f"must be a multiple of checkpoint.every, but it is {c.checkpoint.keep_every}"
    if c.evaluate.every and c.evaluate.extractor == "classifier" and not c.evaluate.weights:
        yield "evaluate.weights", "is needed for the extractor classifier: the file that it was saved to"
    if c.evaluate.protocol:
        for key in ("num", "extractor", "labels", "measures"):
            if getattr(c.evaluate, key) != type(c.evaluate).model_fields[key].default:
                yield f"evaluate.{key}", "is what evaluate.protocol says: leave one of the two out"
    if c.sample.interval[0] > c.sample.interval[1]:
        yield "sample.interval", f"must have its low end first, but it is {list(c.sample.interval)}"


def finetune_contradictions(c: Sections) -> Iterator[tuple[str, str]]:
    """Of a latent model that becomes a pixel model."""
    for name, example in (("base", "FOLDER"), ("subspace", "FILE")):
        if getattr(c.finetune, name) is None:
            yield f"finetune.{name}", f"is needed, as with --set finetune.{name}={example}"
    for name in ("model", "subspace"):
        if getattr(c, name) is not None:
            yield name, "does not go with finetune, which has all that it says: leave it out"
    if c.data.kind != "encoded":
        yield "data.kind", f"must be encoded for finetune (see asymflow data encode), but it is {c.data.kind}"
    elif c.data.path is None:
        yield "data.path", "is needed, as with --set data.path=SHARDS"
    if c.data.flip:
        yield "data.flip", "cannot be true for encoded data: their latents would not be those of the mirrored images"
    if c.loss.repa:
        yield "loss.repa", "does not go with finetune"
    if c.loss.objective not in (None, "latent_to_pixel"):
        yield "loss.objective", "does not go with finetune, whose objective is latent_to_pixel: leave it out"
    if c.evaluate.every:
        yield "evaluate.every", "does not go with finetune: draw images with asymflow sample, and score those"
    if c.train.compile:
        yield "train.compile", "does not go with finetune yet"


def model_contradictions(c: Sections) -> Iterator[tuple[str, str]]:
    """Of a model that is trained from scratch."""
    if missing := [name for name in ("model", "subspace") if getattr(c, name) is None]:
        yield missing[0], "is missing: give it in the file or by --set"
        return
    for key in ("variance_reduction", "perceptual"):
        if getattr(c.loss, key) is not None:
            yield f"loss.{key}", "needs the section finetune: a latent model to go on from"
    if c.loss.objective == "latent_to_pixel":
        yield "loss.objective", "needs the section finetune: a latent model to go on from"
    if c.loss.repa and is_own(c.loss.objective or ""):
        yield "loss.repa", "is for the objective class_conditional: yours would not get DINOv2"
    if c.data.kind == "encoded":
        yield "data.kind", "cannot be encoded, which is for finetune: choose image_folder or webdataset"
    if c.data.kind == "shapes" and c.data.size is None:
        yield "data.size", "is needed for generated images: how many there are"
    if c.data.kind in ("image_folder", "webdataset") and c.data.path is None:
        yield "data.path", f"is needed for {c.data.kind}, as with --set data.path=PATH"
    if c.model.backbone == "JiT":
        yield from jit_contradictions(c)
    elif c.model.size is not None:
        yield "model.size", f"is for JiT, and model.backbone is {c.model.backbone}: leave it out, or set it to null"


def jit_contradictions(c: Sections) -> Iterator[tuple[str, str]]:
    try:
        Options.model_validate(c.model.options)
    except ValidationError as e:
        yield from faults_of(e, c.model.options, "model.options")
        return
    try:
        net = network(c.model)
    except InputError as e:
        yield "model.size", str(e)
        return
    if c.model.image_size % net["patch_size"]:
        yield "model.image_size", f"must be a multiple of the patch of {c.model.size}, but it is {c.model.image_size}"
    else:
        try:
            check_sizes(net)
        except InputError as e:
            yield "model.options", f"make no network: {e}"
    dim = net["channels"] * net["patch_size"] ** 2
    if isinstance(c.subspace.rank, int) and c.subspace.rank > dim:
        yield "subspace.rank", f"must be at most {dim}, all of a patch of {c.model.size}, but it is {c.subspace.rank}"
    if c.loss.repa and c.loss.repa.after > net["depth"]:
        yield "loss.repa.after", f"must be at most {net['depth']}, the blocks there are, but it is {c.loss.repa.after}"


REFUSED = {  # in the section deepspeed
    "optimizer": "is not used: AdamW has a section of its own, optimizer",
    "scheduler": "is not used: see optimizer.warmup_steps",
    "bfloat16": "is an old name of bf16: use that",
    "amp": "is gone from DeepSpeed: use train.precision: bf16",
    "activation_checkpointing": "has no effect on this model: use model.checkpoint_every, or finetune.checkpointing",
}
SWITCHES = {
    "fp16": "float16 is not supported: its loss scale skips steps and is in no checkpoint. Use train.precision: bf16",
    "torch_autocast": "autocast is what train.precision: bf16 switches on: use that",
}
ROUNDED = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
ZERO = "zero_optimization"


def deepspeed_contradictions(c: Sections) -> Iterator[tuple[str, str]]:
    """DeepSpeed ignores what it does not know, and leaves to chance what contradicts the rest; here it is said."""
    given = c.deepspeed
    for name in given:
        if name in REFUSED:
            yield f"deepspeed.{name}", REFUSED[name]
    on = {}
    for name in ("bf16", *SWITCHES):
        section = given.get(name) or {}
        on[name] = section.get("enabled", False) if isinstance(section, dict) else None
        if not isinstance(on[name], bool):
            yield f"deepspeed.{name}", "must be a section with the key enabled: true or false"
        elif on[name] and name in SWITCHES:
            yield f"deepspeed.{name}.enabled", f"cannot be true: {SWITCHES[name]}"
    if on["bf16"]:
        if c.train.precision != "bf16":
            yield "deepspeed.bf16.enabled", f"is true, which contradicts train.precision: {c.train.precision}"
        if c.sample.precision == "float32":
            yield "sample.precision", "cannot be float32 where deepspeed.bf16 keeps the weights in bf16"
        for name in ROUNDED:
            if given["bf16"].get(name):
                yield f"deepspeed.bf16.{name}", "is refused: averages and checkpoints are made of float32 weights"
        zero, types = (given.get(name) if isinstance(given.get(name), dict) else {} for name in (ZERO, "data_types"))
        if zero.get("stage") == 0 and types.get("grad_accum_dtype") == "fp32":
            yield (
                "deepspeed.data_types.grad_accum_dtype",
                "cannot be fp32 at stage 0 with bfloat16 weights",
            )
    clip = given.get("gradient_clipping", 0)
    if isinstance(clip, bool) or not isinstance(clip, int | float) or clip < 0:
        yield "deepspeed.gradient_clipping", f"must be a number, at least 0, but it is {shown(clip)}"
    for name, expected in (
        ("train_batch_size", c.train.global_batch_size),
        ("train_micro_batch_size_per_gpu", c.train.micro_batch_size),
    ):
        if name in given and expected is not None and not same(given[name], expected):
            yield f"deepspeed.{name}", disagreement(given[name], expected)
    yield from zero_contradictions(given.get(ZERO))


def zero_contradictions(zero: object) -> Iterator[tuple[str, str]]:
    key = f"deepspeed.{ZERO}"
    if not isinstance(zero, dict):
        yield key, "must be a section with the key stage"
        return
    stage = zero.get("stage")
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3) or not isinstance(stage, int):
        yield f"{key}.stage", f"must be 0, 1, 2 or 3, but it is {shown(stage)}"
        return
    for name, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        section = zero.get(name) or {}
        device = section.get("device", "none") if isinstance(section, dict) else None
        if device == "nvme":
            yield f"{key}.{name}.device", "cannot be nvme: averages and checkpoints need the weights in memory. Use cpu"
        elif device not in ("cpu", "none"):
            yield f"{key}.{name}", "must be a section with the key device: cpu or none"
        elif device == "cpu" and stage < lowest:
            yield f"{key}.{name}", f"needs stage {lowest} or above, but the stage is {stage}"
        elif device == "cpu" and section.get("super_offload"):
            yield f"{key}.{name}.super_offload", "is refused: averages and checkpoints cannot see such weights"
        elif device == "cpu" and section.get("ratio", 1) != 1:
            yield f"{key}.{name}.ratio", "must be 1: checkpoints cannot see the moments of what is not offloaded"
    if zero.get("compute_grad_norm") is False:
        yield f"{key}.compute_grad_norm", "cannot be false: it tells whether a step can be taken"
    if zero.get("zenflow") is not None:
        yield f"{key}.zenflow", "is refused: averages and checkpoints cannot see such weights"
