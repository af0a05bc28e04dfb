"""An output folder of another version is reported as such, with advice, and never called damaged."""

import json

import pyarrow as pa
import pytest

from eclipse_ray import __version__
from eclipse_ray.errors import InputError
from eclipse_ray.ledger import layout, read_plan
from eclipse_ray.ledger.plan import SCHEMA, plan_bytes
from eclipse_ray.storage.store import Store
from tests.ledger.helpers import make_shards


def test_a_plan_from_before_versions_were_noted(tmp_path):
    store = Store(str(tmp_path))
    rows = [["000000"], ["a.png"], [0], [1], [9], ["v"]]
    bare = pa.table([pa.array(row, field.type) for row, field in zip(rows, SCHEMA, strict=True)], schema=SCHEMA)
    store.write(layout.PLAN, layout.table_bytes(bare))
    with pytest.raises(InputError, match=r"made by an eclipse_ray older than 0\.1\.0") as caught:
        read_plan(store)
    assert "another folder" in str(caught.value)
    assert "damaged" not in str(caught.value)


def test_a_plan_of_a_later_version_names_it(tmp_path):
    store = Store(str(tmp_path))
    note = json.dumps({"shard_images": 4, "classes": None, "made_by": "9.1"})
    later = pa.table({"shard": ["000000"], "blob": ["x"]}).replace_schema_metadata({b"eclipse_ray": note.encode()})
    store.write(layout.PLAN, layout.table_bytes(later))
    with pytest.raises(InputError, match=rf"made by eclipse_ray 9\.1, .*{__version__} cannot read"):
        read_plan(store)


def test_a_plan_notes_who_made_it():
    data = plan_bytes(make_shards(), 2)
    note = json.loads(layout.open_parquet(data).schema_arrow.metadata[b"eclipse_ray"])
    assert note["made_by"] == __version__
