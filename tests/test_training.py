"""Ray Train: the folder it leaves, several workers, resume by fingerprint."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray.train.torch
import torch
from ray.train import Checkpoint

from eclipse_ray import training, verbs
from eclipse_ray.cluster.connect import Resources
from eclipse_ray.config import load_config
from eclipse_ray.datasets.memory import load_images
from eclipse_ray.diffusion.checkpoint import load_denoiser, read_card, weights_digest
from eclipse_ray.diffusion.sampling import purify_images
from eclipse_ray.diffusion.training import run_fit, split_heldout, start_fit
from eclipse_ray.errors import ConfigError, InputError, ResumeError
from eclipse_ray.inversion import METHOD, SURROGATES
from eclipse_ray.parameters import resolve
from eclipse_ray.training import _fingerprint, deciding_settings
from tests.datasets.helpers import fill, noise
from tests.support import DEBUG, assignments, board_of, kill_when

SHORT = {**DEBUG, "denoiser.iterations": 20, "denoiser.checkpoint_every": 10, "denoiser.num_workers": 2}


def train(world, output, **settings):
    return verbs.train(clean=world.clean, out=str(output), settings={**SHORT, **settings})


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "denoiser"
    return output, train(world, output)


def test_the_folder_is_a_denoiser(world, trained):
    output, result = trained
    assert result.iterations == 20
    assert result.denoise_psnr > 0
    card = read_card(output)
    assert sorted(card.sparse_hashes) == sorted(load_images(world.clean, resolve(None, None, {}).data).hashes())
    assert [point["iteration"] for point in card.history] == [10, 20]
    assert load_denoiser(output).t_max == 5


def test_running_again_returns_at_once(world, trained):
    output, first = trained
    before = (output / "eclipse.json").stat().st_mtime_ns
    assert train(world, output) == first
    assert (output / "eclipse.json").stat().st_mtime_ns == before


def test_a_training_begun_when_there_were_two_timestep_samplers_is_the_same_run():
    settings = deciding_settings(load_config(None, DEBUG).denoiser)
    assert settings["timestep_sampler"] == "uniform"
    assert "precision" not in settings
    assert settings["spots"] == 0.5
    # What was trained before there were spots has a fingerprint that does not name them.
    assert "spots" not in deciding_settings(load_config(None, {**DEBUG, "denoiser.spots": 0}).denoiser)


def test_other_settings_are_refused_with_the_difference(world, trained):
    with pytest.raises(ResumeError, match=r"denoiser\.learning_rate: 0\.001 -> 0\.01"):
        train(world, trained[0], **{"denoiser.learning_rate": 0.01})


def test_two_workers_train_the_network_of_one_process(world, trained):
    config = load_config(None, SHORT)
    images = torch.from_numpy(load_images(world.clean, config.data).images)
    part, heldout = split_heldout(len(images), config.denoiser.heldout_fraction, config.run.seed)
    fit = start_fit(config.denoiser, config.run.seed, torch.device("cpu"))
    run_fit(fit, images[part], images[heldout], config.run.seed, lambda _: None, lambda _: None)
    assert trained[1].denoise_psnr == pytest.approx(fit.history[-1]["denoise_psnr"], abs=0.01)


@pytest.mark.chaos
def test_a_killed_training_continues(world, trained, tmp_path):
    output = tmp_path / "killed"
    settings = {**SHORT, "denoiser.iterations": 90, "denoiser.checkpoint_every": 30}
    arguments = ["train", "--clean", world.clean, "--out", str(output), *assignments(settings)]

    def checkpointed() -> bool:
        return any(output.glob("_eclipse/train/*/checkpoint_*"))

    kill_when(arguments, checkpointed, tmp_path / "killed.log")
    result = verbs.train(clean=world.clean, out=str(output), settings=settings)
    assert result.iterations == 90
    card = read_card(output)
    iterations = [point["iteration"] for point in card.history]
    assert iterations == sorted(set(iterations))
    assert iterations[-1] == 90


AGAINST = {**DEBUG, "denoiser.iterations": 8, "denoiser.checkpoint_every": 2, "denoiser.num_workers": 1}


@dataclass
class OneProcess:
    """Runs the workers of Ray Train in this process, one after another; `stop_after` reports it is killed."""

    checkpoints: Path
    ranks: int = 1
    stop_after: int | None = None
    reports: int = 0
    rank: int = 0
    world: int = 1

    def get_context(self) -> "OneProcess":
        return self

    def get_world_rank(self) -> int:
        return self.rank

    def get_world_size(self) -> int:
        return self.world

    def get_checkpoint(self) -> Checkpoint | None:
        kept = sorted(self.checkpoints.glob("*"))
        return Checkpoint.from_directory(kept[-1]) if kept else None

    def report(self, _metrics: object, checkpoint: Checkpoint) -> None:
        shutil.copytree(checkpoint.path, self.checkpoints / f"{len(list(self.checkpoints.glob('*'))):03d}")
        self.reports += 1
        if self.reports == self.stop_after:
            raise KeyboardInterrupt

    def fit(self, trainer, worker, settings, _name, show, line, _watch, _callbacks) -> Checkpoint | None:
        common = {"config": trainer.config.model_dump(mode="json"), "output": trainer.store.url, "threads": 0}
        surrogates = worker is training._surrogate_worker
        self.world = self.ranks if surrogates else 1
        with line:
            for rank in range(self.world):
                self.rank = rank
                worker({**common, "board": board_of(show), **settings})
        return None if surrogates else self.get_checkpoint()


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Return what puts OneProcess in the place of Ray."""

    def put(**options: int) -> OneProcess:
        one = OneProcess(tmp_path / "checkpoints", **options)
        for name in ("get_context", "get_checkpoint", "report"):
            monkeypatch.setattr(ray.train, name, getattr(one, name))
        monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
        monkeypatch.setattr(ray.train.torch, "prepare_model", lambda model: model)
        monkeypatch.setattr(ray, "put", lambda value: value)
        monkeypatch.setattr(ray, "get", lambda value: value)
        monkeypatch.setattr(training, "connect", lambda _config: Resources(2, 0, 2, True))
        monkeypatch.setattr(training._Trainer, "fit", lambda *given: one.fit(*given))
        return one

    return put


