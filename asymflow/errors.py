"""The one error that means: what was given cannot be used. Its message says what, why, and what to do."""


class InputError(ValueError):
    """Something that a user gave cannot be used. Command lines print the message, one line, instead of a traceback."""
