"""The ledger of an output folder, which makes sure that every image is done exactly once.

A shard is done when its status exists. A status is created by put-if-absent and never changes. So any number of
drivers may work on one folder and die at any moment, and no image is lost or done twice.
"""

from eclipse_ray.ledger.attempts import Care, begin, hand_over, hopeless, session, try_alone
from eclipse_ray.ledger.manifest import Manifest, collect, finalise, verify
from eclipse_ray.ledger.plan import (
    Fingerprint,
    Plan,
    Run,
    Shard,
    Span,
    claim,
    open_run,
    plan_digest,
    plan_shards,
    plan_source,
    read_fingerprint,
    read_plan,
    recorded_settings,
)
from eclipse_ray.ledger.status import (
    CHANGES_SCHEMA,
    ImageFailure,
    Status,
    commit_shard,
    pending,
    read_changes,
    read_failures,
    read_object,
    read_status,
    read_statuses,
    retriable,
    summarise,
    write_changes,
)

__all__ = [
    "CHANGES_SCHEMA",
    "Care",
    "Fingerprint",
    "ImageFailure",
    "Manifest",
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
    "open_run",
    "pending",
    "plan_digest",
    "plan_shards",
    "plan_source",
    "read_changes",
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
    "write_changes",
]
