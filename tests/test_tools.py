"""tools/new.py: what it writes works as it stands, and passes the checks of the repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"poison": "mine", "defense": "my-own"}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository's code with a new poison and a new defense."""
    root = tmp_path_factory.mktemp("repository")
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("eclipse_ray", "tests", "tools"):
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", root)
    for kind, name in NAMES.items():
        done = new(root, kind, name)
        assert done.returncode == 0, done.stderr
        assert "next: python -m pytest" in done.stdout
    return root


def new(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "new.py"), *words, "--root", str(root)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def run(root: Path, *words: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=root, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.chaos
def test_its_tests_pass_beside_those_of_the_names(copy):
    run(copy, "pytest", "-p", "no:cacheprovider", "tests/poisons/test_mine.py", "tests/defenses/test_my_own.py")


def test_it_is_styled_as_everything_else(copy):
    run(
        copy, "ruff", "check", "eclipse_ray/poisons", "eclipse_ray/defenses", "eclipse_ray/config", "tests/poisons"
    )
    run(copy, "ruff", "format", "--check", "eclipse_ray", "tests/poisons", "tests/defenses")


@pytest.mark.chaos
def test_it_is_typed(copy):
    run(copy, "mypy", "eclipse_ray/poisons", "eclipse_ray/defenses")


def test_a_name_that_is_taken_or_cannot_be_is_refused(copy):
    for words, said in {
        ("poison", "ar"): "there already",
        ("poison", "My Poison"): "small letters",
        ("defense", "iss_g"): "small letters",
    }.items():
        done = new(copy, *words)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr
