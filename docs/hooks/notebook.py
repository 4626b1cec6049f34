"""A hook of mkdocs: the notebook tour.ipynb becomes a page, tour.md, with the outputs and figures saved in it.

Nothing is run. As Markdown it is drawn like every other page: formulas, links and the search need no other packages.
"""

import base64
import json
from collections.abc import Iterator

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    figures: list[bytes] = []
    notebook = json.loads(files.src_uris["tour.ipynb"].content_string)
    page = "\n\n".join(part for cell in notebook["cells"] for part in parts(cell, figures))
    files.append(File.generated(config, "tour.md", content=page))
    for number, png in enumerate(figures, start=1):
        files.append(File.generated(config, figure_name(number), content=png))
    return files


def on_page_markdown(markdown: str, **_) -> str:
    """Other pages link to the notebook, because that link works on a code host, too."""
    return markdown.replace("tour.ipynb)", "tour.md)")


def figure_name(number: int) -> str:
    return f"tour_{number}.png"


def parts(cell: dict, figures: list[bytes]) -> Iterator[str]:
    """The pieces of Markdown of a cell. Its figures are added to `figures`."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield fenced("python", source)
    if printed := "".join(line for output in cell["outputs"] for line in output.get("text", [])):
        yield fenced("text", printed.rstrip())
    for output in cell["outputs"]:
        if png := output.get("data", {}).get("image/png"):
            figures.append(base64.b64decode(png))
            yield f"![Figure {len(figures)}]({figure_name(len(figures))})"


def fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
