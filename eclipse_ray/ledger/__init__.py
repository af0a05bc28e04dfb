"""The exactly-once bookkeeping of an output folder: plan, claim, commit, manifest, verification.

A shard is done once its status exists; statuses are created by put-if-absent and never change, so any
number of drivers may work on one folder and die at any moment without losing or doubling an image.
"""

from eclipse_ray.ledger.manifest import Manifest, finalise
from eclipse_ray.ledger.plan import PartLike, Shard, Span, plan_digest, plan_shards, read_plan
from eclipse_ray.ledger.run import Fingerprint, Run, claim, open_run, read_fingerprint
from eclipse_ray.ledger.status import (
    ImageFailure,
    Status,
    commit_shard,
    named_objects,
    pending,
    read_statuses,
    summarise,
)
from eclipse_ray.ledger.verify import verify

__all__ = [
    "Fingerprint",
    "ImageFailure",
    "Manifest",
    "PartLike",
    "Run",
    "Shard",
    "Span",
    "Status",
    "claim",
    "commit_shard",
    "finalise",
    "named_objects",
    "open_run",
    "pending",
    "plan_digest",
    "plan_shards",
    "read_fingerprint",
    "read_plan",
    "read_statuses",
    "summarise",
    "verify",
]
