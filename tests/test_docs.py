"""What a reader meets first: no dead link in any page, versions that agree, targets that exist, the size."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from eclipse_ray import __version__

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("cluster/*.md")]
# Pages that only the site has.
GENERATED = {"commands.md", "settings.md", "tutorial.md"}


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_has_a_dead_link(page):
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or path in GENERATED:
            continue
        found = (page.parent / path).resolve() if path else page
        if not found.exists():
            dead.append(target)
        elif anchor and found.suffix == ".md" and not anchor.startswith("eclipse_ray."):
            dead += [] if anchor in anchors(found) else [target]
    assert not dead


def test_the_version_is_one():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readmes_make_targets_exist_and_are_listed():
    makefile = (ROOT / "Makefile").read_text()
    listed = set(re.findall(r"^([a-z]+):.*## ", makefile, re.M))
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z]+)", page.read_text(encoding="utf-8"))) <= listed, page.name


def test_pictures_are_small():
    assert all(picture.stat().st_size < 300 * 1024 for picture in (ROOT / "docs" / "images").iterdir())


def test_the_size_counts_the_fields_of_sections_and_not_the_sections():
    specification = importlib.util.spec_from_file_location("size", ROOT / "tools" / "size.py")
    size = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(size)

    class Inner(BaseModel):
        depth: int = 1
        steps: int = 1

    class Whole(BaseModel):
        inner: Inner = Inner()
        name: str = ""

    assert size.of_sections(Whole) == 3
    assert size.python_files("tools")[0] == len(list((ROOT / "tools").rglob("*.py")))
