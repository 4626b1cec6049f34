"""The chat template of a base model: a program of whoever made the model, in the language Jinja.

Jinja's sandbox keeps it from files and processes, but bounds neither its time nor its memory. So it first runs in a
process with limits; only what ends there in time runs in this one.
"""

import json
import os
import subprocess
import sys

from asymflow.errors import InputError

MOST_SECONDS = 5
"""Processor time that a template may take for one short prompt. Real ones take 0.2, with the start of Python."""
MOST_MEMORY = 2**30
"""Bytes of memory that it may take. Not on macOS and Windows, which do not limit it."""
CHILD = "from asymflow import templates; templates.run_as_child()"
PROMPT = "a cat"
OPTIONS = {"add_generation_prompt": True, "enable_thinking": False}


def check_tokenizer(tokenizer, base: object) -> None:
    """InputError unless a `transformers` tokenizer has its tokens, and a chat template that keeps the prompt.

    Without its file, transformers makes a tokenizer without tokens, which finds nothing in any prompt. A chat template
    is a program: it must work within limits.
    """
    if PROMPT not in tokenizer.decode(tokenizer(PROMPT)["input_ids"]):
        raise InputError(f"{base} has no whole tokenizer: it cannot read {PROMPT!r}. Is its tokenizer.json missing?")
    if not tokenizer.chat_template:
        raise InputError(f"{base} has no whole tokenizer: its chat template is missing")
    try:
        template, chat = tokenizer.get_chat_template(), [{"role": "user", "content": PROMPT}]
        run_limited(template, {**tokenizer.special_tokens_map, **OPTIONS, "messages": chat})
        text = tokenizer.apply_chat_template(chat, tokenize=False, **OPTIONS)
    except Exception as e:  # a program can raise many types of errors
        said = " ".join(str(e).split())[:200]
        raise InputError(f"{base} has a chat template that does not work ({type(e).__name__}: {said})") from None
    if PROMPT not in text:
        raise InputError(f"{base} has a chat template that leaves the prompt out: download the tokenizer again")


def run_limited(template: str, variables: dict) -> None:
    """Run a template in a process with limits. InputError if it fails, or does not end within them."""
    command = [sys.executable, "-c", CHILD]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    given = json.dumps([template, variables]).encode()
    try:
        limited = subprocess.run(command, env=environment, input=given, capture_output=True, timeout=6 * MOST_SECONDS)
    except subprocess.TimeoutExpired:
        raise InputError(f"it does not end within {6 * MOST_SECONDS} s") from None
    if limited.returncode != 0:
        said = limited.stderr.decode(errors="backslashreplace").strip().splitlines()
        raise InputError(said[-1] if said else f"it takes more than {MOST_SECONDS} s or {MOST_MEMORY:,} bytes")


def limit_this_process() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS))
    if sys.platform != "darwin":  # which refuses any limit of memory
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))


def run_as_child() -> None:
    """What the process with limits does; its exit code is 0 if the template works, and else it says why."""
    limit_this_process()
    try:
        run_here()
    except Exception as e:  # a program can raise many types of errors
        sys.exit(f"{type(e).__name__}: {e}"[:300])


def run_here() -> None:
    """Run the template and the variables that standard input has, with what `transformers` adds to Jinja."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Marks what an assistant says."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(why: str) -> None:
        raise jinja2.TemplateError(why)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = lambda x, **options: json.dumps(x, **options)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: form}
    template, variables = json.load(sys.stdin)
    environment.from_string(template).render(variables)
