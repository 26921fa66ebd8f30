"""README.md from nbs/index.ipynb: its markdown, its stored outputs, links that work from the repository root."""

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- made by scripts/readme.py from nbs/index.ipynb: edit the notebook -->\n\n"


def from_root(link: str) -> str:
    "A link as the README at the root needs it; in the notebook it is relative to nbs/."
    if re.match(r"(\w+:|#|/)", link):
        return link
    path = Path("nbs", link)
    return path.as_posix() if ".." not in path.parts else Path(*path.parts[2:]).as_posix()


def readme() -> str:
    "The README's text; images of outputs are written beside the notebook."
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    notebook.metadata.setdefault("language_info", {"name": "python"})
    hidden = re.compile(r"^#\|\s*(hide\b|echo:\s*false)", re.M)
    for cell in notebook.cells:
        if cell.cell_type == "code" and hidden.search(cell.source):
            cell.source, cell.outputs = "", cell.outputs if "echo" in cell.source else []
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    text = text.replace("```python\n\n```\n", "")
    for name, data in resources["outputs"].items():
        image = Path("nbs", "images", f"readme_{name}")
        (ROOT / image).parent.mkdir(exist_ok=True)
        if not (ROOT / image).is_file() or (ROOT / image).read_bytes() != data:
            (ROOT / image).write_bytes(data)
        text = text.replace(f"({name})", f"(images/readme_{name})")
    text = re.sub(r"(\]\()([^)\s]+)(\))", lambda m: m[1] + from_root(m[2]) + m[3], text)
    return NOTE + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    target, text = ROOT / "README.md", readme()
    if not target.is_file() or target.read_text(encoding="utf8") != text:
        target.write_text(text, encoding="utf8")
        sys.stdout.write("README.md written\n")
