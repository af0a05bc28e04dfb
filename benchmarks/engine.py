"""The denoising engine on CIFAR-10 without Ray: samplers, speed, device, networks, training range, victims.

    python benchmarks/cifar10.py --data ../shared/data/cifar10 --work runs/cifar10 --steps prepare
    python benchmarks/engine.py --work runs/cifar10 [--parts samplers,speed,device,networks,training,victims]

Prints one table a part and keeps everything in WORK/engine.json (and WORK/training.png). A GPU is used if there is
one. On 2 cores the parts take 7, 20, 3, 40, 15 and 90 minutes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import machine
from engine_accuracy import victims_part
from engine_speed import device_part, samplers_part, speed_part
from engine_training import networks_part, training_part

Part = Callable[[Path], tuple[str, list[dict[str, Any]]]]
PARTS: dict[str, Part] = {
    "samplers": samplers_part,
    "speed": speed_part,
    "device": device_part,
    "networks": networks_part,
    "training": training_part,
    "victims": victims_part,
}


def main() -> None:
    """Run the chosen parts, print their tables, and keep their rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default="runs/cifar10", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    options = parser.parse_args()
    file = options.work / "engine.json"
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name in options.parts.split(","):
        table, rows = PARTS[name](options.work)
        kept[name] = {"machine": machine(), "rows": rows}
        file.write_text(json.dumps(kept, indent=1))
        print(f"\n## {name} ({machine()})\n\n{table}\n", flush=True)


if __name__ == "__main__":
    main()
