"""report.html: one file that needs neither a network nor a server."""

import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from time import strftime
from typing import Any

import yaml

import rlhf
from rlhf import files
from rlhf.report.headline import headline
from rlhf.report.model_card import LIBRARIES, settings_that_matter
from rlhf.report.page import SAMPLES, Page
from rlhf.report.run_folders import TABLES
from rlhf.report.runs import Run

COMMANDS = ("report", "pipeline", "scaling")  # of the command line, that end with this page


def render(page: Page, runs: Sequence[Run], samples: Mapping[str, Any] | None = None) -> str:
    """Makes the page of everything that was collected, with its charts, scripts and styles in it.

    Args:
        page: what was collected.
        runs: for their settings.
        samples: of the browser of samples; None: no such section.
    """
    from jinja2 import Environment, PackageLoader
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    from rlhf.report.charts import specs

    # Neither HTML, links nor images: what a name or a finding contains is text and asks for nothing.
    to_html = MarkdownIt("zero", {"breaks": True}).enable(
        ["emphasis", "backticks", "list", "heading", "newline", "blockquote"]
    )
    environment = Environment(
        loader=PackageLoader("rlhf.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["markdown"] = lambda text: Markup(to_html.render(text))
    sentence, numbers = headline(page.tables)
    return environment.get_template("page.html").render(
        sentence=sentence,
        numbers=numbers,
        sections=[section for section in page.sections() if not samples or section.title != SAMPLES],
        specs=specs,
        samples=samples,
        settings=list(saved_settings(runs)),
        about=f"{_named(runs)}, {strftime('%Y-%m-%d %H:%M')}",
        versions={"rlhf": rlhf.__version__, **{name: version(name) for name in LIBRARIES}},
        command=_command(),
        libraries=Markup(_libraries()),
    )


def _named(runs: Sequence[Run]) -> str:
    tables = [name for run in runs if run.size == TABLES for name in run.policies]
    seeds = dict.fromkeys(str(run.seed) for run in runs if run.size != TABLES)
    names = [*dict.fromkeys(run.size for run in runs if run.size != TABLES), *tables]
    return ", ".join(names) + (f", seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}" if seeds else "")


def _command() -> str:
    """Returns the command line that the user typed: of a pipeline, not that of its last stage."""
    typed = [os.environ.get(files.TYPED, ""), shlex.join(sys.argv[1:])]
    return next((f"python train.py {words}" for words in typed if words.startswith(COMMANDS)), "")


@cache
def _libraries() -> str:
    """Bundles the scripts that draw charts, which takes seconds."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


def saved_settings(runs: Iterable[Run]) -> Iterable[tuple[str, str, str]]:
    """Reads the settings that each stage was trained with: its name, the command that trains it again, and YAML."""
    for run in runs:
        for stage, folder in run.stages.items():
            file = Path(folder) / files.CONFIG
            if file.is_file():
                settings = settings_that_matter(yaml.safe_load(file.read_text()))
                command = shlex.join(["python", "train.py", "fit", "--config", str(file)])
                yield f"{run.size}, seed {run.seed}: {stage}", command, yaml.safe_dump(settings, sort_keys=False)
