"""Datasets on disk: reading each format, writing, and images in memory."""

from __future__ import annotations

import pickle
import struct
import tokenize
import zipfile
import zlib

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
