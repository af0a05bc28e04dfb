"""The nearest right spelling of a path that is not there."""

from __future__ import annotations

import difflib
import os


def did_you_mean(path: str) -> str:
    """Return "; did you mean X?" for a local path whose first wrong part resembles a name there, else ""."""
    if "://" in path:
        return ""
    folder, rest = os.path.split(path.rstrip("/"))
    while folder and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
        rest = os.path.join(name, rest)
    first, _, below = rest.partition("/")
    try:
        close = difflib.get_close_matches(first, os.listdir(folder or "."), n=1, cutoff=0.6)
    except OSError:
        return ""
    # The same name once more means that what is below it is missing, or that it cannot be read.
    if not close or close[0] == first:
        return ""
    return f"; did you mean {os.path.join(folder, close[0], below).rstrip('/')}?"
