"""The one error for mistakes of a user. Its message says what cannot be used, why, and what to do."""

import re
from unicodedata import category


class InputError(ValueError):
    """Something that a user gave cannot be used. Command lines print the message, one line, instead of a traceback."""

    def __str__(self) -> str:
        """The message, with escapes for what would break the line or move the cursor: it may quote a file's name."""
        return "".join(ascii(c)[1:-1] if category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in super().__str__())


def out_of_memory(e: BaseException) -> bool:
    """Whether an error says that the machine or a GPU has too little memory. Torch has no one type for all of these."""
    said = isinstance(e, RuntimeError) and re.search("out of memory|can't allocate memory", str(e))
    return isinstance(e, MemoryError) or bool(said)