def train_against(world, clean, output, **settings):
    return verbs.train(clean=clean, against=world.poisoned, out=str(output), settings={**AGAINST, **settings})


def files_of(output) -> dict[str, bytes]:
    """Return the weights of the denoiser and of its surrogates."""
    found = [*output.glob("_eclipse/surrogates/*"), *output.glob("*.safetensors")]
    return {file.name: file.read_bytes() for file in found}


def test_a_denoiser_is_trained_against_a_suspicious_set_without_labels_of_the_trusted(
    world, unlabelled, here, tmp_path, capfd
):
    here(ranks=2)
    result = train_against(world, unlabelled, tmp_path / "out")
    assert result.iterations == 8
    card = read_card(tmp_path / "out")
    assert card.sparse_images == 20
    recorded = card.settings["against"]
    assert recorded["source"] == world.poisoned
    assert (recorded["images"], recorded["surrogate_seeds"]) == (240, [0, 1])
    assert recorded.items() >= METHOD.items()
    assert load_denoiser(tmp_path / "out").t_max == 5
    said = capfd.readouterr().err
    assert "train, part 2 of 3: surrogates: 8/8 epochs" in said
    assert "train, part 3 of 3: denoiser: 8/8 iterations" in said
    assert "whether classes were blurred cannot be told: that takes 100 trusted images" in said
    # Labels that trusted images have are not used: the same weights, whoever fits the surrogates.
    here(ranks=1).checkpoints = tmp_path / "others"
    train_against(world, world.clean, tmp_path / "labelled")
    one, other = files_of(tmp_path / "out"), files_of(tmp_path / "labelled")
    assert len(one) == 1 + SURROGATES == len(set(one.values()))
    assert one["0.safetensors"] == other["0.safetensors"]
    assert one["1.safetensors"] == other["1.safetensors"]


def test_a_filter_of_a_class_is_kept_and_undone(world, unlabelled, here, tmp_path, monkeypatch, capfd):
    here()
    taps = torch.full((5, 5), 0.02)
    taps[2, 2] = 0.52
    looked = []

    def found(_trusted, suspicious, _labels, _seed, sets, _told):
        looked.append((len(suspicious), sets))
        return {1: taps}

    monkeypatch.setattr(training, "find_filters", found)
    train_against(world, unlabelled, tmp_path / "out")
    # Resumed before it had a card: what was found is in the folder.
    (tmp_path / "out/eclipse.json").unlink()
    train_against(world, unlabelled, tmp_path / "out")
    assert looked == [(240, 8)]
    assert "each of these classes was blurred" in capfd.readouterr().err
    source = load_images(world.poisoned, load_config(None, DEBUG).data)
    own = [name for name, label in zip(source.hashes(), source.labels, strict=True) if label == 1]
    (recorded,) = read_card(tmp_path / "out").filters
    assert (recorded.label, recorded.images) == (1, sorted(own))
    denoiser = load_denoiser(tmp_path / "out")
    rows = [int(np.flatnonzero(source.labels == label)[0]) for label in (0, 1)]
    images, ids = torch.from_numpy(source.images[rows]), ["a", "b"]
    after = purify_images(images, denoiser, t_star=4, ids=ids)
    denoiser.filters = {}
    before = purify_images(images, denoiser, t_star=4, ids=ids)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])
    # Another filter is another denoiser for a run that goes on.
    digest = weights_digest(tmp_path / "out")
    card = json.loads((tmp_path / "out/eclipse.json").read_text())
    card["filters"][0]["taps"][0][0] = 0.03
    (tmp_path / "out/eclipse.json").write_text(json.dumps(card))
    assert weights_digest(tmp_path / "out") != digest


