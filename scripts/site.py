"""The documentation site: every notebook as a page, with what it exports listed at its end.

    python scripts/site.py            builds it into _docs/
    python scripts/site.py --serve    builds it and serves it on the loopback

Notebooks become Markdown by nbconvert, mkdocs (Material) makes the pages; a broken link, an error among the outputs or a formula that
cannot be read ends the build. The site needs no network: formulas are MathML, fonts are the system's.
"""

import argparse
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml
from fastcore.docments import docments
from latex2mathml.converter import convert
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
SOURCE, PAGES, SITE = ROOT / "nbs", ROOT / "_proc" / "docs", ROOT / "_docs"
SECTIONS = {  # folder of nbs/ -> title, in the order of the site
    "": "Ground and doors",
    "data": "Data",
    "retreever": "ReTreever",
    "baselines": "Baselines",
    "search": "Search",
    "explore": "Explore",
    "mergers": "Mergers",
    "teacher": "Teacher",
    "totrm": "ToTRM",
    "hybrid": "Hybrid attention",
    "rag": "Hybrid RAG",
    "training": "Training",
    "evaluation": "Evaluation",
    "experiments": "Experiments",
}


def notebooks() -> list[Path]:
    "All notebooks, from nbs/, in reading order."
    found = [p.relative_to(SOURCE) for p in SOURCE.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(SOURCE).parts)]
    return sorted(found, key=lambda p: (p.parent.as_posix(), p.name))


def title_of(notebook: nbformat.NotebookNode) -> str:
    "The first heading."
    return next(m[1].strip() for c in notebook.cells if c.cell_type == "markdown" and (m := re.match(r"#\s+(.+)", c.source)))


def prepare(notebook: nbformat.NotebookNode, path: Path) -> str | None:
    "Takes out hidden cells and directives; returns the module that the notebook exports. Raises `ValueError` for an error among the outputs."
    module, kept = None, []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            directives = "\n".join(re.findall(r"^#\|.*$", cell.source, re.M))
            module = next(iter(re.findall(r"#\|\s*default_exp\s+(\S+)", directives)), module)
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
            if any(out.output_type == "error" for out in cell.outputs):
                raise ValueError(f"{path}: a cell shows an error:\n{cell.source[:300]}")
            if re.search(r"#\|\s*hide\b", directives) or not cell.source.strip():
                continue
            if re.search(r"#\|\s*echo:\s*false", directives):
                cell.source = ""
        kept.append(cell)
    notebook.cells = kept
    return module


CODE = re.compile(r"(^```.*?^```\s*$|^ {4}\S.*?$|`[^`\n]+`|<(?:table|style|div|svg|script)\b.*?</(?:table|style|div|svg|script)>)", re.M | re.S)


def formulas(text: str, path: Path) -> str:
    "TeX as MathML, outside code."

    def made(match: re.Match) -> str:
        block = match[1] is not None
        try:
            return convert((match[1] or match[2]).strip(), display="block" if block else "inline").replace("\n", " ")
        except Exception as e:
            raise ValueError(f"{path}: the formula {match[0]!r} cannot be read: {e}") from e

    parts = CODE.split(text)
    return "".join(
        p if i % 2 else re.sub(r"\$\$(.+?)\$\$|(?<![\\$\w])\$(?!\s)([^$\n]+?)(?<![\s\\])\$(?![\w$])", made, p, flags=re.S) for i, p in enumerate(parts)
    )


def links(text: str) -> str:
    "Links to notebooks as links to pages; what is not on the site is named only."

    def made(match: re.Match) -> str:
        target, anchor = match[2].partition("#")[::2]
        if re.match(r"\w+:", target) or not target:
            return match[0]
        if target.endswith(".ipynb"):
            return f"[{match[1]}]({target[: -len('.ipynb')]}.md{'#' + anchor if anchor else ''})"
        return match[0] if target.endswith((".png", ".md")) and "../data" not in target and "data/results" not in target else match[1]

    parts = CODE.split(text)
    return "".join(p if i % 2 else re.sub(r"(?<!!)\[([^\]\n]*)\]\(([^)\s]+)\)", made, p) for i, p in enumerate(parts))


