"""The keys of all files in an output folder, and helpers that read and write the ledger's Parquet tables."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Store

DATA = "data"
PRIVATE = "_eclipse"
STATUS = f"{PRIVATE}/status"
ERRORS = f"{PRIVATE}/errors"
CHANGES = f"{PRIVATE}/changes"
# Prefix of the objects by which a run tests the store; a run that died during the test leaves one.
PROBES = f"{PRIVATE}/probe-"
ATTEMPTS = f"{PRIVATE}/attempts"
HUNG = f"{ATTEMPTS}/hung"
FINGERPRINT = f"{PRIVATE}/fingerprint.json"
CONFIG = f"{PRIVATE}/config.yaml"
DENOISER = "eclipse.json"
"""The card of a denoiser, whose folder has a fingerprint too."""
PLAN = f"{PRIVATE}/plan.parquet"
MANIFEST = f"{PRIVATE}/manifest.parquet"

OBJECT_KEY = re.compile(rf"(?:{DATA}|{ERRORS})/([0-9]{{6,}})(?:-([0-9]+))?-[0-9a-f]{{16}}\.parquet")
STATUS_KEY = re.compile(rf"{STATUS}/([0-9]{{6,}})/([0-9]+)\.json")

# The exceptions that pyarrow raises for damaged tables; ArrowInvalid is a ValueError.
DAMAGE: tuple[type[Exception], ...] = (pa.ArrowException, OSError, ValueError, KeyError)


def extension_key(number: int) -> str:
    """Return the key of extension `number` of the plan, counted from 1."""
    return f"{PRIVATE}/plan-{number:06d}.parquet"


def object_key(folder: str, shard: str, generation: int, sha256: str | None) -> str | None:
    """Return the key of a data or errors object, which ends with its hash; None where there is no object."""
    # Once a generation has its status, no later status can name another object of that generation.
    later = f"-{generation}" if generation else ""
    return f"{folder}/{shard}{later}-{sha256[:16]}.parquet" if sha256 else None


def status_key(shard: str, generation: int) -> str:
    """Return the key of the status of a shard."""
    return f"{STATUS}/{shard}/{generation}.json"


def changes_key(shard: str, generation: int) -> str:
    """Return the key of the table that says how far the images of a generation of a shard were changed."""
    return f"{CHANGES}/{shard}/{generation}.parquet"


def attempt_key(shard: str, generation: int, stage: str, what: str) -> str:
    """Return the key of a note that a worker writes before it starts a stage of a shard."""
    return f"{ATTEMPTS}/{shard}/{generation}-{stage}-{what}"


def redo(shard: str) -> str:
    """Return what to do about a shard whose objects are lost or damaged."""
    return f"delete {STATUS}/{shard} and run the same command again to redo the shard"


def hash_of(data: bytes) -> str:
    """Return the SHA-256 of `data` in hex."""
    return hashlib.sha256(data).hexdigest()


def read_optional(store: Store, key: str) -> bytes | None:
    """Return an object, or None if it does not exist."""
    # `exists` could be answered from a cached listing, so the object is simply read.
    try:
        return store.read(key)
    except FileNotFoundError:
        return None


def require_run(store: Store) -> None:
    """Raise InputError unless the store holds a finished or unfinished run."""
    if store.exists(DENOISER):
        raise InputError(f"{store.url}: this is a denoiser, the output of train; name the output folder of purify")
    if not (store.exists(FINGERPRINT) or store.exists(PLAN)):
        raise InputError(f"{store.url}: no purified dataset here ({PLAN} is missing); name the output of purify")


def columns(text: str) -> pa.Schema:
    """Return the schema of columns that are written as `name:type`, with a space between them."""
    return pa.schema(dict(word.split(":") for word in text.split()))


def table_bytes(table: pa.Table) -> bytes:
    """Return `table` as Parquet with page checksums."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def read_table(data: bytes, schema: pa.Schema) -> pa.Table:
    """Return the table in `data`. Raises one of `DAMAGE` unless its columns are those of `schema`."""
    table = open_parquet(data).read()
    if not table.schema.equals(schema, check_metadata=False):
        raise ValueError(f"expected columns {', '.join(schema.names)}, found {', '.join(table.schema.names)}")
    return table


def open_parquet(data: bytes) -> Any:
    """Return a ParquetFile over `data` that verifies the checksum of each page. Raises one of `DAMAGE`."""
    return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
