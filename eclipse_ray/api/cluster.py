"""Verbs about machines: submit, doctor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from eclipse_ray.api.settings import ConfigLike, resolve
from eclipse_ray.config import (
    Settings,
)
from eclipse_ray.results import (
    DoctorResult,
    SubmitResult,
)


def submit(
    verb: str,
    arguments: Sequence[str] = (),
    *,
    address: str | None = None,
    insecure: bool = False,
    wait: bool = True,
    again: bool = False,
    image_has_deps: bool = False,
    env: Mapping[str, str] | None = None,
    stop_on_interrupt: Callable[[str], bool] | None = None,
    show: Callable[[str], None] = lambda text: print(text, end="", flush=True),
    config: ConfigLike = None,
    settings: Settings | None = None,
) -> SubmitResult:
    """Run a verb with its command line `arguments` on the cluster at `address`, through its jobs API.

    The same verb, arguments and settings are one run: submitted again it is joined while it runs, resumed when it
    was stopped or failed, and done anew after success only with `again`. `show` gets the log as it grows.
    """
    from eclipse_ray.cluster import jobs as room

    order = room.Order(verb, tuple(arguments), resolve(config, settings, {}), again, image_has_deps, env)
    return room.submit(
        order,
        address=address,
        insecure=insecure,
        wait=wait,
        stop_on_interrupt=stop_on_interrupt,
        show=show,
    )


def doctor(
    *, store: str | None = None, config: ConfigLike = None, settings: Settings | None = None
) -> DoctorResult:
    """Say whether this machine, its Ray cluster and `store` are fit for a run, and what to mend."""
    from eclipse_ray.cluster import doctor as room

    return room.doctor(resolve(config, settings, {}), store)
