"""The sets of a sweep: part of the dataset, and clean images of which none that scores trained the denoiser."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from eclipse_ray.cluster.connect import local_denoiser
from eclipse_ray.config import Config
from eclipse_ray.datasets.formats import open_source
from eclipse_ray.datasets.memory import ImageSet, choose_clean, load_images, load_mixed, load_sample
from eclipse_ray.diffusion.checkpoint import read_card
from eclipse_ray.errors import ConfigError, InputError
from eclipse_ray.experiments.evaluate import refuse_shared_images
from eclipse_ray.experiments.sets import given_weights, identity
from eclipse_ray.experiments.space import SPARSE_PERCENT, Recommended, SweepFacts, listed

PERCENT_OF_THREAT_MODEL = 5.0


@dataclass(frozen=True)
class SweepSets:
    """What a sweep reads: `source`, a labelled sample of `total` images; `scored`, clean images for scores.

    `parts` are the images that train a denoiser here, by sparse_percent; empty for a given one. `unseen` is
    False when every clean image trained the given denoiser, so that `scored` had to be taken from those.
    """

    source: ImageSet
    scored: ImageSet
    parts: dict[float | None, ImageSet]
    total: int
    clean: int
    unseen: bool


def load_sets(config: Config) -> SweepSets:
    """Return the sets of data.source and data.clean. Raises ConfigError for a location that is not set.

    Raises InputError for missing labels, sets that share images, two sizes, and when no clean image is left to
    score a victim on.
    """
    data, sweep = config.data, config.sweep
    if not data.source or not data.clean or not data.output:
        raise ConfigError("a sweep needs SRC, --clean SRC and --out DIR")
    clean = load_images(data.clean, data)
    # The denoiser's card names images as they are stored.
    hashes = load_mixed(data.clean, data.model_copy(update={"resize": None})).hashes
    trained, parts = np.zeros(len(hashes), np.bool_), {}
    total = open_source(data.source, data).images
    if config.purify.denoiser:
        known = set(read_card(local_denoiser(config.purify.denoiser)).sparse_hashes)
        trained = np.array([one in known for one in hashes], np.bool_)
    else:
        trained = _chosen(clean, hashes, round((1 - sweep.holdout) * len(hashes)), config.run.seed)
        parts = _parts(config, clean, hashes, trained, total)
    unseen = not trained.all()
    if not unseen and sweep.objective == "proxy_accuracy":
        raise InputError(_all_trained(config, len(hashes)))
    source = load_sample(data.source, data, sweep.images, config.run.seed)
    scored = _of_classes(_rows(clean, ~trained if unseen else trained), source)
    sets = SweepSets(source, scored, parts, total, len(hashes), unseen)
    refuse_shared_images(f"{data.source}, {data.clean}", set(source.hashes()), set(), set(clean.hashes()))
    _check(config, sets)
    return sets


def facts(config: Config, sets: SweepSets) -> SweepFacts:
    """Return the digests that keys are made of."""
    weights, recommended = "", None
    if config.purify.denoiser:
        card = read_card(local_denoiser(config.purify.denoiser))
        weights = given_weights(config.purify.denoiser)
        recommended = Recommended(card.t_max, card.t_star, card.num_inference_steps, card.sampler)
    sparse = {percent: identity(part) for percent, part in sets.parts.items()}
    return SweepFacts(identity(sets.source), identity(sets.scored), sparse, weights, recommended)


def notes(config: Config, sets: SweepSets) -> list[str]:
    """Return what a user should know before results of these sets are believed."""
    found = []
    percent = 100 * sets.clean / sets.total
    assert sets.source.labels is not None, "a sample has labels"
    sampled, known = len(np.unique(sets.source.labels)), len(sets.source.classes or [])
    if sampled < known:
        found.append(f"the sample has images of {sampled} of {known} classes; a victim is scored on those alone")
    if percent > PERCENT_OF_THREAT_MODEL:
        found.append(f"{sets.clean:,} clean images are {percent:.1f} % of the dataset; results are for such a set")
    if config.sweep.objective == "proxy_accuracy":
        error = 50 / np.sqrt(len(sets.scored.ids) * config.sweep.seeds)
        found.append(
            f"{len(sets.scored.ids):,} images score a victim: one standard error is up to {error:.1f} points"
        )
    else:
        found.append(
            "shortcut_score ranked settings no better than chance on AR, LSP, URP and EM (docs/results.md); "
            "if you can label some clean images, use proxy_accuracy"
        )
        if not sets.unseen:
            found.append("every clean image trained the denoiser: PSNR and score are of images that it has seen")
    return found


def _all_trained(config: Config, count: int) -> str:
    clean, denoiser = config.data.clean, config.purify.denoiser
    return (
        f"{clean}: all {count} images trained {denoiser}, so none is left to score a victim on; divide them with "
        f"`eclipse-ray split {clean} --clean {max(1, count // 2)} --out DIR`, train on DIR/clean and sweep with "
        f"--clean {clean}; or leave --denoiser out, and the sweep trains on a part; or, if they have no labels, "
        "use --set sweep.objective=shortcut_score"
    )


def _parts(
    config: Config, clean: ImageSet, hashes: list[str], pool: NDArray[np.bool_], total: int
) -> dict[float | None, ImageSet]:
    """Return the images that train the denoiser of each sparse_percent, all from `pool`."""
    places = np.flatnonzero(pool)
    found: dict[float | None, ImageSet] = {}
    for percent in [config.sweep.sparse_percent, *listed(config.sweep.space.get(SPARSE_PERCENT, []))]:
        count = len(places) if percent is None else round(percent * total / 100)
        if not 2 <= count <= len(places):
            raise InputError(
                f"{config.data.clean}: {percent} % of {total:,} are {count}, but {len(places)} clean "
                "images may train a denoiser (sweep.holdout keeps the rest); lower sweep.sparse_percent"
            )
        rows = _rows(clean, pool)
        chosen = _chosen(rows, [hashes[place] for place in places], count, config.run.seed)
        found[percent] = _rows(rows, chosen)
    return found


def _chosen(clean: ImageSet, hashes: list[str], count: int, seed: int) -> NDArray[np.bool_]:
    labels = [None] * len(hashes) if clean.labels is None else clean.labels.tolist()
    return choose_clean(list(hashes), labels, count, seed)


def _rows(images: ImageSet, chosen: NDArray[np.bool_]) -> ImageSet:
    places = np.flatnonzero(chosen)
    labels = None if images.labels is None else images.labels[places]
    return replace(
        images, ids=[images.ids[place] for place in places], images=images.images[places], labels=labels
    )


def _of_classes(clean: ImageSet, sample: ImageSet) -> ImageSet:
    """Return the clean images of the sample's classes, for no victim learns another, and those without a label."""
    if clean.labels is None or sample.labels is None:
        return clean
    return _rows(clean, np.isin(clean.labels, sample.labels) | (clean.labels < 0))


def _check(config: Config, sets: SweepSets) -> None:
    source, scored, data = sets.source, sets.scored, config.data
    if not len(scored.ids):
        raise InputError(
            f"{data.clean}: no image of the sample's classes is left to score with; give more, or raise "
            "sweep.holdout"
        )
    if source.images.shape[1:] != scored.images.shape[1:]:
        raise InputError(
            f"{data.source} has {source.images.shape[1:3]} images, {data.clean} has {scored.images.shape[1:3]}; "
            "set data.resize"
        )
    if config.sweep.objective == "shortcut_score":
        return
    if scored.labels is None or int(scored.labels.min()) < 0:
        raise InputError(
            f"{data.clean}: proxy_accuracy needs the labels of clean images; without them use "
            "--set sweep.objective=shortcut_score"
        )
    if source.classes and scored.classes and source.classes != scored.classes:
        raise InputError(f"{data.source} and {data.clean} name their classes differently; give both the same")
