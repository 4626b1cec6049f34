"""The one error that means: what was given cannot be used. Its message says what, why, and what to do."""

import re


class InputError(ValueError):
    """Something that a user gave cannot be used. Command lines print the message, one line, instead of a traceback."""


def out_of_memory(e: BaseException) -> bool:
    """Whether a machine or a GPU has too little memory. Of torch, only some GPUs have an error of their own for it."""
    said = isinstance(e, RuntimeError) and re.search("out of memory|can't allocate memory", str(e))
    return isinstance(e, MemoryError) or bool(said)
