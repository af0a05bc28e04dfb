"""Add a poison or a defense: a file that works, its test, and the lines that make it known.

python tools/new.py poison NAME
python tools/new.py defense NAME

The example passes every check, so each step from there to yours is a small one: change the function, then the
test that it breaks, then a row of docs/poisons.md or docs/defenses.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

TEMPLATES = Path(__file__).resolve().parent / "templates"


def main() -> None:
    """Write the files; exit 2 with one sentence for a name that cannot be or is taken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("name", help="lower case, as it is typed: mine, or my-defense")
    parser.add_argument("--root", type=Path, default=TEMPLATES.parents[1], help="the repository")
    arguments = parser.parse_args()
    try:
        made = KINDS[arguments.kind](arguments.root, arguments.name)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    tests = made[-1]
    print("\n".join(f"written: {path}" for path in made))
    print(f"next: python -m pytest {tests}")


def new_poison(root: Path, name: str) -> list[str]:
    """Write a closed-form poison within an L-inf bound, and its test; return what was written or changed."""
    if not re.fullmatch(r"[a-z][a-z0-9]*", name):
        raise ValueError(f"{name}: name a poison with small letters and digits")
    files = _write(root, name, "poison", "poisons")
    const = name.upper()
    budget = root / "eclipse_ray/poisons/budget.py"
    number = 1 + max(
        int(slot) for slot in re.findall(r"^\w+_T = 2\*\*30 \+ (\d+) \* 2\*\*16$", budget.read_text(), re.M)
    )
    _after_last(budget, r"^\w+_T = 2\*\*30 \+ .*$", f"{const}_T = 2**30 + {number} * 2**16")
    proof = root / "eclipse_ray/config/sections.py"
    _replace(proof, r"(PoisonName = Literal\[[^\]]*)\]", rf'\1, "{name}"]')
    _replace(proof, r'(self\.name not in \("urp"[^)]*)\)', rf'\1, "{name}")')
    package = root / "eclipse_ray/poisons/__init__.py"
    _insert_import(package, f"from eclipse_ray.poisons.{name} import {name}_perturbation")
    _replace(
        package,
        r"(POISONS: dict\[str, Poison\] = \{\n(?:    .*\n)*)\}",
        rf'\1    "{name}": {name}_perturbation,\n}}',
    )
    return [str(path.relative_to(root)) for path in (budget, proof, package)] + files


def new_defense(root: Path, name: str) -> list[str]:
    """Write a defense that changes the stored images, and its test; return what was written or changed."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ValueError(f"{name}: name a defense with small letters, digits and single hyphens")
    files = _write(root, name, "defense", "defenses")
    function = name.replace("-", "_")
    package = root / "eclipse_ray/defenses/__init__.py"
    _insert_import(package, f"from eclipse_ray.defenses.{function} import {function}")
    _replace(
        package,
        r"(DEFENSES: dict\[str, Defense\] = \{\n(?:    .*\n)*)\}",
        rf'\1    "{name}": Defense(transform={function}),\n}}',
    )
    return [str(package.relative_to(root)), *files]


KINDS = {"defense": new_defense, "poison": new_poison}


def _write(root: Path, name: str, kind: str, package: str) -> list[str]:
    function = name.replace("-", "_")
    targets = {
        f"{kind}.py.txt": f"eclipse_ray/{package}/{function}.py",
        f"test_{kind}.py.txt": f"tests/{package}/test_{function}.py",
    }
    for target in targets.values():
        if (root / target).exists():
            raise ValueError(f"{target} is there already; choose another name")
    for template, target in targets.items():
        text = (TEMPLATES / template).read_text(encoding="utf-8")
        for mark, value in {"@NAME@": name, "@FUNC@": function, "@CONST@": function.upper()}.items():
            text = text.replace(mark, value)
        (root / target).write_text(text, encoding="utf-8")
    return list(targets.values())


def _replace(path: Path, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, path.read_text(encoding="utf-8"), count=1)
    if not count:
        raise ValueError(f"{path}: the place to add a name was not found; tools/new.py has to follow that file")
    path.write_text(text, encoding="utf-8")


def _after_last(path: Path, pattern: str, line: str) -> None:
    text = path.read_text(encoding="utf-8")
    found = list(re.finditer(pattern, text, re.M))
    if not found:
        raise ValueError(f"{path}: the place to add a line was not found; tools/new.py has to follow that file")
    end = found[-1].end()
    path.write_text(f"{text[:end]}\n{line}{text[end:]}", encoding="utf-8")


def _insert_import(path: Path, line: str) -> None:
    """Insert an import where isort would have it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    places = [index for index, text in enumerate(lines) if text.startswith("from eclipse_ray.")]
    later = [index for index in places if lines[index].split()[1] > line.split()[1]]
    lines.insert(later[0] if later else places[-1] + 1, line)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
