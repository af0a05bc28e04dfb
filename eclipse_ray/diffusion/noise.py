"""Random numbers keyed by (seed, image id, timestep): counter-based Philox 4x32-10 in torch integer operations.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". The integers are exact on every device; normals
are computed in float64 and rounded to float32, so they are exact on one device and within 1 ulp across devices.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from eclipse_ray.errors import InputError

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
# Counter blocks of four words worked on at once. The int64 temporaries of a whole photograph would take gigabytes;
# those of this many blocks stay in a core's cache.
BLOCKS = 2**14


def check_batch(images: Tensor, ids: Sequence[str]) -> None:
    """Raise InputError unless `images` are uint8 (B, H, W, 3), with one of `ids` for each of them."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise InputError(f"expected uint8 images (B, H, W, 3), got {images.dtype} {tuple(images.shape)}")
    if len(ids) != len(images):
        raise InputError(f"{len(images)} images came with {len(ids)} ids; give one id to each image")
    if not all(isinstance(name, str) for name in ids):
        raise InputError("expected ids that are texts, found others; turn each into one with str()")


def check_labelled(images: Tensor, labels: Tensor, ids: Sequence[str]) -> None:
    """Raise InputError as `check_batch` does, and unless `labels` are (B,)."""
    check_batch(images, ids)
    if labels.shape != (len(images),):
        raise InputError(
            f"{len(images)} images came with labels of shape {tuple(labels.shape)}; give one label to each image"
        )


def philox(counter: Sequence[Tensor], key: Sequence[Tensor], rounds: int = 10) -> tuple[Tensor, ...]:
    """Return four int64 tensors of 32-bit words from four counter words and two key words (int64, < 2**32)."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)  # type: ignore[no-untyped-call]
    k0, k1 = key
    for _ in range(rounds):
        # The low 64 bits of a product are right in int64; its sign bit is masked off after the shift. The rest is
        # done in place: each operation is short, and a copy would take as long.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (second >> 32).bitwise_and_(_MASK).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (first >> 32).bitwise_and_(_MASK).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = second.bitwise_and_(_MASK), first.bitwise_and_(_MASK)
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _identity_words(seed: int, ids: Sequence[str], device: torch.device | str | None) -> Tensor:
    """Return (B, 4) int64 words, a 128-bit hash of (seed, id) for each id."""
    if not 0 <= seed < 2**63:
        raise InputError(f"expected a seed from 0 to 2^63 - 1, got {seed}")
    prefix = seed.to_bytes(8, "little")
    digests = b"".join(hashlib.blake2b(prefix + text.encode(), digest_size=16).digest() for text in ids)
    words = torch.frombuffer(bytearray(digests), dtype=torch.int32).view(len(ids), 4)
    return (words.to(torch.int64) & _MASK).to(device)


def random_words(
    seed: int, ids: Sequence[str], t: int, count: int, device: torch.device | str | None = None
) -> Tensor:
    """Return (B, count) int64 words in [0, 2**32), each row a function of (seed, id, t) alone.

    Key: the first half of a 128-bit hash of (seed, id). Counter: block index, t, the second half.
    """
    return _words(_identity_words(seed, ids, device), t, 0, -(-count // 4))[:, :count]


def _words(identity: Tensor, t: int, first: int, last: int) -> Tensor:
    """Return the words (B, 4 * (last - first)) of the counter blocks first..last - 1."""
    blocks = torch.arange(first, last, device=identity.device, dtype=torch.int64)[None, :]
    columns = [identity[:, index, None] for index in range(4)]
    step = torch.full_like(blocks, t)
    words = philox((blocks, step, columns[2], columns[3]), (columns[0], columns[1]))
    return torch.stack(words, dim=-1).flatten(1)


def uniform(
    seed: int, ids: Sequence[str], t: int, shape: tuple[int, ...], device: torch.device | str | None = None
) -> Tensor:
    """Return float64 (B, *shape) in the open interval (0, 1), keyed by (seed, id, t)."""
    return _to_unit(random_words(seed, ids, t, math.prod(shape), device)).view(len(ids), *shape)


def _to_unit(words: Tensor) -> Tensor:
    return words.to(torch.float64).add_(0.5).mul_(2.0**-32)


def noise(
    seed: int, ids: Sequence[str], t: int, shape: tuple[int, ...], device: torch.device | str | None = None
) -> Tensor:
    """Return float32 (B, *shape) of standard normals (Box-Muller), keyed by (seed, id, t).

    Works through the counter in pieces, so memory beyond the result is bounded; the values are the same.
    """
    count = math.prod(shape)
    identity = _identity_words(seed, ids, device)
    normals = torch.empty(len(ids), count, dtype=torch.float32, device=device)
    blocks, piece = -(-count // 4), max(1, BLOCKS // max(1, len(ids)))
    for first in range(0, blocks, piece):
        last = min(first + piece, blocks)
        drawn = _box_muller(_to_unit(_words(identity, t, first, last)))
        normals[:, 4 * first : 4 * last] = drawn[:, : count - 4 * first]
    return normals.view(len(ids), *shape)


def _box_muller(flat: Tensor) -> Tensor:
    """Return float32 normals (B, N) from uniforms (B, N), which are overwritten: copies would take longer."""
    radius = flat[:, 0::2].log().mul_(-2.0).sqrt_()
    angle = flat[:, 1::2].mul_(2.0 * math.pi)
    normals = torch.empty(flat.shape, dtype=torch.float32, device=flat.device)
    normals[:, 0::2] = angle.cos().mul_(radius)
    normals[:, 1::2] = angle.sin().mul_(radius)
    return normals
