"""What mkdocs cannot do alone: generated pages, pages from outside docs/, and links to files of the repository."""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT))

# Files outside docs/ that are pages, by the name of the page.
OUTSIDE = {
    "cluster.md": ROOT / "cluster" / "README.md",
    "contributing.md": ROOT / "CONTRIBUTING.md",
    "changelog.md": ROOT / "CHANGELOG.md",
}
# Left out of the navigation as long as they are not written.
OPTIONAL = ("tuning.md", "audit.md", "report.md", "security.md", "scaling.md", "cluster.md")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_config(config: Any) -> Any:
    """Take pages that are not there yet out of the navigation."""
    config.nav = _without([page for page in OPTIONAL if not _source(page).is_file()], config.nav)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are generated, or lie elsewhere."""
    from mkdocs.structure.files import File

    pages = {"commands.md": commands(), "settings.md": settings(), "tutorial.md": tutorial()}
    pages |= {name: path.read_text(encoding="utf-8") for name, path in OUTSIDE.items() if path.is_file()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for file in list(files):
        # The notebook is shown as the page tutorial.md.
        if file.src_uri.endswith(".ipynb"):
            files.remove(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links at pages; a link to any other file of the repository becomes the file's name."""
    base = _source(page.file.src_uri).parent
    return LINK.sub(lambda match: _link(match, base), markdown)


def _link(match: re.Match[str], base: Path) -> str:
    picture, text, target = match.groups()
    path, _, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", target):
        return match[0]
    found = (base / path).resolve()
    pages = {outside.resolve(): name for name, outside in OUTSIDE.items()}
    name = pages.get(found) or (str(found.relative_to(DOCS)) if found.is_relative_to(DOCS) else None)
    if name == "tutorial.ipynb":
        name = "tutorial.md"
    if name is not None:
        return f"{picture}[{text}]({name}{'#' + anchor if anchor else ''})"
    # A file that is not there stays as it is, and the strict build says so.
    return text if found.exists() else match[0]


def commands() -> str:
    """Return the page of all verbs, made from their declarations: on the command line and in Python."""
    import eclipse_ray.verbs  # noqa: F401 - its functions are the verbs
    from eclipse_ray.parameters import VERBS

    parts = [
        "# Commands\n",
        "Made from the functions of `eclipse_ray/verbs.py`, like `eclipse-ray COMMAND --help`. `--json`, which "
        "every command has, prints one JSON object on standard output. From Python, the verbs are functions of "
        "`eclipse_ray` with the same names and defaults, and return a typed result "
        "([Python reference](reference.md)).\n",
    ]
    for group in dict.fromkeys(verb.group for verb in VERBS.values()):
        parts += [f"## {group}\n", *(_command(name, verb) for name, verb in VERBS.items() if verb.group == group)]
    return "\n".join(parts)


def _command(name: str, verb: Any) -> str:
    from eclipse_ray.cli import help_of
    from eclipse_ray.parameters import PLANS, declared

    arguments, options = [], []
    for parameter, one in declared(verb.function).values():
        said = _cell(help_of(one, parameter.default))
        default = parameter.default
        if parameter.kind is not parameter.KEYWORD_ONLY:
            arguments.append((one.metavar or parameter.name.upper(), said, ""))
            continue
        option = one.option or f"--{parameter.name.replace('_', '-')}"
        plain = default in (None, True, False) or default is parameter.empty
        options.append((f"{option} {one.metavar or ''}".strip(), said, "" if plain else f"`{default}`"))
    if verb.function in PLANS:
        options.append(
            ("--dry-run", f"Only say what would be done; in Python `{PLANS[verb.function].__name__}`.", "")
        )
    usage = " ".join(["eclipse-ray", name, *(shown for shown, *_ in arguments), "[OPTIONS]"])
    lines = [usage, "", *verb.examples, "", _in_python(verb.function)]
    return "\n".join(
        [
            f"### {name}\n",
            f"{inspect.getdoc(verb.function)}\n",
            "\n".join(f"    {line}".rstrip() for line in lines) + "\n",
            "| | | default |\n|---|---|---|",
            *(f"| `{shown}` | {said} | {default} |" for shown, said, default in [*arguments, *options]),
            "",
        ]
    )


def _in_python(function: Any) -> str:
    """Return the signature of a verb without types."""
    signature = inspect.signature(function)
    plain = [one.replace(annotation=one.empty) for one in signature.parameters.values() if one.name != "show"]
    shown = inspect.Signature(plain)
    returned = str(signature.return_annotation).replace("results.", "")
    return f"{function.__name__}{shown} -> {returned}"


def settings() -> str:
    """Return the page of all settings, made from the models of the configuration."""
    from eclipse_ray.config import PRESETS, RECIPES, Config
    from eclipse_ray.parameters import describe_section

    parts = [
        "# Settings\n",
        "Every setting of every command: in a YAML file (`--config`), or one by one (`--set section.key=value`, "
        "which wins). Made from `eclipse_ray/config/`, the one place with defaults. The resolved settings lie in "
        "`_eclipse/config.yaml` of every output and can be passed back with `--config`.\n",
    ]
    for section, field in Config.model_fields.items():
        model: Any = field.annotation
        parts += [f"## {section}\n", f"{(model.__doc__ or '').strip()}\n"]
        parts += ["| key | type | default | range | |\n|---|---|---|---|---|"]
        for one in describe_section(section):
            kind = one.kind.replace("|", "\\|")
            parts.append(f"| `{one.key}` | {kind} | `{one.default}` | {one.bounds} | {_cell(one.text)} |")
        parts.append("")
    parts += ["## Presets\n", "What `denoiser.preset` stands for; a key that is set wins.\n"]
    parts += [
        _group(name, {f"{s}.{k}": v for s, keys in tree.items() for k, v in keys.items()})
        for name, tree in PRESETS.items()
    ]
    parts += ["## Recipes\n", "What `victim.recipe` stands for.\n"]
    parts += [
        _group(name, {f"victim.{key}": value for key, value in keys.items()}) for name, keys in RECIPES.items()
    ]
    return "\n".join(parts)


def _group(name: str, values: dict[str, Any]) -> str:
    words = ", ".join(f"`{key}={json.dumps(value)}`" for key, value in values.items())
    return f"- **{name}**: {words or 'the defaults above'}"


def tutorial() -> str:
    """Return the notebook as a page; its code runs in the tests."""
    cells = json.loads((DOCS / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def _source(page: str) -> Path:
    return OUTSIDE.get(page, DOCS / page)


def _without(missing: list[str], nav: Any) -> Any:
    if isinstance(nav, list):
        kept = [_without(missing, item) for item in nav if item not in missing]
        return [item for item in kept if item]
    if isinstance(nav, dict):
        return {title: _without(missing, item) for title, item in nav.items() if item not in missing}
    return nav


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("\n", " ")
