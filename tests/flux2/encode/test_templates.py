"""The chat template of a base model is a program of somebody else."""

import copy
import time

import pytest

from asymflow import InputError
from asymflow.opening import check_chat_template

TEMPLATES = {
    "{{ raise_exception('no') }}": "TemplateError: no",
    "{% if %}": "TemplateSyntaxError",
    "{{ messages.x.y }}": "UndefinedError",
    "": "its chat template is missing",
    "hello": "leaves the prompt out",
    "{{ 'x' * 3000000000 }}": "multiplies",
    "{% for m in messages %}{{ m.content ~ 10 ** 10 ** 10 }}{% endfor %}": "multiplies",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_fails_or_leaves_the_prompt_out_is_refused(pipeline, template):
    tokenizer = copy.deepcopy(pipeline.tokenizer)
    check_chat_template(tokenizer, "base")
    tokenizer.chat_template, started = template, time.monotonic()
    with pytest.raises(InputError, match=f"base .*{TEMPLATES[template]}") as error:
        check_chat_template(tokenizer, "base")
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 5
