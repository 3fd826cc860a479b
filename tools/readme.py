"""Make README.md from nbs/index.ipynb:  python tools/readme.py

The links of the index are right where a reader of the index stands, in nbs/; here they are made
right for a reader of README.md, in the root. Quarto is not needed.
"""

import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\(|src=\"|href=\")(?![a-z]+:|#|/)([^)\"#\s]+)")
NOTE = "<!-- Made from nbs/index.ipynb by `make readme`; change it there. -->\n\n"


def visible(cell: dict) -> bool:
    "Is the cell meant for readers?"
    return not re.match(r"#\| (hide|default_exp)", cell.source)


def from_root(link: str, root: Path = ROOT) -> str:
    "The same file, seen from the root instead of from nbs/."
    inside = (root / "nbs" / link).resolve()
    return inside.relative_to(root).as_posix() if inside.exists() else link


def make(index: Path = ROOT / "nbs" / "index.ipynb") -> str:
    "The text of README.md."
    notebook = nbformat.read(index, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if visible(cell)]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    if resources.get("outputs"):
        raise ValueError("the index stores a picture as a cell's output; link to a file instead")
    text = LINK.sub(lambda match: match[1] + from_root(match[2]), text)
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return NOTE + re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(make(), encoding="utf-8", newline="\n")
