"""A remote denoiser is copied once to each node; local ones are used where they lie."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from eclipse_ray.config import Precision
from eclipse_ray.config.paths import did_you_mean
from eclipse_ray.diffusion.checkpoint import CARD_FILE, DENOISER_FILES, load_denoiser
from eclipse_ray.diffusion.network import Denoiser, default_device
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Store


def local_denoiser(url: str) -> str:
    """Return a local folder with the denoiser of `url`. Raises InputError if there is none.

    The cache is named after the card's content, so another denoiser at the same URL is fetched anew.
    """
    store = Store(url)
    if not store.exists():
        raise InputError(
            f"{url}: there is no such denoiser folder"
            f"{did_you_mean(url) or '; check the path, or make one with `eclipse-ray train`'}"
        )
    if not store.exists(CARD_FILE):
        raise InputError(
            f"{url}: not a denoiser folder ({CARD_FILE} is missing); make one with `eclipse-ray train`"
        )
    if store.local:
        return store.root
    card = store.read(CARD_FILE)
    name = hashlib.sha256(url.encode() + card).hexdigest()[:32]
    folder = Path(tempfile.gettempdir()) / f"eclipse_ray-{os.getuid()}" / name
    if not (folder / CARD_FILE).exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for file in DENOISER_FILES:
            # Under its own name at once: several actors of a node may fetch at the same time.
            partial = folder / f".{file}-{os.getpid()}"
            partial.write_bytes(store.read(file))
            partial.replace(folder / file)
    return str(folder)


def open_denoiser(url: str, precision: Precision) -> Denoiser:
    """Return the denoiser of `url` on this process's device, computing in `precision`; raises InputError."""
    denoiser = load_denoiser(local_denoiser(url), default_device())
    denoiser.precision = precision
    return denoiser
