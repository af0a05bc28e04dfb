"""Numbers of every poison: published ones are there, resolution is complete, shown and final."""

import pytest

from eclipse_ray.config import POISON_VARIANTS, Config, PoisonConfig, load_config, to_yaml
from eclipse_ray.poisons.costs import NUMBER_FIELDS, POISON_COSTS, resolved_poison

ALL = [("em", {"scope": scope}, scope) for scope in ("sample", "class")]
ALL += [(name, {}, "") for name in ("tap", "rem")]
ALL += [(name, {"variant": value}, value) for name, values in POISON_VARIANTS.items() for value in values]


@pytest.mark.parametrize("cost", ["full", "reduced"])
@pytest.mark.parametrize(("name", "form", "key"), ALL)
def test_a_resolved_poison_has_every_number_of_its_cost(name, form, key, cost, tmp_path):
    resolved = resolved_poison(PoisonConfig(name=name, cost=cost, **form))
    row = POISON_COSTS[name, key, cost]
    assert {field: getattr(resolved, field) for field in row} == row
    assert all(getattr(resolved, field) is None for field in NUMBER_FIELDS - row.keys())
    assert resolved.eps_255 == 8
    assert resolved_poison(resolved) == resolved
    (tmp_path / "config.yaml").write_text(to_yaml(Config(poison=resolved)))
    assert resolved_poison(load_config(str(tmp_path / "config.yaml")).poison) == resolved


def test_every_row_belongs_to_a_poison():
    assert set(POISON_COSTS) == {(name, key, cost) for name, _, key in ALL for cost in ("full", "reduced")}


def test_published_numbers():
    em = resolved_poison(PoisonConfig(name="em"))
    assert (em.steps, em.step_size_255, em.round_batches, em.stop_error) == (20, 0.8, 10, 0.01)
    assert (em.surrogate, em.surrogate_batch_size, em.max_grad_norm, em.surrogate_augment) == (
        "resnet18",
        512,
        5,
        False,
    )
    classwise = resolved_poison(PoisonConfig(name="em", scope="class"))
    assert (classwise.steps, classwise.subset, classwise.stop_error) == (1, 0.2, 0.1)
    tap = resolved_poison(PoisonConfig(name="tap"))
    assert (tap.surrogate_epochs, tap.steps, tap.step_size_255, tap.restarts, tap.target_shift) == (
        40,
        250,
        0.4,
        8,
        1,
    )
    rem = resolved_poison(PoisonConfig(name="rem"))
    assert (rem.train_steps, rem.steps, rem.eot_draws, rem.adversary_steps) == (5000, 10, 5, 10)
    assert (rem.adversary_eps_255, rem.adversary_step_size_255, rem.step_size_255) == (4, 0.8, 1.6)
    sep = resolved_poison(PoisonConfig(name="sep"))
    assert (sep.variant, sep.checkpoints, sep.steps) == ("plain", 30, 30)
    assert resolved_poison(PoisonConfig(name="sep", variant="fa_vr")).checkpoints == 15
    efp = resolved_poison(PoisonConfig(name="efp"))
    assert (efp.variant, efp.steps, efp.adversary_steps, efp.adversary_eps_255) == ("push", 300, 10, 4)


def test_a_number_that_was_chosen_stays_and_a_useless_one_is_dropped():
    resolved = resolved_poison(PoisonConfig(name="tap", cost="reduced", steps=7, rounds=3))
    assert (resolved.steps, resolved.rounds, resolved.restarts) == (7, None, 1)


def test_closed_forms_have_no_cost():
    assert resolved_poison(PoisonConfig(name="urp")).scope == "class"
    assert resolved_poison(PoisonConfig(name="cuda")).scope == "class"
    assert resolved_poison(PoisonConfig(name="lsp")) == PoisonConfig(name="lsp", scope="sample")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "efp", "variant": "plain"}, "it has push, pull"),
        ({"name": "em", "variant": "push"}, "it has none"),
        ({"name": "tap", "scope": "class"}, "only scope sample"),
        ({"name": "cuda", "scope": "sample"}, "only scope class"),
        ({"name": "em", "eps_255": 200}, "1 to 127"),
    ],
)
def test_settings_that_no_poison_has_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PoisonConfig(**settings)
