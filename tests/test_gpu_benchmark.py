"""The list of measurements for a GPU runs to its end on a few images, as it must in the minutes of a lent GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.timeout(600)
def test_the_list_is_done_part_by_part_and_never_twice(shared_data, tmp_path):
    command = [sys.executable, str(SCRIPT), "--cifar", str(shared_data / "cifar10")]
    command += ["--tap", str(shared_data / "tap-published"), "--out", str(tmp_path / "out"), "--tiny"]
    first = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert first.returncode == 0, first.stderr[-2000:]
    done = json.loads((tmp_path / "out" / "results.json").read_text())
    assert done["victim tap-published eclipse-against"]["train_images"] > 20
    assert done["victim clean-as-tap none"]["train_images"] == done["victim tap-published none"]["train_images"]
    assert done["speed paper 32x32"]["modes"]["eager float32"]["images_per_second"] > 0
    assert f"{len(done) - ('paper network' in done)} of " in first.stdout
    # Another folder takes over what the first one has. There is no time for the last, open-ended part.
    command[command.index("--out") + 1] = str(tmp_path / "next")
    command += ["--earlier", str(tmp_path / "out"), "--minutes", "0.5"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr[-2000:]
    kept = json.loads((tmp_path / "next" / "results.json").read_text())
    assert kept == done
