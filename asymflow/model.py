"""`AsymFlow`: any network on tokens becomes a velocity model of images."""

import inspect
import json
import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from torch import Tensor, nn

from asymflow import backbones, files, opening
from asymflow.conditions import forward_parameters, unwrapped
from asymflow.errors import InputError
from asymflow.extensions import find
from asymflow.hub import GAVE_NOTHING
from asymflow.numerics import at_least_float32, has_float64, no_autocast
from asymflow.parameterization import calibration, recover_velocity
from asymflow.patches import CHANNEL_LAST, check_patch_size, check_token_order, patchify, token_grid, unpatchify
from asymflow.subspace import Subspace

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
CLASSES = "classes.json"  # the names of the classes, by number; written by the commands, not by `save_pretrained`
FORMAT = "asymflow 1"
OPTIONS, RECORD = ("patch_size", "token_order", "sigma_min", "noise_scale"), ("color_space", "fitted_on")
HUB_OPTIONS = inspect.signature(hf_hub_download).parameters.keys() - {"repo_id", "filename"}
SPECTRUM = "subspace.spectrum"
SIGMA_MIN_TRAINING = 1e-6
MODEL_CARD = """---
{{ card_data }}
---

An asymmetric flow model (https://arxiv.org/abs/2605.12964), saved by the library asymflow.

    from asymflow import AsymFlow
    flow = AsymFlow.from_pretrained("THIS FOLDER OR REPOSITORY")
"""


