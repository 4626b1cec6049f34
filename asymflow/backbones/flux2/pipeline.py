"""Text to image with a pixel FLUX.2 klein: a pipeline of diffusers in which only the flow is not stock.

    pipeline = AsymFlux2KleinPipeline.from_pretrained(BASE, adapter=ADAPTER, torch_dtype=torch.bfloat16).to("cuda")
    image = pipeline(prompt="a red square", generator=torch.Generator().manual_seed(0)).images[0]

BASE is a FLUX.2 klein base model in the layout of diffusers; its autoencoder is not needed. ADAPTER: see
`asymflow.backbones.flux2.adapter`. What `Flux2KleinPipeline` has works here too: moving and offloading, callbacks, and
further LoRAs,

    pipeline.load_lora_weights("style.safetensors", adapter_name="style")
    pipeline.set_adapters("style", 0.8)

The adapter, which makes it a model of pixels, is a part of the transformer, and no such method changes it.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel, SchedulerMixin, UniPCMultistepScheduler
from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.pipelines.flux2 import Flux2PipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from asymflow import opening, templates
from asymflow.backbones.flux2 import Flux2
from asymflow.backbones.flux2.adapter import find, fingerprint, load_adapter, mark_used
from asymflow.color import clamp_to_gamut, oklab_to_rgb, rgb_to_oklab
from asymflow.errors import InputError
from asymflow.model import AsymFlow
from asymflow.patches import token_grid
from asymflow.pixels import to_rgb, upright
from asymflow.sampling import checked_levels, dynamic_shift, guided, sigma_grid

SIZE = 1024  # pixels along each side, by default
HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download")  # of the base and of the adapter
LORA_OPTIONS = (*HUB_OPTIONS, "weight_name", "subfolder", "revision", "proxies", "use_safetensors")
NUDGE = 2e-6  # how much a scheduler may change a noise level, see `set_levels`


class AsymFlux2KleinPipeline(Flux2KleinPipeline):
    """Draws images with a FLUX.2 klein and an adapter, in normalized Oklab pixels. Made by `from_pretrained` or `use`.

    `transformer` is that of the pixel model. `scheduler` is a UniPC for flows; it may be replaced by another one for
    flows that does not change the noise levels, such as `FlowMatchEulerDiscreteScheduler()`. `vae` is None.
    """

    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds")
    base_fingerprint = None  # see `asymflow.backbones.flux2.adapter.fingerprint`

    @classmethod
    def from_pretrained(
        cls, base: str | Path, adapter: str | Path | None = None, **options
    ) -> "AsymFlux2KleinPipeline":
        """The pipeline of a base model and an adapter, each a folder here or a repository of the Hugging Face Hub.

        options: those of `diffusers.DiffusionPipeline.from_pretrained`, such as torch_dtype. A revision is of the base.
        Raises InputError if a vae is given, if the base is not a FLUX.2 klein base model in diffusers' layout, or as
        `load_adapter`.
        """
        if adapter is None:
            raise InputError(
                "give from_pretrained an adapter=..., a folder or a repository such as Lakonik/AsymFLUX.2-klein-9B: "
                "the base alone is a model of latents, see diffusers.Flux2KleinPipeline"
            )
        if options.get("vae") is not None:
            raise InputError("vae is given, but a model of pixels has no autoencoder: leave it out")
        check_base_folder(Path(base))
        hub_options = {name: options[name] for name in HUB_OPTIONS if name in options}
        options = {"scheduler": flow_unipc(), "use_safetensors": True, **options, "vae": None}
        local = Path(base).is_dir()
        try:
            with opening.no_larger_than(opening.counted_tensors(Path(base)), base) if local else nullcontext():
                pipeline = super().from_pretrained(str(base), **options)
        except InputError:
            raise
        except (OSError, ValueError, RuntimeError, SafetensorError) as e:
            raise InputError(f"{base} cannot be loaded as a FLUX.2 klein: {' '.join(str(e).split())[:300]}") from None
        if pipeline.config.is_distilled:
            raise InputError(f"{base} is a distilled model, which knows no guidance: take FLUX.2-klein-base-9B or -4B")
        if pipeline.tokenizer is not None:
            templates.check_tokenizer(pipeline.tokenizer, base)
        pipeline.base_fingerprint = fingerprint(pipeline.transformer)
        return pipeline.use(load_adapter(pipeline.transformer, find(adapter, **hub_options)))

    def save_pretrained(self, *args, **options):
        raise InputError("a pixel pipeline is its base and its adapter, which are files already: keep these two")

    def load_lora_weights(self, *args, adapter_name: str | None = None, hotswap: bool = False, **options) -> None:
        """Load a LoRA, as diffusers does. InputError if not all of it is for layers of the transformer."""
        before = self.get_list_adapters().get("transformer", [])
        try:
            super().load_lora_weights(*args, adapter_name=adapter_name, hotswap=hotswap, **options)
        except (ValueError, RuntimeError, KeyError) as e:  # the second for the latent model's first or last layer
            raise InputError(f"the LoRA cannot be loaded: {' '.join(str(e).split())[:300]}") from None
        if not hotswap and len(self.get_list_adapters().get("transformer", [])) == len(before):
            raise InputError("the LoRA cannot be loaded: it has nothing for a layer of this transformer")

    @classmethod
    def lora_state_dict(cls, source: str | Path | dict[str, Tensor], **options):
        """As in diffusers. InputError where that leaves tensors out, with a warning or without."""
        given = {name: options.get(name) for name in LORA_OPTIONS}
        safe = given["use_safetensors"]
        given |= {"use_safetensors": safe is None or safe, "allow_pickle": safe is None, "user_agent": None}
        raw, metadata = _fetch_state_dict(source, **given)
        if dora := [key for key in raw if "dora_scale" in key]:
            raise InputError(f"it is a DoRA, which diffusers has no place for ({dora[0]})")
        rest = dict(raw)
        converted = super().lora_state_dict(rest, **options | {"return_lora_metadata": False})
        if rest and any(".lora_down.weight" in key for key in raw):  # as of kohya: what diffusers knows is taken out
            raise InputError(unused(rest))
        return (converted, metadata) if options.get("return_lora_metadata") else converted

    @classmethod
    def load_lora_into_transformer(
        cls, state_dict: dict[str, Tensor], transformer: Flux2Transformer2DModel, *args, **options
    ) -> None:
        others = [key for key in state_dict if not key.startswith(f"{cls.transformer_name}.")]
        if 0 < len(others) < len(state_dict):  # of none for the transformer, `load_lora_weights` says so
            raise InputError(unused(others))
        before = set(getattr(transformer, "peft_config", ()))
        super().load_lora_into_transformer(state_dict, transformer, *args, **options)
        for name in set(getattr(transformer, "peft_config", ())) - before:
            layers = get_peft_model_state_dict(transformer, adapter_name=name)
            applied = {f"{cls.transformer_name}.{key}" for key in layers}
            if len(applied) != len(state_dict):
                transformer.delete_adapters(name)
                raise InputError(unused(sorted(applied ^ state_dict.keys())))

    def use(self, flow: AsymFlow) -> "AsymFlux2KleinPipeline":
        """Sample from `flow`, which wraps a `Flux2` and models Oklab images, from now on. Returns the pipeline.

        Its LoRA layers become a part of it: methods for LoRAs are for further ones, and cannot change the pixel model.
        InputError if it has further ones.
        """
        transformer = flow.backbone.transformer
        own = 0 if hasattr(transformer, "pixel_model") else 1
        if len(getattr(transformer, "peft_config", ())) > own:
            raise InputError("the pixel model has LoRAs on top, which would become a part of it: unload them before")
        mark_used(transformer)
        make_permanent(transformer)
        # Here, so that it goes wherever `components` go.
        transformer.pixel_model = (flow.subspace, flow.sigma_min, flow.backbone.prompt_length)
        self.register_modules(transformer=transformer)
        return self

    @property
    def flow(self) -> AsymFlow:
        """The pixel model. It is made anew each time, because users may have wrapped or compiled `transformer`."""
        if not hasattr(self.transformer, "pixel_model"):
            raise InputError("the transformer is a model of latents: make the pipeline with from_pretrained, or use()")
        subspace, sigma_min, prompt_length = self.transformer.pixel_model
        subspace = subspace.to(self._execution_device)
        backbone = Flux2(self.transformer, subspace.patch_size, subspace.scale, prompt_length)
        return AsymFlow(backbone, subspace, sigma_min=sigma_min).eval()

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | Sequence[Image.Image] | None = None,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 38,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict | None = None,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        orthogonal_guidance: float = 1.0,
        clamp_denoised: bool = True,
    ) -> Flux2PipelineOutput | tuple:
        """Draw images. Returns them as `.images`, image j of prompt i at i * num_images_per_prompt + j.

        image: reference images, of any sizes. Those above 1024^2 pixels are made smaller; all are cropped to multiples
            of the patch size.
        prompt: one, or a list; or else prompt_embeds (B, L, joint_attention_dim).
        height, width: in pixels, multiples of the patch size. By default those of the first reference image, or 1024.
        sigmas: noise levels from 1 downwards, without the 0 at the end; by default `num_inference_steps` of them, see
            `sigma_grid` and `dynamic_shift`.
        guidance_scale: no guidance if it is 1 or less. negative_prompt_embeds: guidance leads away from it; by default
            the empty prompt. (B, L, ...), or (1, L, ...) for all prompts.
        generator: one, or one for each image. latents: the noise itself, (n, 3, height, width).
        output_type: "pil"; "np", (n, height, width, 3) in [0, 1]; "pt", (n, 3, height, width) in [0, 1]; or "latent",
            normalized Oklab (n, 3, height, width) in float32, not clamped.
        max_sequence_length: positions of a prompt; by default those of the training, or 512 if they are not known.
        attention_kwargs: see diffusers. A "scale" multiplies the weights of further LoRAs; the adapter has none.
        callback_on_step_end: called as callback(pipeline, step, timestep, tensors). `tensors` are those of latents,
            prompt_embeds and negative_prompt_embeds that are named; the ones that it returns replace them.
        orthogonal_guidance: see `guided`. clamp_denoised: clamp the denoised image to the colours that a screen can
            show, after each evaluation (both arXiv 2605.12964). The integration is done in float32.
        Raises InputError, or ValueError as diffusers does, if the arguments do not fit together.
        """
        named = callback_on_step_end_tensor_inputs
        self.check_inputs(prompt, None, None, prompt_embeds, named, guidance_scale)
        self._guidance_scale, self._attention_kwargs, self._interrupt = guidance_scale, attention_kwargs, False
        device, flow = self._execution_device, self.flow

        images = [image] if isinstance(image, Image.Image) else list(image or ())
        references = [self.reference(image, flow.patch_size) for image in images]
        like = references[0].shape[-2:] if references else (SIZE, SIZE)
        height, width = (usual if given is None else given for given, usual in zip((height, width), like, strict=True))
        token_grid(torch.empty(1, 3, height, width, device="meta"), flow.patch_size)  # checks the size
        grid = sigma_grid(num_inference_steps, dynamic_shift(height, width)) if sigmas is None else [*sigmas, 0.0]
        timesteps = set_levels(self.scheduler, checked_levels(grid), device)
        self._num_timesteps = len(timesteps)
        levels = torch.as_tensor(self.scheduler.sigmas).tolist()
        length = flow.backbone.prompt_length if max_sequence_length is None else max_sequence_length

        def encode(prompt: str | list[str] | None, embeds: Tensor | None) -> Tensor:
            embeds, _ = self.encode_prompt(prompt, device, num_images_per_prompt, embeds, length)
            return embeds.to(device)

        prompt_embeds = encode(prompt, prompt_embeds)
        count = len(prompt_embeds)
        if self.do_classifier_free_guidance:
            negative_prompt_embeds = encode("", negative_prompt_embeds)
            if len(negative_prompt_embeds) == num_images_per_prompt:  # one for all prompts
                negative_prompt_embeds = negative_prompt_embeds[:1].expand(count, -1, -1)
            if negative_prompt_embeds.shape != prompt_embeds.shape:
                raise InputError(
                    f"with and without the prompt, text embeddings must have one shape, but they have "
                    f"{tuple(prompt_embeds.shape)} and {tuple(negative_prompt_embeds.shape)}"
                )
        else:
            negative_prompt_embeds = prompt_embeds
        references = [reference.to(device).expand(count, -1, -1, -1) for reference in references]
        x = self.noise((count, 3, height, width), generator, latents, device)

        with self.progress_bar(total=len(timesteps)) as progress:
            for step, t in enumerate(timesteps):
                if self.interrupt:
                    break
                self._current_timestep = t
                sigma = levels[step]  # not t / 1000: UniPC's timesteps are whole numbers
                both = {"condition_images": references, "joint_attention_kwargs": self.attention_kwargs}
                velocity = guided(
                    flow,
                    {"encoder_hidden_states": prompt_embeds, **both},
                    {"encoder_hidden_states": negative_prompt_embeds, **both},
                    self.guidance_scale if self.do_classifier_free_guidance else 1.0,
                    orthogonal=orthogonal_guidance,
                )
                with self.transformer.cache_context("guided"):
                    u = velocity(x, torch.full((count,), sigma, dtype=x.dtype))
                if clamp_denoised:
                    x0 = x - sigma * u
                    u = u + (x0 - clamp_to_gamut(x0)) / sigma
                x = self.scheduler.step(u, t, x, return_dict=False)[0]
                if callback_on_step_end is not None:
                    current = (x, prompt_embeds, negative_prompt_embeds)
                    tensors = dict(zip(self._callback_tensor_inputs, current, strict=True))
                    tensors |= callback_on_step_end(self, step, t, {name: tensors[name] for name in named}) or {}
                    x, prompt_embeds, negative_prompt_embeds = (tensors[name] for name in self._callback_tensor_inputs)
                progress.update()
        self._current_timestep = None

        result = x if output_type == "latent" else self.image_processor.postprocess(oklab_to_rgb(x), output_type)
        self.maybe_free_model_hooks()
        return Flux2PipelineOutput(images=result) if return_dict else (result,)

    def reference(self, image: Image.Image, patch_size: int) -> Tensor:
        """A reference image in normalized Oklab, (1, 3, height, width), reduced as in the stock pipeline."""
        try:
            self.image_processor.check_image_input(image)
        except ValueError as e:
            raise InputError(f"a reference image cannot be used: {e}") from None
        image = to_rgb(upright(image))
        image = self.image_processor._resize_if_exceeds_area(image)
        width, height = (length // patch_size * patch_size for length in image.size)
        return rgb_to_oklab(self.image_processor.preprocess(image, height, width, resize_mode="crop"))

    def noise(self, shape: tuple[int, ...], generator, latents: Tensor | None, device: torch.device) -> Tensor:
        if latents is not None and tuple(latents.shape) != shape:
            raise InputError(f"latents are the noise of the images, {shape}, but their shape is {tuple(latents.shape)}")
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise InputError(f"give one generator, or one for each of the {shape[0]} images, not {len(generator)}")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return latents.to(device, torch.float32)


def unused(keys: Collection[str]) -> str:
    return (
        f"{len(keys)} of its tensors are not for the transformer, or halves of a layer, such as {next(iter(keys))}: "
        "take one without them"
    )


# ---- The adapter -----------------------------------------------------------------------------------------------------
class LowRankLinear(nn.Linear):
    """A linear layer with a low-rank update that is a part of it: x W^T + bias + (x A^T) B^T.

    Unlike peft's layers it cannot be switched off, scaled, merged twice or removed, and peft puts further LoRAs around
    it as around any linear layer. The products are those of peft, in their order, so the same bits.
    """

    def __init__(self, layer: BaseTunerLayer):
        base, (name,) = layer.get_base_layer(), layer.lora_A
        if isinstance(base, LowRankLinear) or layer.merged:
            raise InputError("a layer has its low-rank update already: unfuse its LoRA, or make the pixel model again")
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self.down, self.up, self.scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        update = F.linear(F.linear(x.to(self.down.dtype), self.down), self.up)
        return (result + update * self.scaling).to(result.dtype)


def make_permanent(transformer: Flux2Transformer2DModel) -> None:
    """Make the adapter of `load_adapter` a part of the transformer: diffusers and peft then know of no LoRA."""
    layers = {path: layer for path, layer in transformer.named_modules() if isinstance(layer, BaseTunerLayer)}
    for path, layer in {path: LowRankLinear(layer) for path, layer in layers.items()}.items():  # all, or none
        transformer.set_submodule(path, layer)
    transformer.unload_lora()


# ---- Noise levels ----------------------------------------------------------------------------------------------------
def flow_unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)


def set_levels(scheduler: SchedulerMixin, levels: list[float], device: torch.device) -> Tensor:
    """Set the scheduler to these noise levels, of which the last is 0, and return its timesteps.

    UniPC changes them slightly. Its `sigmas` are the levels rounded to float32, except that a first level of 1, where
    log(1 - sigma) is infinite, is lowered by 1e-6; that moves x by 1e-6 of the velocity. Its last step is of order 1
    and uses log(0) only as exp(-inf), so it ends exactly at the denoised image. Its `timesteps`, 1000 sigma, are cut to
    whole numbers, and two may be equal; so it must count its steps from begin_index, not look them up by timestep.

    Raises InputError if the scheduler uses other levels, because of a shift of its own or several evaluations a step.
    """
    reason = None
    try:
        scheduler.set_timesteps(sigmas=np.array(levels[:-1]), device=device)
        scheduler.set_begin_index(0)
        own = torch.as_tensor(scheduler.sigmas).cpu().double()
        if own.shape != (len(levels),) or (own - torch.tensor(levels).double()).abs().max() > NUDGE:
            reason = f"its noise levels begin with {', '.join(f'{level:.4f}' for level in own[:3])}"
    except (ValueError, TypeError, AttributeError) as e:
        reason = " ".join(str(e).split())
    if reason:
        raise InputError(
            f"{type(scheduler).__name__} does not go through the noise levels that it is given ({reason}): it must be "
            "one for flows, with a shift of 1, no dynamic shifting and one evaluation a step, such as "
            "FlowMatchEulerDiscreteScheduler()"
        )
    return scheduler.timesteps


# ---- The base --------------------------------------------------------------------------------------------------------
def check_base_folder(base: Path) -> None:
    """InputError if `base` is a folder without a FLUX.2 klein, or is neither a folder nor the name of a repository."""
    if not base.is_dir():
        if base.exists() or len(base.parts) != 2 or base.is_absolute():
            raise InputError(f"there is no folder {base}: give that of a FLUX.2 klein base model in diffusers' layout")
        return
    if not (base / "model_index.json").exists():
        raise InputError(f"{base} is not a base model in diffusers' layout: it has no model_index.json")
    try:
        index = opening.read_json(base / "model_index.json")
        classes = [index[part][1] for part in ("transformer", "text_encoder", "tokenizer")]
    except (ValueError, KeyError, TypeError, IndexError):
        classes = None
    if classes is None or classes[:2] != ["Flux2Transformer2DModel", "Qwen3ForCausalLM"]:
        raise InputError(
            f"{base} is not a FLUX.2 klein base model: its model_index.json does not have a Flux2Transformer2DModel "
            "as transformer and a Qwen3ForCausalLM as text_encoder"
        )
