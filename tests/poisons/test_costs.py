"""Numbers of every poison: published ones are the defaults, resolution is complete, shown and final."""

import pytest

from eclipse_ray.config import Config, PoisonConfig, load_config, to_yaml, with_overrides
from eclipse_ray.errors import ConfigError
from eclipse_ray.poisons import OPTIMISED, poison_settings, resolved_poison, settings_of, variant_of

FORMS = [(name, {}) for name in ("urp", "lsp", "ar", "cuda", "tap", "rem")]
FORMS += [("em", {"scope": scope}) for scope in ("sample", "class")]
FORMS += [("sep", {"variant": one}) for one in ("plain", "fa_vr")]
FORMS += [("efp", {"variant": one}) for one in ("push", "pull")]
FORMS += [("adp", {"variant": one}) for one in ("paper", "strong")]


@pytest.mark.parametrize("cost", ["full", "reduced"])
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_resolved_poison_has_every_setting_written_out(name, form, cost, tmp_path):
    config = PoisonConfig(name=name, cost=cost, **form)
    resolved = resolved_poison(config)
    assert resolved.own().items() >= form.items()
    assert settings_of(resolved) == settings_of(config)
    written = resolved.model_dump()
    assert all(key in written for key in poison_settings()[name].model_fields)
    assert resolved_poison(resolved) == resolved
    (tmp_path / "config.yaml").write_text(to_yaml(Config(poison=resolved)))
    assert load_config(str(tmp_path / "config.yaml")).poison == resolved
    # Its cost is spelt out, so it does not change any more.
    assert settings_of(resolved.model_copy(update={"cost": "full"})) == settings_of(config)


@pytest.mark.parametrize(("name", "model"), poison_settings().items())
def test_numbers_are_those_of_settings_of_the_poison(name, model):
    for form, numbers in model.numbers.items():
        assert numbers.keys() <= model.model_fields.keys(), form
    assert ({"full", "reduced"} <= model.numbers.keys()) == (name in OPTIMISED)


def numbers(name, **chosen):
    return settings_of(PoisonConfig(name=name, **chosen))


def test_published_numbers():
    em = numbers("em")
    assert (em.steps, em.step_size_255, em.round_batches, em.stop_error) == (20, 0.8, 10, 0.01)
    assert (em.surrogate, em.surrogate_batch_size, em.max_grad_norm) == ("resnet18", 512, 5)
    classwise = numbers("em", scope="class")
    assert (classwise.steps, classwise.subset, classwise.stop_error) == (1, 0.2, 0.1)
    tap = numbers("tap")
    assert (tap.surrogate_epochs, tap.steps, tap.step_size_255, tap.restarts) == (40, 250, 0.4, 8)
    assert (tap.target_shift, tap.surrogate_schedule) == (1, "linear")
    rem = numbers("rem")
    assert (rem.train_steps, rem.steps, rem.eot_draws, rem.adversary_steps) == (5000, 10, 5, 10)
    assert (rem.adversary_eps_255, rem.adversary_step_size_255, rem.step_size_255) == (4, 0.8, 1.6)
    sep = numbers("sep")
    assert (sep.variant, sep.checkpoints, sep.steps, sep.surrogate_milestones) == ("plain", 30, 30, (75, 90))
    assert (numbers("sep", variant="fa_vr").checkpoints, numbers("sep", variant="fa_vr").inner_draws) == (15, 15)
    efp = numbers("efp")
    assert (efp.variant, efp.steps, efp.adversary_steps, efp.adversary_eps_255) == ("push", 300, 10, 4)
    adp = numbers("adp")
    assert (adp.surrogate, adp.unet_channels, adp.compensation_coarse_sigma) == ("unet", (64, 128, 256), 0)
    strong = numbers("adp", variant="strong")
    assert (strong.surrogate, strong.eot_draws, strong.compensation_coarse_sigma) == ("resnet18", 4, 0.08)
    assert all(numbers(name).eps_255 == 8 for name in OPTIMISED if name != "ops")
    assert numbers("ops").budget((32, 32, 3))[0] == "none"


def test_reduced_numbers_depend_on_the_form():
    assert (numbers("em", cost="reduced").steps, numbers("em", cost="reduced", scope="class").steps) == (4, 1)
    assert (numbers("em", cost="reduced").surrogate, numbers("em", cost="reduced").rounds) == ("small", 24)
    assert [numbers("sep", cost="reduced", variant=one).checkpoints for one in ("plain", "fa_vr")] == [6, 4]
    paper, strong = (numbers("adp", cost="reduced", variant=one) for one in ("paper", "strong"))
    assert (paper.surrogate, paper.unet_channels, paper.rounds) == ("unet", (16, 32), 8)
    assert (strong.surrogate, strong.eot_draws, strong.rounds) == ("small", 1, 8)


def test_a_number_that_was_chosen_wins_and_null_is_that_of_the_cost():
    resolved = numbers("tap", cost="reduced", steps=7, restarts=None)
    assert (resolved.steps, resolved.restarts) == (7, 1)
    config = load_config(None, {"poison.name": "tap", "poison.cost": "reduced", "poison.steps": 12})
    assert settings_of(config.poison).steps == 12
    assert settings_of(with_overrides(config, {"poison.steps": 5}).poison).steps == 5


def test_what_a_poison_comes_in_is_named():
    defaults = {"ar": "", "em": "sample", "sep": "plain", "efp": "push"}
    assert {name: variant_of(PoisonConfig(name=name)) for name in defaults} == defaults
    assert variant_of(PoisonConfig(name="em", scope="class")) == "class"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "efp", "variant": "plain"}, r"poison\.variant: .*'push' or 'pull'"),
        ({"name": "em", "variant": "push"}, r"poison\.variant: em has no such setting"),
        ({"name": "tap", "scope": "class"}, r"poison\.scope: .*'sample'"),
        ({"name": "cuda", "scope": "sample"}, r"poison\.scope: .*'class'"),
        ({"name": "cuda", "eps_255": 8}, r"poison\.eps_255: cuda has no such setting"),
        ({"name": "em", "eps_255": 200}, r"poison\.eps_255: .*equal to 127"),
        ({"name": "tap", "stepz": 3}, r"poison\.stepz: tap has no such setting; did you mean poison\.steps"),
        ({"name": "tap", "steps": 0}, r"poison\.steps: .*greater than or equal to 1"),
        ({"name": "tap", "rounds": 3}, r"poison\.rounds: tap has no such setting"),
        (
            {"name": "tap", "foo": 1, "step": 3},
            r"poison\.foo, poison\.step: tap has .*; did you mean poison\.steps$",
        ),
        ({"name": "tab"}, r"poison\.name: tab is unknown; did you mean tap\?"),
        ({"name": "xx"}, r"poison\.name: xx is unknown; there are: urp, lsp,"),
    ],
)
def test_settings_that_a_poison_does_not_have_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        settings_of(PoisonConfig(**settings))