class AsymFlow(
    nn.Module,
    ModelHubMixin,
    library_name="asymflow",
    tags=["asymflow", "flow-matching"],
    model_card_template=MODEL_CARD,
):
    """A velocity model of images: a backbone that predicts the asymmetric velocity of tokens, and its subspace.

    `flow(x_sigma, sigma, **conditions)` is the velocity u = eps - x0 at x_sigma = (1 - sigma) x0 + sigma eps
    (arXiv 2605.12964). Rank 0 is x0-prediction, rank D u-prediction; nothing else changes.

    backbone: any module with `forward(tokens (B, N, D), tau (B,), **conditions) -> (B, N, D)`. What it may have besides
        is listed in `asymflow.backbones`. A wrapper around it (torch.compile, DistributedDataParallel) changes neither
        what is read off it nor what is saved.
    subspace: for tokens of dimension D = channels * patch_size^2.
    patch_size, token_order: see `patchify`. By default those of the subspace, else of the backbone; else channel_last.
    sigma_min: in eval mode the velocity outside of the subspace is divided by max(sigma, sigma_min); in training mode,
        by max(sigma, 1e-6).
    noise_scale: the standard deviation of `eps` that the model is trained and sampled with; by default that of the
        backbone (JiT: 2 at 512 pixels), else 1. The model itself does not use it; samplers and training loops do.
    Raises InputError if these do not fit together.
    """

    def __init__(
        self,
        backbone: nn.Module,
        subspace: Subspace,
        patch_size: int | None = None,
        token_order: str | None = None,
        sigma_min: float = 0.04,
        noise_scale: float | None = None,
    ):
        super().__init__()
        inner = unwrapped(backbone)
        self.patch_size = agreed("patch_size", patch_size, subspace, inner)
        self.token_order = agreed("token_order", token_order, subspace, inner) or CHANNEL_LAST
        check_token_order(self.token_order)
        if self.patch_size is None:
            raise InputError("give AsymFlow a patch_size: neither the subspace nor the backbone has one")
        check_patch_size(self.patch_size)
        if subspace.dim % self.patch_size**2:
            raise InputError(
                f"a subspace of tokens of dimension {subspace.dim} does not fit patches of {self.patch_size} x "
                f"{self.patch_size} pixels: {subspace.dim} is not a multiple of {self.patch_size**2}"
            )
        noise_scale = getattr(inner, "noise_scale", 1.0) if noise_scale is None else noise_scale
        if not (0 <= sigma_min < math.inf and 0 < noise_scale < math.inf):
            raise InputError(
                f"sigma_min must be at least 0, noise_scale above 0, both finite, but they are {sigma_min} and "
                f"{noise_scale}"
            )
        self.backbone, self.subspace = backbone, subspace
        self.sigma_min, self.noise_scale = float(sigma_min), float(noise_scale)
        self.channels = subspace.dim // self.patch_size**2
        self.backbone_takes_grid = "grid" in forward_parameters(backbone)

    def forward(self, x_sigma: Tensor, sigma: Tensor | float, **conditions) -> Tensor | tuple:
        """The velocity at x_sigma (B, C, H, W), or a video (B, T, C, H, W), at the noise levels sigma (B,) in [0, 1].

        The result has the shape of x_sigma. It is in float32, or float64 if x_sigma or sigma is, even under autocast.
        conditions: passed on to the backbone; for JiT `labels` (B,), of which num_classes means "no class".
        Raises InputError if the image does not fit patch size or channels, there is not one sigma for each image, or it
        is a number outside of [0, 1] (a tensor, which may be on a GPU, is not looked at).
        """
        grid = token_grid(x_sigma, self.patch_size)
        if x_sigma.shape[-3] != self.channels:
            raise InputError(
                f"the model is for images of {self.channels} channels, but these have {x_sigma.shape[-3]} (their shape "
                f"is {tuple(x_sigma.shape)})"
            )
        if isinstance(sigma, int | float) and not 0 <= sigma <= 1:
            raise InputError(f"sigma is a noise level from 0 to 1, a thousandth of a timestep, but it is {sigma}")
        if not isinstance(sigma, Tensor):
            sigma = torch.tensor(sigma, dtype=at_least_float32(x_sigma))
        if sigma.dtype == torch.float64 and not has_float64(x_sigma.device):
            sigma = sigma.float()
        sigma = sigma.to(x_sigma.device, non_blocking=x_sigma.is_cuda)  # so that the CPU need not wait for the GPU
        if sigma.ndim > 1 or sigma.shape not in ((), x_sigma.shape[:1]):
            raise InputError(
                f"sigma must be one noise level for each of the {len(x_sigma)} images, but its shape is "
                f"{tuple(sigma.shape)}"
            )
        dtype = at_least_float32(x_sigma, sigma)
        with no_autocast(x_sigma):
            sigma = sigma.to(dtype).expand(len(x_sigma))
            tokens = patchify(x_sigma.to(dtype), self.patch_size, self.token_order)
            k, tau = calibration(sigma, self.subspace.scale)
            calibrated = (k[:, None, None] * tokens).to(self.backbone_dtype or dtype)
        if self.backbone_takes_grid:
            conditions["grid"] = grid
        output = self.backbone(calibrated, tau, **conditions)
        prediction, *others = output if isinstance(output, tuple) else (output,)
        shape = tuple(prediction.shape) if isinstance(prediction, Tensor) else type(prediction).__name__
        if shape != tuple(tokens.shape):
            raise InputError(
                f"the backbone must return tokens of the shape that it gets, {tuple(tokens.shape)}, alone or first "
                f"in a tuple, but it returned {shape}"
            )
        sigma_min = SIGMA_MIN_TRAINING if self.training else self.sigma_min
        velocity = recover_velocity(prediction.to(dtype), tokens, sigma, self.subspace, sigma_min)
        velocity = unpatchify(velocity, grid, self.patch_size, self.token_order)
        return (velocity, *others) if others else velocity

    @property
    def backbone_dtype(self) -> torch.dtype | None:
        """The attribute `dtype` of the backbone, else the dtype of its weights; None if it has neither."""
        if isinstance(dtype := getattr(unwrapped(self.backbone), "dtype", None), torch.dtype):
            return dtype
        for p in self.backbone.parameters():
            if p.is_floating_point():
                return p.dtype
        return None

    @property
    def config(self) -> dict:
        """The content of `config.json`: everything but the tensors."""
        inner = unwrapped(self.backbone)
        return {
            "format": FORMAT,
            "flow": {name: getattr(self, name) for name in OPTIONS},
            "tokens": {name: getattr(self.subspace, name) for name in ("dim", "rank", *RECORD)},
            "network": {"class": type(inner).__name__, "config": dict(getattr(inner, "config", {}))},
        }

    # ---- Saving and loading: config.json and model.safetensors, with huggingface_hub's mixin (it adds push_to_hub) ---
    def save_pretrained(self, save_directory: str | Path, **options) -> str | None:
        """Write `config.json`, `model.safetensors` (the subspace is in it) and a model card to a folder.

        options: see `huggingface_hub.ModelHubMixin.save_pretrained`. If it fails, files of an earlier model stay.
        An earlier card and names of classes stay in any case; a warning says so if there was another model.
        """
        folder = Path(save_directory).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        # In a temporary folder, because the mixin first removes config.json.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving") as temporary:
            beside = Path(temporary) / folder.name
            url = super().save_pretrained(beside, **options)
            kept = [name for name in (CARD, CLASSES) if (folder / name).is_file() and (folder / WEIGHTS).exists()]
            if CARD in kept and (folder / CARD).read_bytes() == (beside / CARD).read_bytes():
                kept.remove(CARD)
            for name in (WEIGHTS, CONFIG, CARD):
                if name != CARD or not (folder / CARD).exists():  # keep an old card: somebody may have edited it
                    (beside / name).replace(folder / name)
        if kept:
            named = " and ".join(str(folder / name) for name in kept)
            warnings.warn(f"{named}: kept from an earlier model: change or remove what is not of this", stacklevel=2)
        return url

    def _save_pretrained(self, save_directory: Path) -> None:
        try:
            text = json.dumps(self.config, indent=2) + "\n"
        except (TypeError, ValueError) as e:
            raise InputError(f"the backbone's config cannot be written to {CONFIG}: {e}") from None
        (save_directory / CONFIG).write_text(text, encoding="utf-8")
        inner = unwrapped(self.backbone)
        if not hasattr(inner, "config"):
            name = type(inner).__name__
            warnings.warn(
                f"{name} has no `config`, a dict of what it was made with: the saved model does not say how to make it "
                "again for from_pretrained(..., backbone=...)",
                stacklevel=2,
            )
        spectrum = {} if self.subspace.spectrum is None else {SPECTRUM: self.subspace.spectrum}
        others = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("backbone.")}
        files.write_tensors(save_directory / WEIGHTS, others | inner.state_dict(prefix="backbone.") | spectrum)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        backbone: nn.Module | Callable[..., nn.Module] | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        **hub_options,
    ) -> "AsymFlow":
        """A model in eval mode, from a folder that `save_pretrained` wrote or a repository of the Hugging Face Hub.

        backbone: its class, or a module to load the weights into. Required if the class is not in this library.
        dtype: of the backbone's weights; by default as in the file.
        hub_options: revision, token, cache_dir, ... of a repository. Of a folder here only subfolder counts.
        Nothing is ever unpickled, and no code is loaded. Raises InputError if a file is missing or damaged, or a tensor
        is missing, unexpected or misshaped.
        """
        if unknown := hub_options.keys() - HUB_OPTIONS:
            raise TypeError(f"from_pretrained has no options {', '.join(sorted(unknown))}")
        # Not with the mixin's method: it reads config.json itself first, and passes parts of it on as arguments.
        folder = Path(pretrained_model_name_or_path)
        try:
            if not folder.is_dir():
                name = str(pretrained_model_name_or_path)
                paths = [Path(hf_hub_download(name, file, **hub_options)) for file in (CONFIG, WEIGHTS)]
            else:
                own = folder / (hub_options.get("subfolder") or "")
                paths = [own / CONFIG, own / WEIGHTS]
        except GAVE_NOTHING as e:
            reason = " ".join(str(e).split()) or type(e).__name__
            raise InputError(f"{folder} is neither a folder here nor a model that the Hub gave: {reason}") from None
        flow = build(read_config(paths[0]), opening.read_tensors(paths[1])[0], backbone, source=str(paths[1]))
        if dtype is not None:
            flow.backbone.to(dtype)
        return flow.to(device).eval()


