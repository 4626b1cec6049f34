"""What a FLUX.2 klein sees of images and captions: its VAE and its text encoder, used as the stock pipeline does."""

import hashlib
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from asymflow import files, opening, templates
from asymflow.errors import InputError
from asymflow.progress import limit_loading_bars

PARTS = ("vae", "text_encoder", "tokenizer")


@torch.no_grad()
def encode_image(vae: torch.nn.Module, images: Tensor) -> Tensor:
    """Latents (B, r, h, w) as the transformer of FLUX.2 sees them, in the dtype of the VAE.

    vae: an `AutoencoderKLFlux2` of r / 4 channels. images: (B, 3, H, W) in [-1, 1], H and W multiples of what a latent
    token covers. The mode of the posterior, squares of 2 x 2 moved into the channels, normalized by the running
    statistics of its batch norm: the operations of the stock pipelines, in their order, so the same bits.
    """
    mode = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
    mean, std = statistics(vae)
    return (F.pixel_unshuffle(mode, 2) - mean) / std


@torch.no_grad()
def decode_latents(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    """The inverse of `encode_image`: latents (B, r, h, w) to images (B, 3, H, W) in [-1, 1], clamped, float32."""
    mean, std = statistics(vae)
    mode = F.pixel_shuffle(latents.to(vae.device, vae.dtype) * std + mean, 2)
    return vae.decode(mode, return_dict=False)[0].float().clamp(-1, 1)


def statistics(vae: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the channels of latents, (r, 1, 1)."""
    variance = vae.bn.running_var + vae.config.batch_norm_eps
    return vae.bn.running_mean[:, None, None].to(vae.dtype), variance.sqrt()[:, None, None].to(vae.dtype)


@torch.no_grad()
def encode_prompts(pipeline, captions: list[str], max_length: int) -> Tensor:
    """Embeddings (B, L, C) by the stock `Flux2KleinPipeline`, L = max_length, in the dtype of its text encoder.

    A caption that is too long is cut off there: see `prompt_tokens`.
    """
    device = pipeline.text_encoder.device
    return pipeline.encode_prompt(captions, device=device, max_sequence_length=max_length)[0]


def prompt_tokens(pipeline, caption: str) -> int:
    """How many tokens a caption has in the chat template, where nothing cuts it off."""
    chat = [{"role": "user", "content": caption}]
    options = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return len(pipeline.tokenizer(pipeline.tokenizer.apply_chat_template(chat, **options))["input_ids"])


def load_encoders(base: Path, dtype: torch.dtype, device: torch.device | str):
    """A `Flux2KleinPipeline` of the folder `base` without its transformer, and its text encoder without the head.

    The head would compute the logits of 150,000 words for every position, and nobody reads them. InputError if
    something is not there, or cannot be loaded. Not one weight is random, as the libraries make those that they miss.
    """
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()  # what they would only tell is an error here, or does not matter
    options = dict(torch_dtype=dtype, local_files_only=True, use_safetensors=True)
    try:
        with warnings.catch_warnings():  # of the newest diffusers: older ones do not know torch_dtype by another name
            warnings.simplefilter("ignore", FutureWarning)
            limit_loading_bars()
            pipeline = diffusers.Flux2KleinPipeline.from_pretrained(
                base,
                transformer=None,
                vae=load_whole(diffusers.AutoencoderKLFlux2, base / "vae", options),
                text_encoder=load_whole(transformers.Qwen3Model, base / "text_encoder", options),
                **options,
            )
    except Exception as e:  # the libraries report what is missing or damaged by exceptions of many types
        raise InputError(f"--base {base} cannot be loaded: {[*str(e).splitlines(), repr(e)][0]}") from None
    templates.check_tokenizer(pipeline.tokenizer, base)
    return pipeline.to(device)


def load_whole(kind: type, folder: Path, options: dict) -> torch.nn.Module:
    """A model of diffusers or transformers, in eval mode. InputError if weights are missing, or of another shape."""
    with opening.no_larger_than(opening.counted_tensors(folder), folder):
        model, report = kind.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    if misfits := sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]):
        more = f" and {len(misfits) - 5} more" if len(misfits) > 5 else ""
        raise InputError(f"{folder.name} lacks weights, or has them in another shape: {', '.join(misfits[:5])}{more}")
    return model.eval()


def read_base(base: Path) -> dict:
    """What is known of a base without loading it: rank r, patch_size, width C of its prompts."""
    try:
        opening.read_json(base / "model_index.json")
        vae, text = (opening.read_json(base / part / "config.json") for part in ("vae", "text_encoder"))
        kinds = vae["_class_name"], text["model_type"]
        if kinds == ("AutoencoderKLFlux2", "qwen3"):
            patch_size = 2 ** len(vae["block_out_channels"])  # all but one halve, and a token is 2 x 2
            return {
                "rank": 4 * vae["latent_channels"],
                "patch_size": patch_size,
                "prompt_width": 3 * text["hidden_size"],
            }
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"--base {base} is not a folder of FLUX.2 klein in the layout of diffusers, with model_index.json, vae, "
            "text_encoder and tokenizer: give the folder that was downloaded from the Hub"
        ) from None
    raise InputError(f"--base {base} is no FLUX.2 klein: its vae is {kinds[0]}, its text_encoder {kinds[1]}")


def folder_digest(folder: Path) -> str:
    """SHA-256 of the names and contents of the files in a folder."""
    paths = sorted(path for path in folder.glob("*") if path.is_file() and not path.name.startswith("."))
    return hashlib.sha256("".join(f"{path.name} {files.sha256(path)}\n" for path in paths).encode()).hexdigest()
