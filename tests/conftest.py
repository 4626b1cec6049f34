"""Settings for every test: the same examples on every machine, no deadline on a slow one, and one thread.

The tensors here are small: further threads would only wait for each other.
"""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("reproducible", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("reproducible")