def reference(module: str) -> str:
    "What a room exports: signatures, parameters, returns, from the docments."
    room, lines = importlib.import_module(f"hiernb.{module}"), []
    for name in getattr(room, "__all__", []):
        thing = getattr(room, name)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        lines += [f"### `{name}`", "", (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " "), ""]
        members = [(name, thing)]
        if inspect.isclass(thing):
            members += [(f"{name}.{k}", v) for k, v in vars(thing).items() if inspect.isfunction(v) and not k.startswith("_")]
        for label, f in members:
            try:
                given = docments(f, full=True, returns=True)
            except (ValueError, TypeError, OSError):
                continue
            rows = [(k, v) for k, v in given.items() if k not in ("self", "cls") and (v.get("docment") or k != "return")]
            if label != name:
                lines += [f"**`{label}`** {(inspect.getdoc(f) or '').split(chr(10) * 2)[0]}".replace("\n", " "), ""]
            if rows:
                lines += ["| parameter | default | |", "|---|---|---|", *(_row(k, v) for k, v in rows), ""]
    return "\n".join(["", "## Reference", "", f"`hiernb.{module}`", "", *lines]) if lines else ""


def _row(name: str, given: dict) -> str:
    "One parameter as a row of a table."
    default = given.get("default", inspect.Parameter.empty)
    shown = "" if default is inspect.Parameter.empty or name == "return" else f"`{str(default)[:60]}`".replace("|", "\\|")
    said = re.sub(r"\s+", " ", given.get("docment") or "").replace("|", "\\|").replace("<", "&lt;")
    return f"| {'*returns*' if name == 'return' else f'`{name}`'} | {shown} | {said} |"


def page(path: Path) -> str:
    "Writes one notebook's page; returns its title."
    notebook = nbformat.read(SOURCE / path, as_version=4)
    notebook.metadata.setdefault("language_info", {"name": "python"})
    title, module = title_of(notebook), prepare(notebook, path)
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    target = PAGES / path.with_suffix(".md")
    target.parent.mkdir(parents=True, exist_ok=True)
    for name, data in resources["outputs"].items():
        image = f"{path.stem}-{name}"
        target.with_name(image).write_bytes(data)
        text = text.replace(f"({name})", f"({image})")
    text = re.sub(r"^```python\n+```\n", "", text, flags=re.M)
    text = re.sub(r"<style scoped>.*?</style>", "", text, flags=re.S)
    target.write_text(links(formulas(text, path)) + (reference(module) if module else ""), encoding="utf8")
    return title


def build() -> None:
    "All pages, the configuration, the site."
    shutil.rmtree(PAGES, ignore_errors=True)
    nav, rooms = [{"Home": "index.md"}, {"Train a tree": "train.md"}], {folder: [] for folder in SECTIONS}
    for path in notebooks():
        title, folder = page(path), path.parent.as_posix() if path.parent.as_posix() != "." else ""
        if path.name not in ("index.ipynb", "train.ipynb"):
            rooms[folder].append({title: path.with_suffix(".md").as_posix()})
    nav += [{SECTIONS[folder]: pages} for folder, pages in rooms.items() if pages]
    shutil.copytree(SOURCE / "images", PAGES / "images", dirs_exist_ok=True)
    shutil.copy(ROOT / "scripts" / "site.css", PAGES / "site.css")
    toggle = [("default", "weather-night", "slate"), ("slate", "weather-sunny", "default")]
    palette = [
        {
            "scheme": s,
            "primary": "teal",
            "accent": "teal",
            "media": f"(prefers-color-scheme: {'dark' if s == 'slate' else 'light'})",
            "toggle": {"icon": f"material/{icon}", "name": f"to the {'dark' if other == 'slate' else 'light'} colours"},
        }
        for s, icon, other in toggle
    ]
    config = {
        "site_name": "hiernb",
        "site_description": "Hierarchical retrieval and reasoning, explained and tested in notebooks",
        "docs_dir": str(PAGES),
        "site_dir": str(SITE),
        "nav": nav,
        "use_directory_urls": False,
        "extra_css": ["site.css"],
        "plugins": ["search", "offline"],
        "strict": True,
        "validation": {"links": {"not_found": "warn", "anchors": "warn", "unrecognized_links": "warn"}},
        "theme": {
            "name": "material",
            "font": False,
            "palette": palette,
            "features": ["navigation.top", "navigation.footer", "toc.follow", "content.code.copy", "search.highlight"],
        },
        "markdown_extensions": ["tables", "attr_list", {"toc": {"permalink": True}}, "pymdownx.superfences", "pymdownx.highlight"],
    }
    settings = ROOT / "_proc" / "mkdocs.yml"
    settings.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf8")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--clean", "-f", str(settings)], check=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true", help="serve the site on the loopback when it is built")
    given = parser.parse_args()
    build()
    sys.stdout.write(f"{SITE.relative_to(ROOT)}: {len(list(SITE.rglob('*.html')))} pages\n")
    if given.serve:
        subprocess.run([sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(SITE), "8000"], check=False)
