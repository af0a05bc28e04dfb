"""Where everything lies in an output folder, and the ledger's own Parquet tables as bytes."""

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
# Left by a run that died while it tried out the store.
PROBES = f"{PRIVATE}/probe-"
ATTEMPTS = f"{PRIVATE}/attempts"
HUNG = f"{ATTEMPTS}/hung"
FINGERPRINT = f"{PRIVATE}/fingerprint.json"
CONFIG = f"{PRIVATE}/config.yaml"
PLAN = f"{PRIVATE}/plan.parquet"
MANIFEST = f"{PRIVATE}/manifest.parquet"

OBJECT_KEY = re.compile(rf"(?:{DATA}|{ERRORS})/([0-9]{{6,}})(?:-([0-9]+))?-[0-9a-f]{{16}}\.parquet")
STATUS_KEY = re.compile(rf"{STATUS}/([0-9]{{6,}})/([0-9]+)\.json")

# What pyarrow raises for bytes that are not the table they should be; ArrowInvalid is a ValueError.
DAMAGE: tuple[type[Exception], ...] = (pa.ArrowException, OSError, ValueError, KeyError)


def extension_key(number: int) -> str:
    """Return the key of the plan's extension `number`, counted from 1."""
    return f"{PRIVATE}/plan-{number:06d}.parquet"


def object_key(folder: str, shard: str, generation: int, sha256: str) -> str:
    """Return the key of a data or errors object: shard, generation unless it is the first, content."""
    # With the generation in the name, an object whose generation has its status can never be named any more.
    later = f"-{generation}" if generation else ""
    return f"{folder}/{shard}{later}-{sha256[:16]}.parquet"


def status_key(shard: str, generation: int) -> str:
    """Return the key of a shard's status."""
    return f"{STATUS}/{shard}/{generation}.json"


def attempt_key(shard: str, generation: int, stage: str, what: str) -> str:
    """Return the key of word left by a worker before it starts a stage of a shard."""
    return f"{ATTEMPTS}/{shard}/{generation}-{stage}-{what}"


def hash_of(data: bytes) -> str:
    """Return SHA-256 of `data` in hex."""
    return hashlib.sha256(data).hexdigest()


def read_optional(store: Store, key: str) -> bytes | None:
    """Return an object, or None if it is not there."""
    # Asking first could be answered from a listing that a filesystem keeps; reading cannot.
    try:
        return store.read(key)
    except FileNotFoundError:
        return None


def require_run(store: Store) -> None:
    """Raise InputError unless the store holds a run, finished or not."""
    if not (store.exists(FINGERPRINT) or store.exists(PLAN)):
        raise InputError(f"{store.url}: no purified dataset here ({PRIVATE}/ is missing); check the location")


def table_bytes(table: pa.Table) -> bytes:
    """Return `table` as Parquet with page checksums."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def read_table(data: bytes, schema: pa.Schema) -> pa.Table:
    """Return the table in `data`; raises one of `DAMAGE` unless its columns are those of `schema`."""
    table = open_parquet(data).read()
    if not table.schema.equals(schema, check_metadata=False):
        raise ValueError(f"expected columns {', '.join(schema.names)}, found {', '.join(table.schema.names)}")
    return table


def open_parquet(data: bytes) -> Any:
    """Return a ParquetFile over `data` that checks every page it reads; raises one of `DAMAGE`."""
    return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
