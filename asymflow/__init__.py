"""Asymmetric flow models (arXiv 2605.12964) for any backbone: the parameterization, subspaces, models and samplers."""

from importlib import import_module
from importlib.util import find_spec

from asymflow import packages

MODULES = {  # the module of each public name; imported on first use, so that `asymflow --help` does not wait for torch
    "AsymFlow": "model",
    "InputError": "errors",
    "Subspace": "subspace",
    "asymmetric_velocity": "parameterization",
    "auto_rank": "fitting",
    "calibration": "parameterization",
    "fit_pca": "fitting",
    "fit_procrustes": "fitting",
    "flow_matching_loss": "flow_matching",
    "generate": "sampling",
    "guided": "sampling",
    "image_noise": "sampling",
    "load_published": "backbones.jit.published",
    "noise_level": "flow_matching",
    "noisy": "flow_matching",
    "patchify": "patches",
    "recover_velocity": "parameterization",
    "sample": "sampling",
    "sigma_grid": "sampling",
    "time_shift": "sampling",
    "unpatchify": "patches",
    "without_some": "flow_matching",
}
__all__ = [*MODULES]


def __getattr__(name: str):
    try:
        if name not in MODULES:
            if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
            return import_module(f"{__name__}.{name}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(packages.advice(e) or str(e), name=e.name) from None
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES})
