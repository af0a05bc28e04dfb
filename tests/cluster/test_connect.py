"""What a run counts on: the nodes there are, or those that an autoscaler may add."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray

from eclipse_ray.cluster.connect import _counted, connect
from eclipse_ray.config import load_config
from eclipse_ray.errors import ConfigError
from eclipse_ray.purification.run import pool

EMPTY: dict[str, float] = {"node:__internal_head__": 1.0}
LIMITS = {"run.max_gpus": 8, "run.max_cpus": 64}


def test_a_cluster_that_starts_from_nothing_gets_a_pool_of_what_it_may_grow_to():
    config = load_config(None, LIMITS)
    resources = _counted(EMPTY, (), config, cores=2, local=False)
    assert (resources.cpus, resources.gpus) == (64, 8)
    assert pool(config, resources, shards=1000) == (8, 1.0)
    assert pool(config, resources, shards=3) == (3, 1.0)


def test_without_limits_an_empty_cluster_is_refused_instead_of_a_hang():
    config = load_config(None, {})
    with pytest.raises(ConfigError, match="add nodes"):
        pool(config, _counted(EMPTY, (), config, cores=2, local=False), shards=10)


def test_more_than_the_limit_is_refused():
    config = load_config(None, {**LIMITS, "purify.num_gpus": 9})
    with pytest.raises(ConfigError, match="num_gpus"):
        pool(config, _counted(EMPTY, (), config, cores=2, local=False), shards=10)


def test_a_larger_cluster_counts_and_a_local_one_cannot_grow():
    config = load_config(None, LIMITS)
    assert _counted({"CPU": 128.0, "GPU": 16.0}, (), config, cores=2, local=False).gpus == 16
    local = _counted({"CPU": 4.0}, (), config, cores=2, local=True)
    assert (local.cpus, local.gpus) == (4, 0)


def test_threads_that_connect_together_start_one_cluster(monkeypatch):
    started = []

    def slow_init(**_):
        time.sleep(0.2)
        started.append(1)

    monkeypatch.setattr(ray, "init", slow_init)
    monkeypatch.setattr(ray, "is_initialized", lambda: bool(started))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(ray, "nodes", list)
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(connect, [load_config(None, {})] * 3))
    assert (started, [each.cpus for each in found]) == ([1], [4, 4, 4])
