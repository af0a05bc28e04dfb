"""The ledger of an output folder, which makes sure that every image is done exactly once.

A shard is done when its status exists. A status is created by put-if-absent and never changes. So any number of
drivers may work on one folder and die at any moment, and no image is lost or done twice.
"""

from eclipse_ray.ledger.attempts import Care as Care
from eclipse_ray.ledger.attempts import begin as begin
from eclipse_ray.ledger.attempts import hand_over as hand_over
from eclipse_ray.ledger.attempts import hopeless as hopeless
from eclipse_ray.ledger.attempts import session as session
from eclipse_ray.ledger.attempts import try_alone as try_alone
from eclipse_ray.ledger.manifest import Manifest as Manifest
from eclipse_ray.ledger.manifest import collect as collect
from eclipse_ray.ledger.manifest import finalise as finalise
from eclipse_ray.ledger.manifest import verify as verify
from eclipse_ray.ledger.plan import Fingerprint as Fingerprint
from eclipse_ray.ledger.plan import Plan as Plan
from eclipse_ray.ledger.plan import Shard as Shard
from eclipse_ray.ledger.plan import Span as Span
from eclipse_ray.ledger.plan import check_claim as check_claim
from eclipse_ray.ledger.plan import claim as claim
from eclipse_ray.ledger.plan import open_run as open_run
from eclipse_ray.ledger.plan import plan_digest as plan_digest
from eclipse_ray.ledger.plan import plan_shards as plan_shards
from eclipse_ray.ledger.plan import plan_source as plan_source
from eclipse_ray.ledger.plan import read_fingerprint as read_fingerprint
from eclipse_ray.ledger.plan import read_plan as read_plan
from eclipse_ray.ledger.plan import read_settings as read_settings
from eclipse_ray.ledger.plan import recorded_settings as recorded_settings
from eclipse_ray.ledger.status import CHANGES_SCHEMA as CHANGES_SCHEMA
from eclipse_ray.ledger.status import ImageFailure as ImageFailure
from eclipse_ray.ledger.status import Status as Status
from eclipse_ray.ledger.status import commit_shard as commit_shard
from eclipse_ray.ledger.status import pending as pending
from eclipse_ray.ledger.status import read_changes as read_changes
from eclipse_ray.ledger.status import read_failures as read_failures
from eclipse_ray.ledger.status import read_object as read_object
from eclipse_ray.ledger.status import read_status as read_status
from eclipse_ray.ledger.status import read_statuses as read_statuses
from eclipse_ray.ledger.status import retriable as retriable
from eclipse_ray.ledger.status import summarise as summarise
from eclipse_ray.ledger.status import write_changes as write_changes
