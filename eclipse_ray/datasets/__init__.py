"""Datasets on disk: reading each format, writing, and images in memory."""

from __future__ import annotations

import errno
import pickle
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from eclipse_ray.errors import InputError
from eclipse_ray.storage.retries import kind_of

# Exceptions that NumPy, Pillow, zipfile and pickle raise for damaged bytes. Their only common base is Exception.
PARSER_ERRORS: tuple[type[Exception], ...] = (
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    SyntaxError,
    MemoryError,
    ImportError,
    struct.error,
    zlib.error,
    pickle.UnpicklingError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
)
_DAMAGE: tuple[type[Exception], ...] = (*PARSER_ERRORS, OSError)


@contextmanager
def damage_named(what: str, advice: str) -> Iterator[None]:
    """Turn what parsers raise into an InputError `what: reason; advice`; errors of a disk or network pass."""
    try:
        yield
    except _DAMAGE as error:
        if is_of_the_store(error):
            raise
        raise InputError(f"{what}: {error}; {advice}") from error


def is_of_the_store(error: Exception) -> bool:
    """Return whether a disk or network failed, which may be temporary, and not the bytes that were read."""
    # Time-outs and broken connections have no errno, as errors of parsers.
    return kind_of(error) != "unknown" or (isinstance(error, OSError) and error.errno not in (None, errno.EINVAL))
