"""A hook of mkdocs: formulas become MathML, so that pages need neither JavaScript nor a network for them."""

import html
import re

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(text: str, **_) -> str:
    """Called with the HTML of each page, in which pymdownx.arithmatex has marked the formulas."""
    return FORMULA.sub(to_mathml, text)


def to_mathml(formula: re.Match) -> str:
    tag, opening, latex = formula.groups()
    display = "block" if opening == "[" else "inline"
    return f'<{tag} class="math">{convert(html.unescape(latex), display=display)}</{tag}>'
