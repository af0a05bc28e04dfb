"""How large the project is: modules and lines of the package, settings, lines of tests, public names."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

import eclipse_ray
from eclipse_ray.config import Config

ROOT = Path(__file__).resolve().parents[1]


def lines(folder: str) -> tuple[int, int]:
    """Return the number of Python files below `folder`, and of their lines."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / folder).rglob("*.py"))]
    return len(texts), sum(len(text.splitlines()) for text in texts)


def settings(section: type[BaseModel]) -> int:
    """Return the number of settings of a section; of a section inside it, its fields are counted."""
    kinds = [field.annotation for field in section.model_fields.values()]
    return sum(settings(kind) if isinstance(kind, type) and issubclass(kind, BaseModel) else 1 for kind in kinds)


def main() -> None:
    """Print one line per measure."""
    modules, package = lines("eclipse_ray")
    measures = {
        "modules of the package": modules,
        "lines of the package": package,
        "settings": settings(Config),
        "lines of tests": lines("tests")[1],
        "public names": len(eclipse_ray.__all__),
    }
    for name, value in measures.items():
        print(f"{name:24}{value:>8,}")


if __name__ == "__main__":
    main()
