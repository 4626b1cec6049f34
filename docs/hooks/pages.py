"""A hook of mkdocs: formulas become MathML, which browsers draw without JavaScript, and source code is not searched."""

import html
import re

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)

SOURCE = '<details class="mkdocstrings-source"'


def on_page_content(text: str, **_) -> str:
    """Called with the HTML of each page, in which pymdownx.arithmatex has marked the formulas."""
    return FORMULA.sub(to_mathml, text).replace(SOURCE, f"{SOURCE} data-search-exclude")


def to_mathml(formula: re.Match) -> str:
    tag, opening, latex = formula.groups()
    display = "block" if opening == "[" else "inline"
    return f'<{tag} class="math">{convert(html.unescape(latex), display=display)}</{tag}>'