def build(
    config: dict, tensors: dict[str, Tensor], backbone: nn.Module | Callable[..., nn.Module] | None, source: str
) -> AsymFlow:
    """Make the model that `config` describes, with exactly these tensors."""
    plain = lambda name: name.replace("_orig_mod.", "")  # which torch.compile puts into names
    tensors = {plain(name): tensor for name, tensor in tensors.items()}
    try:
        options, tokens, network = config["flow"], config["tokens"], config["network"]
        if not isinstance(backbone, nn.Module):
            with opening.no_larger_than(len(tensors), source):
                backbone = make_backbone(network["class"], network["config"], backbone)
        inner = unwrapped(backbone)
        shapes = {f"backbone.{plain(name)}": tuple(t.shape) for name, t in inner.state_dict().items()}
        shapes |= {"subspace.basis": (tokens["dim"], tokens["rank"]), "subspace.scale": ()}
        shapes |= {SPECTRUM: (tensors[SPECTRUM].numel(),)} if SPECTRUM in tensors else {}  # any length is right
        opening.check_tensors(tensors, shapes, source)
        own = {f"backbone.{plain(name)}": t.dtype for name, t in inner.state_dict().items()}
        floating = {name for name, dtype in own.items() if dtype.is_floating_point and dtype.itemsize > 1}
        numbers = {name: t for name, t in tensors.items() if name in floating or name.startswith("subspace.")}
        opening.check_numbers(numbers, source, finite=False)
        subspace = Subspace(
            tensors["subspace.basis"],
            tensors["subspace.scale"],
            patch_size=options["patch_size"],
            token_order=options["token_order"],
            spectrum=tensors.get(SPECTRUM),
            **{name: tokens[name] for name in RECORD},
        )
        flow = AsymFlow(backbone, subspace, **{name: options[name] for name in OPTIONS})
    except InputError as e:
        raise e if str(e).startswith(source) else InputError(f"{source}, with the {CONFIG} beside it: {e}") from None
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, OverflowError) as e:
        raise InputError(f"{source}: the {CONFIG} beside it does not describe an asymmetric flow ({e!r})") from None
    own = inner.state_dict(keep_vars=True)
    weights = {name: tensors[f"backbone.{plain(name)}"] for name in own}
    for name, weight in own.items():
        if not weight.is_meta:  # the user's own module: change its weights in place, so that tied ones stay tied
            weight.data = weight.data.to(weights[name].dtype)
    inner.load_state_dict(weights, assign=any(weight.is_meta for weight in own.values()))
    return flow


