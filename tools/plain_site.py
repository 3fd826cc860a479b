"""A plain site without Quarto: pandoc alone, from the package pypandoc_binary, makes each page.

Quarto turns a notebook into Markdown and gives it to pandoc; so does this, with the same options.
What is missing is what Quarto adds: the theme, the sidebar, the search.
"""

import html
import json
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

OPTIONS = ["--from=markdown", "--to=html5", "--mathml", "--standalone", "--section-divs"]
OPTIONS += ["--wrap=none", "--fail-if-warnings"]
TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title$</title>
<meta name="description" content="$description$">
<link rel="icon" href="$up$favicon.svg">
<style>
$highlighting-css$
body { margin: 0; color: #1b1f23; background: #fff; font: 17px/1.5 system-ui, sans-serif; }
nav, main { max-width: 850px; margin: 0 auto; padding: 0.5rem 12px; overflow-wrap: break-word; }
nav { display: flex; flex-wrap: wrap; gap: 0.3rem 1rem; }
h1, h2, h3, h4 { line-height: 1.2; }
pre, code { font: 0.875em/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
pre code { font-size: 1em; }
div.sourceCode, .cell-code pre { background: #f3f6f9; padding: 0 0.4rem; border-radius: 4px; }
pre.sourceCode, pre.sourceCode code { white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; margin-bottom: 1rem; }
td, th { padding: 0.3rem 0.5rem; border-bottom: 1px solid #c5ccd3; text-align: left; }
blockquote { margin-left: 1rem; }
.sourceCode :is(.co, .an, .cv, .in, .wa) { color: #3b6470; }
.sourceCode :is(.dv, .fl, .bn) { color: #1f6f46; }
.sourceCode :is(.st, .sc, .ch, .vs) { color: #2f5f92; }
.sourceCode .ss { color: #9b3d66; }
.sourceCode .at { color: #5c6b12; }
.sourceCode .pp { color: #8a5800; }
.sourceCode .op { color: #555; }
body.quarto-dark { color: #eef1f4; background: #222; }
body.quarto-dark div.sourceCode { background: #2b3138; }
body.quarto-dark .sourceCode span { color: inherit; }
body.quarto-dark nav a { color: #8cc4ff; }
</style>
<link rel="stylesheet" href="$up$site.css">
</head>
<body>
<script>
if (matchMedia("(prefers-color-scheme: dark)").matches) document.body.classList.add("quarto-dark");
</script>
<nav aria-label="Pages"><a href="$up$index.html">All lessons</a>
<a href="$up$start.html">Start</a> <a href="$up$glossary.html">Glossary</a>
<a href="$up$api/index.html">Functions</a> <a href="$up$troubles.html">Troubles</a></nav>
<main>
<header id="title-block-header"><h1 class="title">$title$</h1>
<p class="description">$description$</p></header>
$body$
</main>
$for(include-after)$$include-after$$endfor$
</body>
</html>
"""


def pandoc() -> str:
    "The program; '' where it is not installed."
    try:
        import pypandoc

        return pypandoc.get_pandoc_path()
    except (ImportError, OSError):
        return shutil.which("pandoc") or ""


def fenced(text: str, attributes: str = "") -> str:
    "Text as it is, between fences that do not occur in it."
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{attributes and ' ' + attributes}\n{text.rstrip(chr(10))}\n{ticks}"


def raw(text: str) -> str:
    return f"```{{=html}}\n{text}\n```"


def options(source: str) -> tuple:
    "What stands behind `#|` on the first lines of a cell, and the code below."
    import yaml

    head = re.match(r"(?:#\|.*\n?)*", source)[0]
    said = "\n".join(line[2:].strip() for line in head.splitlines())
    return yaml.safe_load(said) or {}, source[len(head) :].strip("\n")


def output(one: dict) -> str:
    "An output of a cell."
    data = one.get("data", {})
    if "text/markdown" in data:
        kind, text = "display", "".join(data["text/markdown"])
    else:
        kind, text = "stdout", fenced("".join(one.get("text", "") or data["text/plain"]))
    return f":::: {{.cell-output .cell-output-{kind}}}\n{text}\n::::"


def code_cell(cell: dict) -> str:
    "Code, in a fold if the cell says so, and its outputs below."
    said, code = options(cell["source"])
    parts = []
    if said.get("echo", True) and code:
        parts = [fenced(code, "{.python .cell-code}")]
    if said.get("code-fold") and parts:
        summary = html.escape(str(said.get("code-summary", "Code")), quote=False)
        top = f'<details class="code-fold"><summary>{summary}</summary>'
        parts = [raw(top), *parts, raw("</details>")]
    parts += [output(one) for one in cell["outputs"]]
    classes = f".cell .{said['classes']}" if "classes" in said else ".cell"
    return f"::::: {{{classes}}}\n" + "\n\n".join(parts) + "\n:::::" if parts else ""


def as_markdown(path: Path) -> str:
    "What pandoc gets of a prepared page."
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = [code_cell(c) if c["cell_type"] == "code" else c["source"] for c in cells]
    return "\n\n".join(filter(None, parts)) + "\n"


def url(path: Path, text: str) -> str:
    "The name of its page."
    found = re.search(r'^output-file: "(.*)"$', text, flags=re.M)
    return found[1] if found else path.with_suffix(".html").name


def render(path: Path, proc: Path, docs: Path, template: Path) -> list:
    "Make one page; returns what pandoc complains about."
    text = as_markdown(path)
    folder = path.parent.relative_to(proc)
    target = docs / folder / url(path, text)
    target.parent.mkdir(parents=True, exist_ok=True)
    up = "../" * len(folder.parts)
    after = (proc / "scripts.html").as_posix()
    command = [pandoc(), *OPTIONS, f"--template={template}", f"--variable=up:{up}"]
    command += [f"--include-after-body={after}", f"--output={target}"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, encoding="utf-8")
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return [f"{path.name}: pandoc: {line}" for line in said] if done.returncode or said else []


def make_site(proc: Path, docs: Path) -> list:
    "All pages of `proc`, as HTML in `docs`; returns complaints."
    shutil.rmtree(docs, ignore_errors=True)
    docs.mkdir(parents=True)
    template = proc / "plain.html"
    template.write_text(TEMPLATE, encoding="utf-8")
    for name in ("site.css", "favicon.svg", "card.png", "llms.txt"):
        shutil.copy(proc / name, docs / name)
    pages = sorted([*proc.glob("*.ipynb"), *proc.glob("**/*.qmd")])
    with ThreadPoolExecutor(2) as pool:
        said = pool.map(lambda page: render(page, proc, docs, template), pages)
        return [line for lines in said for line in lines]
