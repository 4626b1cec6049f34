"""Asymmetric flow models (arXiv 2605.12964) for any backbone: the parameterization, subspaces, models and samplers."""

try:
    import huggingface_hub  # noqa: F401
    import safetensors  # noqa: F401
except ImportError as e:
    raise ImportError(f'asymflow needs {e.name}: pip install -e ".[library]"') from None

from asymflow.errors import InputError
from asymflow.fitting import auto_rank, fit_pca, fit_procrustes
from asymflow.model import AsymFlow
from asymflow.parameterization import asymmetric_velocity, calibration, recover_velocity
from asymflow.patches import patchify, unpatchify
from asymflow.published import load_published
from asymflow.sampling import generate, guided, image_noise, sample, sigma_grid, time_shift
from asymflow.subspace import Subspace

__all__ = [
    "AsymFlow",
    "InputError",
    "Subspace",
    "asymmetric_velocity",
    "auto_rank",
    "calibration",
    "fit_pca",
    "fit_procrustes",
    "generate",
    "guided",
    "image_noise",
    "load_published",
    "patchify",
    "recover_velocity",
    "sample",
    "sigma_grid",
    "time_shift",
    "unpatchify",
]
