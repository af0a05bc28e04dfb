"""Who else gets curves: TensorBoard for real, the others by what is asked of them; and nobody ends a run."""

import pytest

from eclipse_ray import verbs
from eclipse_ray.cluster import metrics
from eclipse_ray.cluster.metrics import open_curves
from eclipse_ray.errors import ConfigError
from eclipse_ray.experiments import run
from tests.support import DEBUG, wait_until


def test_tensorboard_gets_values_under_plain_names(tmp_path):
    curves = open_curves(["tensorboard"], str(tmp_path))
    curves.log({"ar, eclipse+aa, small, seed 0": 61.5}, 3)
    (events,) = tmp_path.glob("_eclipse/tensorboard/*/events.*")
    wait_until(lambda: b"ar/eclipse_aa/small/seed_0" in events.read_bytes(), "a value", 60)


def test_a_logger_that_fails_is_given_up_and_said_once(tmp_path, monkeypatch, capsys):
    told = []

    def broken(values, step):
        raise ConnectionError("server is away")

    monkeypatch.setitem(metrics.MODULES, "mlflow", "json")
    monkeypatch.setitem(metrics.OPEN, "mlflow", lambda folder, run: broken)
    monkeypatch.setitem(metrics.OPEN, "tensorboard", lambda folder, run: lambda values, step: told.append(step))
    curves = open_curves(["mlflow", "tensorboard"], str(tmp_path))
    for step in (1, 2, 3):
        curves.log({"loss": 0.5}, step)
    assert told == [1, 2, 3]
    assert capsys.readouterr().err.count("note: mlflow gets no more curves: ConnectionError: server is away") == 1


def test_one_that_cannot_be_opened_is_given_up_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(metrics.MODULES, "wandb", "json")
    open_curves(["wandb"], str(tmp_path)).log({"loss": 0.5}, 1)
    assert "note: wandb gets no more curves" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "folder", "words"),
    [
        ("mlflow", "out", "mlflow needs no_such_module, which is not installed"),
        ("wandb", "out", "wandb needs no_such_module, which is not installed"),
        ("tensorboard", "memory://somewhere", "tensorboard writes to a folder, and memory://somewhere is none"),
        ("tensorboard", None, "give one with --out"),
    ],
)
def test_a_logger_that_is_not_installed_or_has_no_folder_is_refused(monkeypatch, name, folder, words):
    for absent in "mlflow", "wandb":
        monkeypatch.setitem(metrics.MODULES, absent, "no_such_module")
    with pytest.raises(ConfigError, match=words):
        open_curves([name], folder)


@pytest.mark.parametrize("clean", [False, True], ids=["evaluate", "matrix"])
def test_nothing_starts_before_a_missing_logger_is_refused(clean, world, tmp_path, monkeypatch):
    def start(_):
        raise AssertionError("Ray was started")

    monkeypatch.setitem(metrics.MODULES, "mlflow", "no_such_module")
    monkeypatch.setattr(run, "connect", start)
    sets = {"data.source": world.rest, "data.test": world.test, "data.output": str(tmp_path)}
    cells = {"matrix.clean": clean, "matrix.defenses": ["none"], "run.loggers": ["mlflow"]}
    with pytest.raises(ConfigError, match="no_such_module"):
        verbs.evaluate(settings={**DEBUG, **sets, **cells})
