"""Jobs on a real head with token authentication: sent, followed, joined, stopped, resumed; and what it exports."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.job_submission import JobSubmissionClient

from eclipse_ray.config import load_config, to_yaml
from tests.cluster.head import TOKEN, environment, running_head
from tests.support import DEBUG, assignments, read_output, run_cli, shards_done, wait_until

ROOT = Path(__file__).resolve().parents[2]
SHARD = {"purify.shard_images": 40, "purify.actors": 1}
# One image a pass and every timestep: slow enough to be stopped in the middle.
SLOW = {"purify.shard_images": 4, "purify.batch_size": 1, "purify.num_inference_steps": 4, "purify.actors": 1}

pytestmark = [pytest.mark.timeout(900), pytest.mark.chaos]


@pytest.fixture(scope="module")
def head():
    with running_head(cpus=3) as running:
        yield running


def words(world, output, settings, source=None) -> list[str]:
    arguments = ["purify", str(source or world.poisoned), str(output), "--denoiser", world.denoiser]
    return [*arguments, *assignments({**DEBUG, **settings})]


def submission(head, *arguments, token=TOKEN) -> dict:
    """Return the command of a submission and its environment, as `subprocess` takes them."""
    command = [sys.executable, "-m", "eclipse_ray", "submit", *arguments, "--address", head.address]
    return {"args": [*command, "--image-has-deps"], "env": environment(token) | {"PYTHONPATH": str(ROOT)}}


def submit(head, *arguments, token=TOKEN) -> subprocess.CompletedProcess:
    return subprocess.run(**submission(head, *arguments, token=token), capture_output=True, text=True, timeout=600)


def client(head) -> JobSubmissionClient:
    return JobSubmissionClient(head.address, headers={"Authorization": f"Bearer {TOKEN}"})


@pytest.fixture(scope="module")
def source(world, tmp_path_factory):
    """Return a folder of the poisoned images and a last one that cannot be decoded."""
    folder = tmp_path_factory.mktemp("source")
    table = read_output(world.poisoned)
    rows = table.to_pylist()
    rows.append({**rows[-1], "id": "broken", "image": {"bytes": b"no image", "path": "broken.png"}})
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), folder / "images.parquet")
    return folder


@pytest.fixture(scope="module")
def purified(head, world, source, tmp_path_factory):
    """Submit one purification; return its folder, the command, and what `submit --json` said."""
    output = tmp_path_factory.mktemp("cluster") / "out"
    command = [*words(world, output, {**SHARD, "run.log_format": "json"}, source), "--json"]
    finished = submit(head, *command)
    assert finished.returncode == 0, finished.stderr
    return output, command, json.loads(finished.stdout), finished.stderr


def test_a_purification_runs_as_a_job_and_verifies(purified, world):
    output, _, said, log = purified
    assert said["status"] == "SUCCEEDED"
    assert said["exit_code"] == 0
    assert not said["attached"]
    assert run_cli("verify", str(output))["ok"]
    assert read_output(output).num_rows == 240
    assert TOKEN not in log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith('{"time"')]
    shards = [line for line in lines if line.get("event") == "shard"]
    assert len(shards) == 7
    assert sum(line["ok"] for line in shards) == 240
    assert {line["run"] for line in shards} == {
        json.loads((output / "_eclipse/fingerprint.json").read_text())["value"]
    }
    assert not [path for path in output.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_submitting_the_same_run_again_joins_it(head, purified, world):
    _, command, said, _ = purified
    again = submit(head, *command)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == {**said, "attached": True}
    assert [job.submission_id for job in client(head).list_jobs()].count(said["submission_id"]) == 1


def test_without_a_token_nothing_is_submitted(head, purified, world, tmp_path):
    before = len(client(head).list_jobs())
    for options in ([], ["--insecure"]):
        refused = submit(head, *words(world, tmp_path / "out", SHARD), *options, token=None)
        assert refused.returncode == 2, refused.stderr
        assert "token" in refused.stderr
    wrong = submit(head, *words(world, tmp_path / "out", SHARD), token="x" * 32)
    assert wrong.returncode == 2
    assert "does not accept this token" in wrong.stderr
    assert len(client(head).list_jobs()) == before


def test_the_dashboard_shows_series_that_a_run_exported(head, purified):
    wanted = set(re.findall(r"ray_[a-z_]+", (ROOT / "cluster/grafana.json").read_text()))
    assert len(wanted) > 8
    found: set[str] = set()

    def scraped() -> bool:
        with urllib.request.urlopen(head.metrics, timeout=20) as answer:
            text = answer.read().decode()
        found.update(re.findall(r"^(ray_[a-zA-Z_]+)", text, re.MULTILINE))
        return wanted <= found

    try:
        wait_until(scraped, "series", 60)
    except AssertionError:
        pytest.fail(f"not exported: {sorted(wanted - found)}")


def test_every_job_script_runs_by_ray_job_submit(head, world, tmp_path):
    """`ray job submit --working-dir . -- python jobs/VERB.py --config URL`, as the README says."""
    poisoned = {"data.source": world.poisoned}
    runs = {
        "audit": {**poisoned, "audit.output": f"{tmp_path}/audit"},
        "train": {"data.clean": world.clean, "denoiser.output": f"{tmp_path}/denoiser", "denoiser.iterations": 4},
        "purify": {**poisoned, "data.output": f"{tmp_path}/out", **SHARD},
        "evaluate": {
            "data.source": f"{tmp_path}/out",
            "data.test": world.test,
            "victim.epochs": 1,
            "evaluate.seeds": 1,
        },
        "sweep": {
            **poisoned,
            "data.clean": world.clean,
            "data.output": f"{tmp_path}/sweep",
            "purify.denoiser": None,
            "denoiser.iterations": 4,
            "sweep.images": 40,
            "sweep.space": {"purify.t_star": [2]},
        },
    }
    for verb, settings in runs.items():
        every = {**DEBUG, "purify.denoiser": world.denoiser, "denoiser.num_workers": 1}
        config = tmp_path / f"{verb}.yaml"
        config.write_text(to_yaml(load_config(None, {**every, **settings})))
        command = ["ray", "job", "submit", "--address", head.address, "--working-dir", ".", "--"]
        command += ["python", f"jobs/{verb}.py", "--config", f"file://{config}", "--json"]
        finished = subprocess.run(
            command, cwd=ROOT, env=environment(TOKEN), capture_output=True, text=True, timeout=600
        )
        assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-1000:]
    assert run_cli("verify", f"{tmp_path}/out")["ok"]
    assert json.loads((tmp_path / "audit/audit.json").read_text())["verdict"] == "poisoned"
    assert (tmp_path / "denoiser/eclipse.json").exists()
    assert (tmp_path / "sweep/best.yaml").exists()


def test_exit_codes_are_those_of_the_job(head, world, tmp_path):
    missing = submit(head, "purify", f"{tmp_path}/nothing", f"{tmp_path}/out", "--denoiser", world.denoiser)
    assert missing.returncode == 2, missing.stdout + missing.stderr
    wide = submit(head, *words(world, tmp_path / "wide", {**SHARD, "purify.actors": 6}))
    assert wide.returncode == 2
    assert "needs 7 CPUs, the Ray cluster has 3" in wide.stdout
    gpus = submit(head, *words(world, tmp_path / "gpus", {**SHARD, "purify.num_gpus": 1}))
    assert gpus.returncode == 2
    assert "needs 1 GPUs, the Ray cluster has 0" in gpus.stdout


def test_a_stopped_run_is_resumed_by_the_same_command(head, world, tmp_path):
    output, log = tmp_path / "out", tmp_path / "first.log"
    arguments = words(world, output, SLOW)
    with log.open("wb") as stream:
        options = {"stdout": stream, "stderr": stream, "start_new_session": True}
        first = subprocess.Popen(**submission(head, *arguments), **options)
    wait_until(lambda: shards_done(output) >= 2, "two shards")
    # Off a terminal Ctrl-C leaves the job alone and says how to stop it.
    os.kill(first.pid, signal.SIGINT)
    assert first.wait(timeout=60) == 75, log.read_text()
    assert "ray job stop eclipse-ray-purify-" in log.read_text()
    jobs = client(head)
    (job,) = [job for job in jobs.list_jobs() if job.entrypoint.find(str(output)) >= 0]
    assert job.status == "RUNNING"
    jobs.stop_job(job.submission_id)
    wait_until(lambda: jobs.get_job_status(job.submission_id).is_terminal(), "stopped", 30)
    text = jobs.get_job_logs(job.submission_id)
    assert "stopped; run the same command again to resume" in text
    committed = shards_done(output)
    assert 2 <= committed < 60
    second = submit(head, *arguments, "--json")
    assert second.returncode == 0, second.stdout + second.stderr
    assert json.loads(second.stdout)["submission_id"] == f"{job.submission_id}-2"
    assert f"{committed} of 60 shards are already committed" in second.stderr
    assert run_cli("verify", str(output))["ok"]


def test_an_open_cluster_is_refused_unless_insecure_and_a_head_needs_no_cpus(world, tmp_path):
    with running_head(cpus=0, auth=False, worker_cpus=3) as open_head:
        refused = submit(open_head, *words(world, tmp_path / "out", SHARD))
        assert refused.returncode == 2
        assert "asks nobody for a token" in refused.stderr
        taken = submit(open_head, *words(world, tmp_path / "out", SHARD), "--insecure", token=None)
        assert taken.returncode == 0, taken.stdout + taken.stderr
        assert run_cli("verify", str(tmp_path / "out"))["ok"]
