"""How large the project is: modules and lines of the package, settings, lines of tests, public names.

PYTHONPATH=. python tools/size.py
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

import eclipse_ray
import eclipse_ray.defenses
import eclipse_ray.poisons
from eclipse_ray.config import Config

ROOT = Path(__file__).resolve().parents[1]


def python_files(folder: str) -> tuple[int, int]:
    """Return the number of Python files below `folder`, and of their lines."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / folder).rglob("*.py")]
    return len(texts), sum(len(text.splitlines()) for text in texts)


def of_sections(section: type[BaseModel]) -> int:
    """Return the number of settings of a section; of a section inside it, its fields are counted."""
    kinds = [field.annotation for field in section.model_fields.values()]
    return sum(of_sections(kind) if isinstance(kind, type(BaseModel)) else 1 for kind in kinds)


def of_files() -> int:
    """Return the number of settings that poisons and defenses declare in their files."""
    return sum(
        name in model.model_fields
        for model in _models(BaseModel)
        if model.__module__.startswith(("eclipse_ray.poisons", "eclipse_ray.defenses"))
        for name in inspect.get_annotations(model)
    )


def _models(parent: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for child in parent.__subclasses__():
        yield child
        yield from _models(child)


def main() -> None:
    """Print one line per measure."""
    modules, lines = python_files("eclipse_ray")
    measures = {
        "modules of the package": modules,
        "lines of the package": lines,
        "settings of the config's sections": of_sections(Config),
        "settings of single poisons and defenses": of_files(),
        "lines of tests": python_files("tests")[1],
        "public names": len(eclipse_ray.__all__),
    }
    for name, value in measures.items():
        print(f"{name:42}{value:>8,}")


if __name__ == "__main__":
    main()
