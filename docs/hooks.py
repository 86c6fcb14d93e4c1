"""What the documentation site adds to the pages in docs/: pages made from other files, their links, and formulas."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import rlhf

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
COPIES = {  # page of the site -> file of the repository
    "index.md": ROOT / "README.md",
    "benchmarks.md": ROOT / "benchmarks" / "RESULTS.md",
    "changelog.md": ROOT / "CHANGELOG.md",
    "contributing.md": ROOT / "CONTRIBUTING.md",
}
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
FORMULA = re.compile(r"^```math\n(.*?)^```$|(?<![\\`$\w])\$([^$`\n]+)\$(?![\w$])", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^\[`(\w+)`\]\(([^)]+\.py)\)$", re.MULTILINE)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".cfg": "ini"}
REFERENCE = {  # heading -> public names
    "The pipeline": ("pipeline",),
    "Modules": ("SFTModule", "RewardModule", "PPOModule", "DPOModule"),
    "Data": ("SFTDataModule", "PreferenceDataModule", "RolloutDataModule", "Source", "TextFormat"),
    "Settings": ("PPOSettings", "DPOSettings", "Optimization", "LoRA"),
    "Experience": ("Rollout",),
    "Callbacks and strategy": ("Export", "Invariants", "LastCheckpoint", "Zero2Strategy"),
    "Models": ("register_reward_model",),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made from other files, and one for every other file that a page links to."""
    copies = {page: file.read_text() for page, file in COPIES.items() if file.exists()}
    texts = copies | {"mutations.md": _mutations(), "reference.md": _reference()}
    pages = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    for page, text in [*pages, *copies.items()]:
        for target in _targets(text, page):
            if (name := _page_of(target)).startswith("source/"):
                texts[name] = _source(target)
    for page, text in texts.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links to files of the repository at their pages, and turns formulas into MathML."""
    name = page.file.src_uri
    if name.startswith("source/"):
        return markdown

    def point(found: re.Match[str]) -> str:
        target = _resolved(found[1], name)
        if not target.is_file():
            return found[0]  # MkDocs reports it
        return f"]({os.path.relpath(_page_of(target), Path(name).parent)}{found[2] or ''})"

    return FORMULA.sub(_mathml, LINK.sub(point, CODE.sub(_code, markdown)))


def _mathml(formula: re.Match[str]) -> str:
    return convert(formula[1].strip(), display="block") if formula[1] else f"<span>{convert(formula[2])}</span>"


def _code(found: re.Match[str]) -> str:
    """Shows a function that a line of its own links to, without its docstring."""
    text = (DOCS / found[2]).read_text()
    (function,) = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == found[1])
    lines = text.splitlines()
    signature = lines[function.lineno - 1 : function.body[0].lineno - 1]
    body = lines[function.body[1].lineno - 1 : function.end_lineno]
    return "\n".join(["```python", *signature, *body, "```"])


def _resolved(link: str, page: str) -> Path:
    """Returns the file that a link on a page means, as the page's source stands in the repository."""
    return (COPIES.get(page, DOCS / page).parent / link).resolve()


def _targets(text: str, page: str) -> Iterator[Path]:
    """Yields the files that a page links to."""
    yield from (file for found in LINK.finditer(text) if (file := _resolved(found[1], page)).is_file())


def _page_of(file: Path) -> str:
    """Returns where a file of the repository is on the site."""
    for page, copied in COPIES.items():
        if file == copied:
            return page
    return str(file.relative_to(DOCS) if file.is_relative_to(DOCS) else Path("source", f"{file.relative_to(ROOT)}.md"))


def _source(file: Path) -> str:
    language = LANGUAGES.get(file.suffix, "text")
    return (
        f"---\nsearch: {{exclude: true}}\n---\n# {file.relative_to(ROOT)}\n\n````{language}\n{file.read_text()}\n````\n"
    )


def _reference() -> str:
    """Writes the page of all public names, whose docstrings mkdocstrings shows."""
    left = {*rlhf.__all__} - {name for names in REFERENCE.values() for name in names}
    if left:
        raise ValueError(f"docs/hooks.py: REFERENCE lacks {sorted(left)}.")
    parts = ["# API reference\n\nWhat `from rlhf import ...` offers. Other import paths may move.\n"]
    for heading, names in REFERENCE.items():
        parts += [f"## {heading}\n", *(f"::: rlhf.{rlhf._HOME[name]}.{name}\n" for name in names)]
    return "\n".join(parts)


def _mutations() -> str:
    """Writes the page of the mutants and the tests that notice them."""
    mutants = yaml.safe_load((ROOT / "benchmarks" / "mutants.yaml").read_text())
    rows = [
        f"| {m['detail']} | {m['name']} | {m['breaks']} | `{m['file']}` | {', '.join(f'`{t}`' for t in m['tests'])} |"
        for m in mutants
    ]
    return "\n".join([
        "# The mutation check",
        "",
        f"Each of these {len(mutants)} mutants breaks one detail of [the ledger](details.md), or (R) the promise that "
        "nothing is lost, in a copy of the tree; the last column names the tests that must notice. "
        "`python benchmarks/mutations.py` tries them all; they stand in `benchmarks/mutants.yaml`.",
        "",
        "| detail | mutant | what it breaks | file | noticed by |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ])  # fmt: skip