def make_backbone(name: str, config: dict, own: Callable[..., nn.Module] | None = None) -> nn.Module:
    """A backbone whose weights will come from a file. own: its class, if not one of this library."""
    if own is None and name not in backbones.TABLE:
        sizes = f", with {config!r}," if config else ""
        raise InputError(
            f"the model has a backbone of the class {name}, which this library does not have: make one yourself{sizes} "
            "and pass it, or its class, as from_pretrained(..., backbone=); to a command with that option, as "
            f"--backbone package.module:{name}"
        )
    if isinstance(own, type) and own.__name__ != name:
        raise InputError(f"the model has a backbone of the class {name}, but {own.__name__} was given for it")
    if own is not None:  # not on the meta device: it may compute buffers that are in no file, such as positions
        return own(**config)
    with torch.device("meta"):  # initializes no weights, and allocates no memory for them
        return find(name, backbones.TABLE, "the backbone")(**config)


def read_config(path: Path) -> dict:
    config = opening.read_json(path)
    if config.get("format") != FORMAT:
        raise InputError(f'{path} is not the configuration of an asymmetric flow: it has no "format": "{FORMAT}"')
    return config


def agreed(name: str, given: object, subspace: Subspace, backbone: nn.Module) -> object:
    """The value of an option: as given, or as the subspace or the backbone has it. InputError if any two differ."""
    sources = {
        "the argument": given,
        "the subspace": getattr(subspace, name),
        "the backbone": getattr(backbone, name, None),
    }
    known = {source: value for source, value in sources.items() if value is not None}
    if len(set(known.values())) > 1:
        raise InputError(f"{name} differs: " + ", ".join(f"{value} by {source}" for source, value in known.items()))
    return next(iter(known.values()), None)
