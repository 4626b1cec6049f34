"""The chat template of a base model is a program of somebody else."""

import copy

import pytest
from transformers import AutoTokenizer

from asymflow import InputError
from asymflow.templates import check_tokenizer

DOUBLED = "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
TEMPLATES = {
    "{{ raise_exception('no') }}": "TemplateError: no",
    "{% if %}": "TemplateSyntaxError",
    "{{ messages.x.y }}": "UndefinedError",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "SecurityError",
    "": "its chat template is missing",
    "hello": "leaves the prompt out",
    "{{ 'x' * 3000000000 }}": "MemoryError",
    DOUBLED: "MemoryError",
}
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "it takes more than 5 s"


@pytest.mark.parametrize(("template", "said"), [*TEMPLATES.items(), pytest.param(*ENDLESS, marks=pytest.mark.slow)])
def test_a_template_that_fails_or_takes_much_or_leaves_the_prompt_out_is_refused(pipeline, template, said):
    tokenizer = copy.deepcopy(pipeline.tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=f"base .*{said}") as error:
        check_tokenizer(tokenizer, "base")
    assert "\n" not in str(error.value)


def test_what_transformers_adds_to_templates_may_be_used(pipeline):
    tokenizer = copy.deepcopy(pipeline.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if not m.role %}{% break %}{% endif %}{{ m | tojson(indent=2) }}"
        "{% generation %}{{ strftime_now('%Y') ~ eos_token }}{% endgeneration %}{% endfor %}"
    )
    check_tokenizer(tokenizer, "base")


def test_a_tokenizer_without_its_file_is_refused(pipeline, tmp_path):
    """transformers makes an empty one of what is left, with a chat template that works."""
    pipeline.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("a cat")["input_ids"] == []
    with pytest.raises(InputError, match=r"base has no whole tokenizer: it cannot read 'a cat'. Is its tokenizer.json"):
        check_tokenizer(tokenizer, "base")
