"""The readers of fuzz_decode under Atheris, which keeps inputs that reach new code (pip install atheris).

    python -m tests.fuzz.fuzz_atheris --seconds 300 --work runs/atheris

The first byte of an input chooses the reader. Ends with libFuzzer's summary, or with the input that crashed it.
"""

import argparse
import random
import sys
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["eclipse_ray.datasets", "PIL", "zipfile"]):
    from eclipse_ray.datasets.images import ImageError
    from eclipse_ray.errors import InputError
    from tests.fuzz.fuzz_decode import TARGETS, seeds

READERS = list(TARGETS)


def one_input(data: bytes) -> None:
    """Pass `data` to the reader chosen by its first byte; only ImageError and InputError are allowed."""
    if not data:
        return
    try:
        TARGETS[READERS[data[0] % len(READERS)]](data[1:], random.Random(0))
    except (ImageError, InputError):
        return


def main() -> None:
    """Write the seeds as a corpus and start libFuzzer, which ends the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--work", type=Path, default=Path("runs/atheris"))
    options = parser.parse_args()
    corpus = options.work / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(READERS):
        for index, data in enumerate(seeds()[name]):
            (corpus / f"{name}-{index}").write_bytes(bytes([number]) + data)
    warnings.simplefilter("ignore")
    limits = ["-rss_limit_mb=1024", "-max_len=20000", "-print_final_stats=1", "-verbosity=0"]
    prefix = f"-artifact_prefix={options.work}/"
    atheris.Setup([sys.argv[0], f"-max_total_time={options.seconds}", prefix, *limits, str(corpus)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
