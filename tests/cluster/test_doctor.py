"""doctor: one verdict a line, a fix for what is wrong, nothing left behind."""

import json
import re
from shutil import _ntuple_diskusage

import pytest

from eclipse_ray import cli
from eclipse_ray.cluster import doctor as room
from eclipse_ray.config import load_config
from eclipse_ray.results import Check
from eclipse_ray.storage.local import LocalFolder
from tests.support import call, dotted


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch, tmp_path):
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", *room.UNSAFE_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def checks(name: str, **settings: object) -> list[Check]:
    config = load_config(None, dotted(settings))
    return [check for check in room.doctor(config).checks if check.name.startswith(name)]


def verdicts(name: str, **settings: object) -> list[str]:
    return [check.verdict for check in checks(name, **settings)]


def test_this_machine_is_fit_and_says_so(monkeypatch, capfd, tmp_path):
    code, _, _ = call(monkeypatch, capfd, "doctor", "--store", str(tmp_path / "out"))
    assert code == 0
    assert not (tmp_path / "out").exists()


def test_json_has_a_verdict_and_a_fix_for_every_check(monkeypatch, capfd, tmp_path):
    (tmp_path / "file").write_text("a file is in the way")
    monkeypatch.setattr(cli, "reserve_standard_output", lambda: None)
    code, out, _ = call(monkeypatch, capfd, "doctor", "--store", str(tmp_path / "file" / "x"), "--json")
    found = json.loads(out)
    assert code == 1
    assert found["ok"] is False
    failed = [check for check in found["checks"] if check["verdict"] == "failed"]
    assert [check["name"] for check in failed] == ["store"]
    assert failed[0]["fix"]


def test_an_old_library_is_named_with_the_command_that_mends_it():
    assert room._version("pyarrow", "16.1.0", ">=17").verdict == "failed"
    assert room._version("pyarrow", "16.1.0", ">=17").fix == "pip install 'pyarrow>=17'"
    assert room._version("torch", "2.13.0+cpu", ">=2.6").verdict == "ok"


@pytest.mark.parametrize("connected", [False, True])
def test_a_cluster_that_does_not_answer_is_found_without_waiting(connected, monkeypatch):
    # As after another verb in the same process, whose cluster was taken for the one that is named.
    monkeypatch.setattr("ray.is_initialized", lambda: connected)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4})
    monkeypatch.setattr("ray.nodes", lambda: [])
    found = checks("ray", run__address="127.0.0.1:9")[-1]
    assert found.verdict == "failed"
    assert "run.address=127.0.0.1:9: no Ray cluster answers there ([Errno 111] Connection refused)" in found.found


@pytest.mark.parametrize(
    ("mode", "token", "verdict"),
    [("", "", "warning"), ("disabled", "secret", "warning"), ("token", "", "failed"), ("token", "secret", "ok")],
)
def test_a_cluster_without_a_token_is_open_to_everybody(monkeypatch, mode, token, verdict):
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    found = next(iter(room._token("10.0.0.1:6379")))
    assert found.verdict == verdict
    assert "secret" not in found.found + found.fix


def test_unsafe_variables_fail(monkeypatch):
    monkeypatch.setenv(room.UNSAFE_VARIABLES[0], "1")
    assert verdicts(room.UNSAFE_VARIABLES[0]) == ["failed"]


def test_a_machine_that_other_programs_keep_busy_is_named(monkeypatch):
    monkeypatch.setattr(room.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(room.os, "getloadavg", lambda: (1.9, 9.0, 9.0))
    assert verdicts("cpu") == ["ok"]
    monkeypatch.setattr(room.os, "getloadavg", lambda: (9.5, 0.0, 0.0))
    (found,) = checks("cpu")
    assert found.verdict == "warning"
    assert found.found.endswith("with a load of 9.5 on 2 cores")
    assert "Ray may not start" in found.fix


def test_full_disks_and_small_shared_memory_are_named(monkeypatch):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: _ntuple_diskusage(100 * 2**30, 98 * 2**30, 2 * 2**30))
    assert verdicts("disk") == ["failed"]
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: _ntuple_diskusage(2**26, 0, 2**26))
    assert verdicts("shared memory") == ["warning"]


def test_shared_memory_must_hold_the_shards_in_flight(monkeypatch):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: _ntuple_diskusage(2**33, 0, 2 * 2**30))
    # Three shards of 128 MiB per actor, in half of the store: 1.5 GiB for 2 actors, 3 GiB for 4.
    assert verdicts("shared memory", purify__actors=2, purify__shard_bytes=2**27) == ["ok"]
    found = checks("shared memory", purify__actors=4, purify__shard_bytes=2**27)[0]
    assert found.verdict == "warning"
    assert "need up to 3.00 GiB" in found.found
    assert "--shm-size=3g" in found.fix


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("/proc", "No such file"), ("/sys/kernel", "denied|not permitted"), ("/nowhere", "No such")],
)
def test_a_temporary_folder_that_cannot_be_written_to_fails(monkeypatch, folder, reason):
    monkeypatch.setenv("RAY_TMPDIR", folder)
    found = checks("temporary")[0]
    assert found.verdict == "failed"
    assert re.search(rf"{folder}: cannot write there \(.*({reason})", found.found)


def test_a_full_temporary_folder_fails(monkeypatch):
    # Whatever is written there, the disk is full.
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(room.tempfile, "TemporaryFile", lambda **_: full)
        assert "No space left" in checks("temporary")[0].found


def test_a_home_that_does_not_exist_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "gone"))
    assert verdicts("home") == ["warning"]
    monkeypatch.setenv("HOME", "/proc/gone")
    monkeypatch.setattr(room.os, "access", lambda folder, _: str(folder) != "/proc")
    found = checks("home")[0]
    assert found.verdict == "failed"
    assert "/proc/gone does not exist" in found.found


def test_a_clock_that_differs_from_that_of_the_store_is_named(monkeypatch, tmp_path):
    store = str(tmp_path / "out")
    for ahead, words in ((-130.0, "130 s behind"), (61.0, "61 s ahead of")):
        monkeypatch.setattr(room.Store, "seconds_ahead", lambda _, ahead=ahead: ahead)
        found = list(room._store(store, False))
        assert [(one.name, one.verdict) for one in found] == [("clock", "warning"), ("store", "ok")]
        assert words in found[0].found
    monkeypatch.setattr(room.Store, "seconds_ahead", lambda _: 5.0)
    assert [one.name for one in room._store(store, False)] == ["store"]


def test_a_store_without_conditional_writes_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(LocalFolder, "create", lambda self, key, data: self.write(key, data) or True)
    found = next(iter(room._store(str(tmp_path / "out"), False)))
    assert found.verdict == "failed"
    assert "cannot create an object only if it is absent" in found.found
    assert [one.verdict for one in room._store(str(tmp_path / "out"), True)] == ["ok"]
    (found,) = room._store(str(tmp_path / ("n" * 300)), True)
    assert (found.verdict, "too long" in found.found) == ("failed", True)


def test_a_look_that_cannot_be_taken_does_not_hide_the_others(monkeypatch):
    def broken():
        raise RuntimeError("no driver")
        yield

    monkeypatch.setattr(room, "_devices", broken)
    found = room.doctor(load_config())
    assert not found.ok
    assert [check.found for check in found.checks if check.name == "devices"] == ["no driver"]
    assert any(check.name == "disk" for check in found.checks)