@pytest.mark.parametrize("stop_after", [None, 2])
def test_a_training_against_a_set_that_is_stopped_goes_on_with_its_surrogates(
    world, unlabelled, here, tmp_path, monkeypatch, stop_after
):
    here()
    train_against(world, unlabelled, tmp_path / "whole")
    shutil.rmtree(tmp_path / "checkpoints")
    output = tmp_path / "stopped"
    fitted, fit = [], training.fit_surrogate

    def once(suspicious, iterations, seed, session):
        if stop_after is None and fitted == [0]:
            fitted.append(None)
            raise KeyboardInterrupt
        fitted.append(seed)
        return fit(suspicious, iterations, seed, session)

    monkeypatch.setattr(training, "fit_surrogate", once)
    here(stop_after=stop_after or 0)
    with pytest.raises(KeyboardInterrupt):
        train_against(world, unlabelled, output)
    assert not (output / "eclipse.json").exists()
    here()
    assert train_against(world, unlabelled, output).iterations == 8
    assert [seed for seed in fitted if seed is not None] == [0, 1]
    assert files_of(output) == files_of(tmp_path / "whole")


def test_a_training_without_a_suspicious_set_has_the_fingerprint_and_the_card_that_it_had(trained):
    config = load_config(None, DEBUG)
    found = _fingerprint(config, ["b", "a"], None)
    assert found.config.keys() == {"denoiser", "data", "run"}
    assert found == _fingerprint(load_config(None, {**DEBUG, "denoiser.against": "elsewhere"}), ["a", "b"], None)
    assert "against" not in found.config["denoiser"]
    assert "against" not in read_card(trained[0]).settings
    assert files_of(trained[0]).keys() == {"diffusion_pytorch_model.safetensors"}


def test_another_suspicious_set_is_another_training(world, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_run_training", lambda *_given: None)
    with pytest.raises(InputError, match="not a denoiser folder"):
        train_against(world, world.clean, tmp_path / "out")
    with pytest.raises(ResumeError, match=r"against\.content"):
        verbs.train(clean=world.clean, against=world.rest, out=str(tmp_path / "out"), settings=AGAINST)
    with pytest.raises(ResumeError, match="against"):
        verbs.train(clean=world.clean, out=str(tmp_path / "out"), settings=AGAINST)


def test_a_suspicious_set_that_is_trusted_or_without_labels_or_of_one_is_refused(world, unlabelled, tmp_path):
    shared = r"share 20 images \(by content\); they must be disjoint"
    for against, words in (world.clean, shared), (unlabelled, "has no labels"):
        with pytest.raises(InputError, match=words):
            verbs.train(clean=world.clean, against=against, out=str(tmp_path / "out"), settings=SHORT)
    for label, count in (("a", 20), ("b", 1)):
        (tmp_path / "one" / label).mkdir(parents=True)
        for index in range(count):
            shutil.copy(Path(unlabelled) / f"{index}.png", tmp_path / "one" / label / f"{index}.png")
    # It cannot be decoded, and so it is left out.
    (tmp_path / "one/b/0.png").write_bytes(b"")
    with pytest.raises(InputError, match="all images have one label"):
        verbs.train(clean=world.test, against=str(tmp_path / "one"), out=str(tmp_path / "out"), settings=SHORT)


@pytest.mark.chaos
def test_images_of_several_sizes_are_trained_on_by_crops(tmp_path):
    images = [noise(1, *size)[0] for size in [(16, 16), (40, 17), (25, 60), (18, 18)]]
    source = fill(tmp_path / "src", *(f"{index}.png" for index in range(4)), images=images)
    settings = {**SHORT, "denoiser.iterations": 4, "denoiser.num_workers": 2}
    result = verbs.train(clean=source, out=str(tmp_path / "out"), settings=settings)
    assert result.iterations == 4
    assert read_card(tmp_path / "out").sparse_images == 4


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"denoiser.image_size": 32}, InputError, "is 16x16 pixels, the denoiser trains on 32x32"),
        ({"denoiser.num_workers": 17}, ConfigError, "num_workers 17 exceeds batch_size 16"),
        ({"denoiser.num_workers": 500, "denoiser.batch_size": 500}, ConfigError, "needs 500 CPUs"),
        ({"denoiser.use_gpu": True}, ConfigError, "needs 2 GPUs, the Ray cluster has 0"),
    ],
)
def test_what_cannot_be_trained_is_refused(world, tmp_path, settings, error, words):
    with pytest.raises(error, match=words):
        train(world, tmp_path / "bad", **settings)


def test_a_denoiser_is_not_written_among_the_images_it_learns_from(world):
    with pytest.raises(InputError, match="the output lies inside the source"):
        train(world, Path(world.clean) / "denoiser")
    with pytest.raises(InputError, match="the output lies inside the source"):
        train(world, Path(world.poisoned) / "denoiser", **{"denoiser.against": world.poisoned})
    for verb in (verbs.status, verbs.verify):
        with pytest.raises(InputError, match="this is a denoiser, the output of train"):
            verb(world.denoiser)


@pytest.mark.chaos
def test_curves_go_to_the_loggers_asked_for(world, tmp_path):
    output = tmp_path / "logged"
    train(world, output, **{"denoiser.num_workers": 1, "run.loggers": ["tensorboard"]})
    (events,) = output.glob("_eclipse/tensorboard/*/events.*")
    assert b"denoise_psnr" in events.read_bytes()
