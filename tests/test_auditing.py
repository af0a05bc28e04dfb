"""`audit` end to end on Ray: the command line, what it leaves behind, a denoiser's residual, refusals."""

import json
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
from ray.exceptions import NodeDiedError

from eclipse_ray import auditing, verbs
from eclipse_ray.auditing import Crop, balanced, common_side
from eclipse_ray.config import load_config
from eclipse_ray.datasets.synthetic import write_synthetic
from eclipse_ray.diffusion import network
from eclipse_ray.errors import ConfigError, InputError, InterruptedRunError, error_of_note
from tests.support import run_cli


def crop(label: int, draw: float, side: int = 16) -> Crop:
    return Crop(f"{label}-{draw}", label, draw, np.zeros((side, side, 3), np.uint8), None)


def test_a_poisoned_dataset(world, tmp_path):
    out = tmp_path / "audit"
    found = run_cli("audit", world.poisoned, "--clean", world.clean, "--out", str(out))
    assert (found["verdict"], found["frequency"], found["scope"]) == ("poisoned", "high", "sample")
    assert found["p_value"] < 0.01
    assert found["recommended"] == {"t_star": 400, "p": 0.4, "sigma": 0.05}
    assert (found["images"], found["classes"], found["clean_images"]) == (240, 10, 20)
    names = {score["name"] for score in found["evidence"]}
    views = {"predictability", "coarse", "colour", "autocorrelation", "convolution"}
    assert names == views | {"class_mean", "transfer"}
    assert json.loads((out / "audit.json").read_text()) == found
    assert (out / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert load_config(str(out / "config.yaml")).data.source == world.poisoned


@pytest.mark.chaos
def test_the_residual_of_a_denoiser(world):
    clean = verbs.audit(world.rest, denoiser=world.denoiser)
    assert (clean.verdict, clean.frequency, clean.scope) == ("clean", None, None)
    assert clean.recommended == {"t_star": None, "p": None, "sigma": None}
    poisoned = verbs.audit(world.poisoned, denoiser=world.denoiser)
    assert poisoned.verdict == "poisoned"


def hang(*_):
    yield [], 0, 0
    time.sleep(600)


def break_down(*_):
    yield [], 0, 0
    raise NodeDiedError("a page\nof words")


@pytest.mark.parametrize(
    ("stream", "words"),
    [(hang, r"audit stopped: no chunk was finished for .* s"), (break_down, "a machine of the cluster was lost")],
)
def test_an_audit_whose_workers_hang_or_are_lost_ends_with_75_and_a_sentence(world, monkeypatch, stream, words):
    monkeypatch.setattr(auditing, "_stream", stream)
    with pytest.raises(InterruptedRunError, match=words + ".*; run the same command again to resume") as caught:
        verbs.audit(world.rest, settings={"run.watchdog_seconds": 0.5})
    assert caught.value.exit_code == 75


def test_a_worker_that_cannot_open_the_denoiser_says_so(world, monkeypatch):
    monkeypatch.setattr(network, "_capabilities", dict)
    config = load_config(None, {"audit.denoiser": world.denoiser, "purify.precision": "int8"})
    crops = auditing.pack({"read": [0]}, auditing.CROPS_SCHEMA.empty_table(), [], [])
    actor = auditing.Denoised(SimpleNamespace(config=config))
    error = error_of_note(actor(crops)["fatal"][0].as_py())
    assert isinstance(error, ConfigError)
    assert "needs a CPU with AVX512-VNNI" in str(error)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"purify.precision": "int8"}, "needs a CPU with AVX512-VNNI, and this machine computes on"),
        ({"purify.t_star": 999}, r"purify.t_star 999 is outside 1\.\."),
        ({"purify.tile_overlap": 300}, "purify.tile_overlap 300 exceeds half of a tile"),
    ],
    ids=str,
)
def test_what_a_denoiser_or_this_machine_would_refuse_is_refused_before_ray_starts(
    world, tmp_path, monkeypatch, settings, words
):
    def no_cluster(*_given):
        raise InterruptedRunError("Ray starts")

    monkeypatch.setattr(network, "_capabilities", dict)
    monkeypatch.setattr(auditing, "connect", no_cluster)
    monkeypatch.setattr("eclipse_ray.purification.run.connect", no_cluster)
    for use in (
        lambda own: verbs.audit(world.rest, denoiser=world.denoiser, settings=own),
        lambda own: verbs.purify(world.rest, str(tmp_path / "out"), denoiser=world.denoiser, settings=own),
    ):
        with pytest.raises(ConfigError, match=words):
            use(settings)
        assert not (tmp_path / "out").exists()
        if "purify.precision" in settings:
            # What other machines are like is not known here.
            with pytest.raises(InterruptedRunError, match="Ray starts"):
                use({**settings, "run.address": "auto"})
            shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_refusals(world, tmp_path):
    with pytest.raises(ConfigError, match="audit needs a dataset"):
        verbs.audit()
    with pytest.raises(InputError, match="share 20 images"):
        verbs.audit(world.clean, clean=world.clean)
    with pytest.raises(InputError, match="the output lies inside the source"):
        verbs.audit(world.rest, out=f"{world.rest}/audit")
    with pytest.raises(InputError, match="no such denoiser folder"):
        verbs.audit(world.rest, denoiser=str(tmp_path / "nowhere"))
    write_synthetic(str(tmp_path / "few"), 40, 16, 0)
    with pytest.raises(InputError, match="40 images of 10 classes"):
        verbs.audit(str(tmp_path / "few"))


def test_the_sample_is_balanced_over_the_largest_classes():
    crops = [crop(0, draw / 100) for draw in range(50)] + [crop(1, draw / 100) for draw in range(10)]
    crops += [crop(2, 0.5), crop(-1, 0.001)]
    chosen = balanced(crops, 20, 2)
    assert [sum(each.label == label for each in chosen) for label in (-1, 0, 1, 2)] == [0, 10, 10, 0]
    assert chosen == sorted(chosen, key=lambda each: (each.draw, each.id))
    assert max(each.draw for each in chosen if each.label == 0) == 0.09
    assert balanced([crop(-1, 0.1)], 10, 2) == []


def test_a_few_small_images_do_not_set_the_side():
    assert common_side([crop(0, 0.0, 32)] * 39 + [crop(0, 0.0, 16)]) == 32
    assert common_side([crop(0, 0.0, 32)] * 9 + [crop(0, 0.0, 16)]) == 16
