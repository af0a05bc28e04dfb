"""What `submit` sends, to whom, and how it ends, against a dashboard that only answers."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from ray.job_submission import JobDetails, JobStatus

from eclipse_ray import cli as command
from eclipse_ray.cluster import jobs as room
from eclipse_ray.cluster.connect import Resources, require_gpus, require_place
from eclipse_ray.cluster.jobs import Order, exit_code, find_token, open_cluster, pinned, runtime_env
from eclipse_ray.config import LOCATIONS, load_config
from eclipse_ray.errors import ConfigError, InterruptedRunError
from eclipse_ray.parameters import VERBS, declared
from tests.support import call


def order(**changes) -> Order:
    values = {"verb": "purify", "arguments": ("s3://b/in", "s3://b/out"), "config": load_config()}
    return Order(**{**values, **changes})


def details(status: str, code: int | None = None, name: str = "x") -> JobDetails:
    return JobDetails(type="SUBMISSION", status=status, entrypoint="", driver_exit_code=code, submission_id=name)


def test_the_same_run_has_the_same_name():
    name = order().identity
    watched = load_config(None, {"run.progress_seconds": 1, "run.address": "auto", "run.log_format": "json"})
    assert order(config=watched, again=True, env={"A": "b"}).identity == name
    for other in (
        order(verb="train"),
        order(arguments=("s3://b/in", "s3://b/other")),
        order(config=load_config(None, {"purify.t_star": 50})),
        order(config=load_config(None, {"run.seed": 1})),
    ):
        assert other.identity != name


def test_arguments_are_spelled_in_one_way():
    long = command.translated(
        "purify", ["--extend", "s3://b/in", "s3://b/out", "--denoiser", "/d", "--set", "a.b=1"]
    )
    short = command.translated("purify", ["s3://b/in", "--denoiser=/d", "s3://b/out", "--extend", "--json"])
    assert long[0] == short[0] == ["s3://b/in", "s3://b/out", "--denoiser", "/d", "--extend"]
    assert long[1]["settings"] == {"a.b": 1}


@pytest.mark.parametrize(
    ("verb", "words", "message"),
    [
        ("purify", ["my/data", "s3://b/out"], "my/data is a path of this machine"),
        ("nothing", [], "expected one of .*purify"),
        ("submit", ["purify"], "expected one of"),
        ("demo", [], "expected one of"),
    ],
)
def test_what_cannot_run_elsewhere_is_refused(verb, words, message):
    with pytest.raises(ConfigError, match=message):
        command.translated(verb, words)


OPTIONS = [
    (verb, name)
    for verb in VERBS
    if not VERBS[verb].here
    for name, (_, one) in declared(VERBS[verb].function).items()
    if one.setting in LOCATIONS or name in ("delta", "index", "labels_from", "store")
]
HERE = ("my/data", "~/data", "file://data", "zip://a::data.zip", ".")
EVERYWHERE = ("/my/a::b", "s3://b/x", "file:///data", "zip://a::s3://b/x", "zip://a::/data.zip")


@pytest.mark.parametrize(("verb", "name"), OPTIONS)
def test_every_option_that_is_a_location_has_to_be_one_of_every_node(verb, name):
    def given(place):
        words = []
        for key, (parameter, _) in declared(VERBS[verb].function).items():
            option = [f"--{key.replace('_', '-')}"] if parameter.kind is parameter.KEYWORD_ONLY else []
            if key == name or parameter.default is parameter.empty:
                words += [*option, place if key == name else "5" if option and key == "clean" else "/shared"]
        return command.translated(verb, words)[0]

    for place in HERE:
        with pytest.raises(ConfigError, match=f"^submit {verb}: {place} is a path of this machine"):
            given(place)
    for place in (*EVERYWHERE, *(["class"] if name == "index" else [])):
        assert place in given(place)


GRID = {"matrix.clean": True}
# What reads each location.
SETTINGS = [
    ({"data.source": "my/data"}, "purify audit evaluate sweep convert apply split poison"),
    ({"data.labels": "my/data"}, "purify audit evaluate sweep convert apply split poison train"),
    ({"data.labels": "my/data", "data.source": "/s"}, "purify audit evaluate sweep convert apply split poison"),
    ({"data.output": "my/data"}, "purify status verify gc evaluate sweep convert apply split poison"),
    ({"data.clean": "my/data"}, "train audit evaluate sweep"),
    ({"data.test": "my/data"}, "evaluate"),
    ({"denoiser.output": "my/data"}, "train"),
    ({"denoiser.against": "my/data"}, "train"),
    ({"purify.denoiser": "my/data"}, "purify sweep"),
    ({"purify.denoiser": "my/data", **GRID}, "purify sweep evaluate"),
    ({"poison.denoiser": "my/data"}, "poison"),
    ({"poison.denoiser": "my/data", **GRID}, "poison evaluate"),
    ({"audit.denoiser": "my/data"}, "audit"),
    ({"audit.output": "my/data"}, "audit"),
    ({"matrix.poisons": ["ar", {"name": "published", "source": "my/data"}]}, "evaluate"),
    ({"matrix.poisons": [{"name": "adp", "variant": "strong", "denoiser": "my/data"}]}, "evaluate"),
    ({"matrix.defenses": [{"name": "eclipse", "purify.denoiser": "my/data"}], **GRID}, "evaluate"),
    ({"matrix.defenses": [{"name": "eclipse", "purify.denoiser": "my/data"}]}, ""),
]


def test_every_setting_that_is_a_location_is_tried():
    assert LOCATIONS - {"poison.source"} <= {key for settings, _ in SETTINGS for key in settings}


@pytest.mark.parametrize(("settings", "verbs"), SETTINGS, ids=str)
def test_a_location_that_a_verb_reads_and_no_other_has_to_be_one_of_every_node(settings, verbs, monkeypatch):
    def nobody(*_given):
        raise InterruptedRunError("nobody answers")

    monkeypatch.setattr(room, "open_cluster", nobody)
    config = load_config(None, settings)
    refused = []
    for verb in [name for name, one in VERBS.items() if not one.here]:
        with pytest.raises((ConfigError, InterruptedRunError)) as raised:
            room.submit(order(verb=verb, config=config), show=print)
        if raised.type is ConfigError:
            refused.append(verb)
            assert re.match(rf"submit {verb}: (matrix\.\w+: )?\w+\.\w+ my/data is a path of", str(raised.value))
    assert sorted(refused) == sorted(verbs.split())


def test_only_a_verb_of_a_cluster_is_submitted():
    for verb in ("nothing", "demo"):
        with pytest.raises(ConfigError, match=f"submit {verb}: expected one of doctor, train, "):
            room.submit(order(verb=verb), show=print)


@pytest.mark.parametrize(
    ("text", "words", "code"),
    [
        ("data: {source: my/data}", [], 2),
        ("data: {source: s3://b/in}", ["--set", "purify.denoiser=my/denoiser"], 2),
        # What an argument replaces is not read.
        ("data: {source: my/data}", ["s3://b/in", "/shared/out", "--denoiser", "/shared/denoiser"], 75),
        ("data: {labels: folder, source: 's3://b/in'}", ["--set", "data.output=/shared/out"], 75),
    ],
)
def test_a_path_of_this_machine_is_refused_before_the_cluster_is_asked(
    text, words, code, monkeypatch, capfd, tmp_path
):
    def nobody(*_given):
        raise InterruptedRunError("nobody answers")

    monkeypatch.setattr(room, "open_cluster", nobody)
    (tmp_path / "run.yaml").write_text(text)
    found, _, said = call(monkeypatch, capfd, "submit", "purify", *words, "--config", str(tmp_path / "run.yaml"))
    assert (found, "is a path of this machine" in said) == (code, code == 2)


def test_the_upload_is_the_package_and_all_settings_but_the_address(tmp_path):
    config = load_config(None, {"purify.t_star": 9, "run.address": "ray://elsewhere:10001"})
    environment = runtime_env(order(config=config, image_has_deps=True), tmp_path)
    assert "pip" not in environment
    assert load_config(str(tmp_path / "run.yaml")) == load_config(None, {"purify.t_star": 9})
    assert (tmp_path / "eclipse_ray/py.typed").exists()
    assert not list(tmp_path.rglob("*.pyc"))


def test_requirements_are_pinned_and_ray_is_the_clusters_own():
    pins = pinned()
    names = [pin.partition("==")[0] for pin in pins]
    # matplotlib: a sweep draws on the nodes.
    assert {"torch", "diffusers", "pillow", "pyarrow", "s3fs", "matplotlib", "jinja2"} <= set(names)
    assert not {"ray", "pytest", "ruff", "kornia", "optuna"} & set(names)
    assert all("==" in pin and "+" not in pin for pin in pins)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", 3, 3),
        ("FAILED", 75, 75),
        ("FAILED", 1, 1),
        ("FAILED", 42, 1),
        ("FAILED", 137, 75),
        ("FAILED", None, 1),
        ("STOPPED", None, 75),
    ],
)
def test_a_jobs_end_becomes_a_documented_exit_code(status, code, expected):
    assert exit_code(details(status, code)) == expected


class Cluster:
    """The methods of a client that `submit` needs, over a list of jobs."""

    def __init__(self, *jobs: JobDetails) -> None:
        self.jobs = list(jobs)
        self.sent: list[dict] = []
        self.stopped: list[str] = []

    def list_jobs(self):
        return self.jobs

    def get_address(self):
        return "http://here"

    def submit_job(self, **request):
        assert (Path(request["runtime_env"]["working_dir"]) / "run.yaml").exists()
        self.sent.append(request)
        self.jobs.append(details("RUNNING", name=request["submission_id"]))

    def get_job_info(self, name):
        return next(job for job in self.jobs if job.submission_id == name)

    def stop_job(self, name):
        self.stopped.append(name)
        self.get_job_info(name).status = JobStatus.STOPPED

    async def tail_job_logs(self, name):
        yield "one\n"
        yield "two\n"


@pytest.mark.parametrize(
    ("before", "again", "name", "attached"),
    [
        ([], False, "", False),
        ([("", "RUNNING")], False, "", True),
        ([("", "PENDING")], True, "", True),
        ([("", "SUCCEEDED")], False, "", True),
        ([("", "SUCCEEDED")], True, "-2", False),
        ([("", "STOPPED")], False, "-2", False),
        ([("", "STOPPED"), ("-2", "FAILED")], False, "-3", False),
        ([("", "STOPPED"), ("-9", "STOPPED"), ("-10", "RUNNING")], False, "-10", True),
        ([("-2x", "RUNNING")], False, "", False),
    ],
)
def test_a_run_is_joined_resumed_or_begun(before, again, name, attached):
    base = order().identity
    jobs = [details(status, 1 if status == "FAILED" else None, base + suffix) for suffix, status in before]
    cluster = Cluster(*jobs)
    assert room._place(cluster, order(again=again, image_has_deps=True)) == (base + name, attached)
    assert len(cluster.sent) == (not attached)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_refused_submission_is_told_from_one_that_came_second_by_the_list_of_jobs(elsewhere):
    cluster = Cluster()

    def refuse(**request):
        if elsewhere:
            cluster.jobs.append(details("RUNNING", name=request["submission_id"]))
        raise RuntimeError("Request failed with status code 500: it already went wrong")

    cluster.submit_job = refuse
    if elsewhere:
        assert room._place(cluster, order(image_has_deps=True)) == (order().identity, True)
    else:
        with pytest.raises(ConfigError, match="the cluster refused the job"):
            room._place(cluster, order(image_has_deps=True))


def test_ctrl_c_asks_and_nothing_else_and_the_job_is_left_alone_unless_told(monkeypatch):
    cluster, shown = Cluster(), []
    monkeypatch.setattr(room, "open_cluster", lambda *_: cluster)

    def submit(answer, stop):
        def interrupt(text):
            shown.append(text)
            raise stop

        return room.submit(order(image_has_deps=True), stop_on_interrupt=answer, show=interrupt)

    goes_on = r"goes on without this terminal.*ray job stop eclipse-ray-purify"
    for answer, stop in (None, KeyboardInterrupt), (lambda _name: True, InterruptedRunError("stopped")):
        with pytest.raises(InterruptedRunError, match=goes_on):
            submit(answer, stop)
    assert (cluster.stopped, shown) == ([], ["one\n", "one\n"])
    assert submit(lambda _name: True, KeyboardInterrupt).exit_code == 75
    assert cluster.stopped == [order().identity]


def test_a_lost_connection_is_made_again_and_shows_nothing_twice(monkeypatch):
    cluster = Cluster(details("RUNNING", name="job"))
    tails = iter([["one\n", OSError("lost")], ["one\n", "two\n"]])

    async def tail(name):
        last = None
        for last in next(tails):
            if isinstance(last, OSError):
                raise last
            yield last
        cluster.get_job_info("job").status = JobStatus.SUCCEEDED

    cluster.tail_job_logs = tail
    monkeypatch.setattr(room, "_RECONNECT_SECONDS", 0)
    shown: list[str] = []
    room._follow(cluster, "job", shown.append)
    assert "".join(shown) == "one\ntwo\n"


@pytest.mark.parametrize(
    "changes",
    [
        {"arguments": ("https://me:hunter2@host/in",)},
        {"arguments": ("--data", "https://host/in?token=hunter2")},
        {"env": {"AWS_SECRET_ACCESS_KEY": "hunter2"}},
        {"env": {"PROXY": "http://me:hunter2@proxy"}},
    ],
)
def test_secrets_do_not_leave_this_machine(changes):
    with pytest.raises(ConfigError) as caught:
        room.submit(order(**changes), address="http://127.0.0.1:1", show=print)
    assert "hunter2" not in str(caught.value)


@pytest.fixture
def dashboard():
    """Yield a function that starts a dashboard: the token it asks for, if any, and its Ray's version."""
    servers = []

    def start(token: str | None, version: str = "2.60.0") -> str:
        class Answers(BaseHTTPRequestHandler):
            def do_GET(self):
                given = self.headers.get("Authorization")
                allowed = token is None or given == f"Bearer {token}"
                self.send_response(200 if allowed else 401 if given is None else 403)
                self.end_headers()
                answer = {"version": "4", "ray_version": version} if "version" in self.path else []
                self.wfile.write(json.dumps(answer).encode() if allowed else b"")

            def log_message(self, *_):
                return

        server = HTTPServer(("127.0.0.1", 0), Answers)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def token(monkeypatch, tmp_path):
    """Give this process a token, and no other cluster to go to."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    # Ray's own client would go there, whatever it is told.
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    return monkeypatch


def test_a_cluster_with_a_token_is_opened_at_the_address_given(dashboard, token):
    url = dashboard("right")
    assert open_cluster(url, False).get_address() == url
    assert open_cluster(url.removeprefix("http://"), False).get_address() == url


def test_no_wrong_or_unasked_token_is_refused(dashboard, token):
    url, open_url = dashboard("right"), dashboard(None)
    with pytest.raises(ConfigError, match="asks nobody for a token"):
        open_cluster(open_url, False)
    assert open_cluster(open_url, True).get_address() == open_url
    token.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(ConfigError, match="does not accept this token"):
        open_cluster(url, False)
    token.delenv("RAY_AUTH_TOKEN")
    with pytest.raises(ConfigError, match="no token for"):
        open_cluster(url, False)
    with pytest.raises(ConfigError, match="asks for a token"):
        open_cluster(url, True)


def test_an_old_ray_or_nobody_at_all_is_refused(dashboard, token):
    with pytest.raises(ConfigError, match=r"Ray 2\.54\.1 on the cluster .* is older than 2\.59"):
        open_cluster(dashboard("right", "2.54.1"), False)
    with pytest.raises(InterruptedRunError, match="no cluster answers"):
        open_cluster("http://127.0.0.1:1", False)
    for address in ("ray://host:10001", "https://me:hunter2@host", None):
        with pytest.raises(ConfigError):
            open_cluster(address, False)


def test_the_token_is_found_where_ray_finds_it(token, tmp_path):
    assert find_token() == ("right", "RAY_AUTH_TOKEN")
    token.delenv("RAY_AUTH_TOKEN")
    assert find_token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("home\n")
    assert find_token() == ("home", str(tmp_path / ".ray/auth_token"))
    token.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN_PATH"):
        find_token()


def test_what_no_machine_can_hold_is_refused():
    cluster = Resources(cpus=8, gpus=2, cores=4, local=False, nodes=((0, 0), (4, 0), (4, 2)))
    require_place(cluster, 4, 2, "work")
    with pytest.raises(ConfigError, match=r"work needs 5 CPUs and 0 GPUs on one machine.*4 and 2"):
        require_place(cluster, 5, 0, "work")
    with pytest.raises(ConfigError, match="needs 3 GPUs, the Ray cluster has 2"):
        require_gpus(cluster, 3, "purify.actors=3 with purify.num_gpus=1")
