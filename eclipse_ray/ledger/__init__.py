"""The exactly-once bookkeeping of an output folder: plan, claim, commit, manifest, verification.

A shard is done once its status exists; statuses are created by put-if-absent and never change, so any
number of drivers may work on one folder and die at any moment without losing or doubling an image.
"""

from eclipse_ray.ledger.attempts import Care, begin, hand_over, hopeless, session, try_alone
from eclipse_ray.ledger.manifest import Manifest, collect, finalise
from eclipse_ray.ledger.plan import (
    PartLike,
    Plan,
    Shard,
    Span,
    plan_digest,
    plan_shards,
    plan_source,
    read_plan,
)
from eclipse_ray.ledger.run import Fingerprint, Run, claim, open_run, read_fingerprint, recorded_settings
from eclipse_ray.ledger.status import (
    ImageFailure,
    Status,
    commit_shard,
    named_objects,
    pending,
    read_failures,
    read_object,
    read_status,
    read_statuses,
    retriable,
    summarise,
)
from eclipse_ray.ledger.verify import verify

__all__ = [
    "Care",
    "Fingerprint",
    "ImageFailure",
    "Manifest",
    "PartLike",
    "Plan",
    "Run",
    "Shard",
    "Span",
    "Status",
    "begin",
    "claim",
    "collect",
    "commit_shard",
    "finalise",
    "hand_over",
    "hopeless",
    "named_objects",
    "open_run",
    "pending",
    "plan_digest",
    "plan_shards",
    "plan_source",
    "read_failures",
    "read_fingerprint",
    "read_object",
    "read_plan",
    "read_status",
    "read_statuses",
    "recorded_settings",
    "retriable",
    "session",
    "summarise",
    "try_alone",
    "verify",
]
