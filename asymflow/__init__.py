"""Asymmetric flow models (arXiv 2605.12964) for any backbone: the parameterization, subspaces, models and samplers."""

try:
    import huggingface_hub  # noqa: F401
    import safetensors  # noqa: F401
except ImportError as e:
    raise ImportError(f'asymflow needs {e.name}: pip install -e ".[library]" ({e})') from None

from asymflow.errors import InputError
from asymflow.model import AsymFlow
from asymflow.parameterization import asymmetric_velocity, calibration, recover_velocity
from asymflow.patches import patchify, unpatchify
from asymflow.subspace import Subspace

__all__ = [
    "AsymFlow",
    "InputError",
    "Subspace",
    "asymmetric_velocity",
    "calibration",
    "patchify",
    "recover_velocity",
    "unpatchify",
]
