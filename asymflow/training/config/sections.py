"""The keys of a configuration: what can be set, what it may be, and what it is if nothing is said.

A class is a section of the YAML file, a field is a key. Keys without a default are needed.
"""

import math
import os
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from asymflow.evaluation.measures import MEASURES
from asymflow.precision import Precision
from asymflow.sampling import METHODS

Count = Annotated[int, Field(ge=1)]
WholeNumber = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
RelativeWidth = Annotated[float, Field(ge=0.001, lt=math.sqrt(1 / 12))]  # see `ema.power_of`
Text = Annotated[str, Field(min_length=1)]
Measure = Literal[tuple(MEASURES)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def listed(*default, **checks) -> Any:
    """A field that is a list in YAML and a tuple here; its elements are as strict as everything else."""
    return Field(default, strict=False, **checks)


class Options(Section):
    """Sizes of the network where they are not those that `model.size` has; null leaves them."""

    width: Count | None = Field(None, description="of the transformer")
    depth: Count | None = Field(None, description="blocks")
    heads: Count | None = Field(None, description="of the attention; width must be a multiple of 4 heads")
    bottleneck: Count | None = Field(None, description="rank of the patch embedding")
    in_context_start: WholeNumber | None = Field(None, description="the class tokens join before this block")
    in_context_tokens: WholeNumber | None = Field(None, description="class tokens")


class Described(NamedTuple):
    """Beside a field that is a dictionary: the section that it is by default, for lists of all keys."""

    section: type[BaseModel]


Place = Annotated[Text, AfterValidator(os.path.expanduser)]  # a path: shells do not replace ~ in --set data.path=~/x
# The arguments of a class or function of one's own. null, over those of a base: none.
Arguments = dict[Text, JsonValue]
OwnOptions = Annotated[
    Arguments,
    BeforeValidator(lambda options: {} if options is None else options, json_schema_input_type=Arguments | None),
]


class Model(Section):
    """The network."""

    backbone: Text = Field("JiT", description="JiT, or package.module:Class of your own, see docs/backbones.md")
    size: Text | None = Field(
        None, description="required for JiT: SIZE/PATCH, such as B/16; the sizes are those of asymflow/backbones/jit"
    )
    image_size: Count = Field(description="height and width in pixels, a multiple of the patch")
    num_classes: Count = Field(description="classes in the data; one more, no class, is added")
    options: Annotated[OwnOptions, Described(Options)] = Field(
        {}, validate_default=True, description="other sizes than the published ones; or the arguments of your own class"
    )
    dropout: BelowOne | None = Field(None, description="of the projections; null: as published for the size")
    checkpoint_every: WholeNumber = Field(0, description="recompute every n-th block in the backward pass; 0: none")
    noise_scale: Positive = Field(
        default_factory=lambda model: max(1.0, model.get("image_size", 0) / 256),  # as `JiT.noise_scale`, published
        description="standard deviation of the noise; not given: image_size / 256, but at least 1",
    )
    sigma_min: NotNegative = Field(0.04, description="clamp of sigma when sampling, outside of the subspace")

    @field_validator("options")
    @classmethod
    def all_of_them(cls, options: OwnOptions, info: ValidationInfo) -> OwnOptions:
        """Of a JiT, with null for those that are not given."""
        return dict.fromkeys(Options.model_fields) | options if info.data.get("backbone") == "JiT" else options


class SubspaceSection(Section):
    """Where the noise is predicted. Rank 0 is x0-prediction, the full rank u-prediction."""

    rank: WholeNumber | Literal["full", "auto"] = Field(description="dimensions; auto: as many as pay off")
    file: Place | None = Field(None, description="of `asymflow subspace`; null: fitted on first start")
    images: Count = Field(10_000, description="images to fit it on")


class Lora(Section):
    """Low-rank updates of linear layers of a frozen network, by peft; alpha is the rank."""

    rank: Count = Field(256, description="of the updates")
    dropout: BelowOne = Field(0.05, description="of their inputs")
    targets: Annotated[tuple[Text, ...], Field(min_length=1)] | None = Field(
        None, strict=False, description="linear layers, by the ends of their names; null: the paper's"
    )


class Finetune(Section):
    """A latent text-to-image model, FLUX.2 klein, to go on from as a pixel model: instead of `model` and `subspace`.

    Beside the LoRAs, x_embedder, proj_out and norm_out are trained in full.
    """

    base: Place | None = Field(None, description="required: its folder, as diffusers saves it; the transformer is read")
    subspace: Place | None = Field(None, description="required: file of `asymflow subspace procrustes`")
    lora: Lora | None = Field(Lora(), description="null: all weights are trained")
    checkpointing: bool = Field(True, description="recompute every block in the backward pass")


class Data(Section):
    """Where the images come from."""

    kind: Text = Field(
        description="what `path` is: image_folder, webdataset, or encoded, by `asymflow data encode`, for finetune; "
        "shapes are generated; or package.module:Class of your own"
    )
    path: Place | None = Field(None, description="folder of images, or tar shards")
    size: Count | None = Field(None, description="how many images, for shapes")
    options: OwnOptions = Field({}, description="more arguments of your own class")
    flip: bool = Field(False, description="mirror every other image at random")
    fewer_classes: bool = Field(False, description="allow fewer classes in the data than model.num_classes")
    workers: WholeNumber = Field(4, description="processes that read images, for each rank; 0: the rank itself")


class Repa(Section):
    """Alignment of the tokens after one block with the features of DINOv2."""

    model: Place = Field(description="folder of a DINOv2 of the package transformers")
    weight: Positive = Field(0.5, description="of the alignment in the loss")
    after: Count = Field(8, description="blocks that the tokens have passed")
    hidden: Count = Field(2048, description="width of the projection")


class PerceptualSection(Section):
    """LPIPS between decoded images, for finetune."""

    weight: Positive = Field(1.0, description="in the loss")
    vgg: Place | None = Field(
        None, description="file of torchvision's weights of VGG16; null: torchvision finds or downloads it; or random"
    )


class Loss(Section):
    """Flow matching: mean of ((u_pred - u) sigma / max(sigma, sigma_floor))^2."""

    objective: Text | None = Field(
        None,
        description="class_conditional, latent_to_pixel (for finetune), or package.module:Class of your own; null: "
        "whichever of the two it is",
    )
    options: OwnOptions = Field({}, description="more arguments of your own class")
    weight: Positive = Field(1.0, description="of flow matching, beside other terms of the loss")
    sigma_mean: float = Field(0.8, description="sigma = sigmoid(sigma_mean + sigma_std n), n standard normal")
    sigma_std: NotNegative = Field(0.8, description="see sigma_mean")
    sigma_shift: Positive = Field(1.0, description="then sigma becomes shift sigma / (1 + (shift - 1) sigma)")
    sigma_floor: Annotated[float, Field(gt=0, le=1)] = Field(0.05, description="below, errors count less")
    label_dropout: Fraction = Field(0.1, description="share of the images whose class or prompt is not told")
    repa: Repa | None = Field(None, description="null: none")
    variance_reduction: Positive | None = Field(
        None, description="of the target, for finetune: the shift in the weight w; null: none"
    )
    perceptual: PerceptualSection | None = Field(None, description="null: none")


class Train(Section):
    """How long, how much at a time, and in what numbers."""

    steps: Count = Field(description="optimizer steps in all")
    global_batch_size: Count = Field(description="images in a step, of all ranks together")
    micro_batch_size: Count | None = Field(None, description="images at a time on a rank; null: all of its share")
    seed: WholeNumber = Field(description="with an image's index, fixes everything random about it")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast over float32 weights")
    compile: bool = Field(False, description="use torch.compile")
    skip_nonfinite: WholeNumber = Field(
        0, description="steps with a NaN or infinite loss or gradient to skip before giving up"
    )
    log_every: Count = Field(50, description="steps between lines on stderr, where that is no terminal")


class Optimizer(Section):
    """The learning rate rises linearly over the warm-up, then stays."""

    kind: Text = Field("AdamW", description="AdamW, or package.module:function of your own")
    options: OwnOptions = Field({}, description="more arguments of your own function")
    lr: NotNegative = Field(2e-4, description="learning rate")
    betas: tuple[BelowOne, BelowOne] = listed(0.9, 0.95, description="decays of the two moments")
    weight_decay: NotNegative = Field(0.0, description="decoupled from the gradient")
    eps: Positive = Field(1e-8, description="added to the root of the second moment")
    warmup_steps: WholeNumber = Field(0, description="0: none")
    multipliers: dict[Text, Positive] = Field({}, description="of the learning rate, by names of layers")


class Ema(Section):
    """Moving averages of the weights."""

    decays: tuple[BelowOne, ...] = listed(
        0.9999,
        description="constant decays, each an average of its own; the initial weights have no share in it, unless the "
        "first step is skipped",
    )
    sigma_rel: tuple[RelativeWidth, ...] = listed(
        0.05, 0.10, description="relative widths of the power-function averages that others are rebuilt from"
    )
    snapshot_every: Count | None = Field(None, description="steps between snapshots of them; null: none")


class Checkpoint(Section):
    """What is saved, and how much of it stays."""

    every: Count = Field(description="steps between checkpoints")
    keep_last: Count = Field(3, description="the newest so many stay")
    keep_every: Count | None = Field(None, description="those of every so many steps stay too; null: none")


class SampleSection(Section):
    """Images drawn while it trains, always from the same noise."""

    every: Count | None = Field(None, description="steps between grids; null: none")
    num: Count = Field(16, description="images in the grid; each rank draws its share in micro-batches")
    steps: Count = Field(50, description="of the sampler")
    method: Text = Field(
        "heun", description=f"{', '.join(METHODS)}, or package.module:function of your own; heun evaluates twice a step"
    )
    guidance: float = Field(2.3, description="scale of classifier-free guidance; 1: none")
    interval: tuple[Fraction, Fraction] = listed(0.0, 0.88, description="noise levels where guidance acts, low first")
    precision: Precision | None = Field(
        None, description="of the computation; null: bf16 on a GPU that has it, or if weights are in bf16, else float32"
    )


class Evaluate(Section):
    """Samples held against images while it trains, by the protocols of `asymflow evaluate`."""

    every: Count | None = Field(None, description="steps between evaluations; null: none")
    protocol: Text | None = Field(
        None, description="of asymflow evaluate: its name or file; null: as the keys below and sample say"
    )
    num: Annotated[int, Field(ge=2)] = Field(10_000, description="samples to draw; distances of other numbers differ")
    batch_size: Count = Field(64, description="samples at a time on a rank")
    extractor: Text = Field("inception-v3-compat", description="torch-fidelity's name, or classifier: of this package")
    weights: Place | None = Field(None, description="file of the weights of the extractor; null: downloaded")
    labels: Literal["balanced", "data"] = Field("balanced", description="classes to draw: all alike, or as in the data")
    reference: Place | None = Field(
        None, description="images, or an npz file with mu and sigma; null: the training images"
    )
    measures: tuple[Measure, ...] = listed("frechet_distance", min_length=1, description="what is measured")


class Sections(Section):
    """All of a training: what every configuration has."""

    model: Model | None = Field(None, description="required unless finetune is set")
    subspace: SubspaceSection | None = Field(None, description="required unless finetune is set")
    finetune: Finetune | None = Field(None, description="null: a model is trained from scratch")
    data: Data
    loss: Loss = Loss()
    train: Train
    optimizer: Optimizer = Optimizer()
    ema: Ema = Ema()
    checkpoint: Checkpoint
    sample: SampleSection = SampleSection()
    evaluate: Evaluate = Evaluate()
    deepspeed: dict[str, JsonValue] = Field(description="DeepSpeed's own configuration, passed on as it is")

    @property
    def objective(self) -> str:
        """The name of what is minimized, given or not."""
        return self.loss.objective or ("latent_to_pixel" if self.finetune else "class_conditional")


def known_keys(section: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """All keys of a section, such as "train" and "train.steps", those of a section after it, and what they may be."""
    keys = {}
    for name, field in section.model_fields.items():
        keys[key := f"{prefix}{field.alias or name}"] = field
        described = (beside.section for beside in field.metadata if isinstance(beside, Described))
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ()), *described):
            if hasattr(kind, "model_fields"):
                keys |= known_keys(kind, f"{key}.")
    return keys


def file_schema() -> dict:
    """The JSON schema of a configuration file, for editors: a base, or --set, may give any key that it leaves out."""
    schema = Sections.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
    schema["properties"]["base"] = {"type": "string", "description": "name or path of the file that this one is over"}
    return schema
