"""Settings: presets, overrides, round trips, errors that name the nearest right spelling; never a secret."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from eclipse_ray import verbs
from eclipse_ray.config import (
    PRESETS,
    RECIPES,
    Config,
    difference,
    digest,
    holds_secret,
    load_config,
    parse_assignment,
    recorded_config,
    to_yaml,
    with_overrides,
)
from eclipse_ray.datasets.synthetic import write_synthetic
from eclipse_ray.errors import ConfigError
from eclipse_ray.parameters import resolve

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SHORT = [
    {"denoiser": {"precision": "float32"}},
    {"denoiser": {"preset": "paper", "precision": None}},
    *({"denoiser": {"preset": preset}, "purify": {"t_star": 3}} for preset in PRESETS),
    *({"victim": {"recipe": recipe, "epochs": 7}} for recipe in RECIPES),
    {"poison": {"name": "tap", "steps": 12}, "defense": {"aa_draws": 3}},
    {"denoiser": {"t_star": 200, "preset": "small"}, "compensation": {"mode": "augment"}},
    *(yaml.safe_load(file.read_text()) for file in CONFIGS),
]
OVERRIDES = [
    {},
    {"denoiser.preset": "paper", "denoiser.iterations": 9},
    {"denoiser.preset": "debug"},
    {"victim.recipe": "modern"},
    {"victim.recipe": "paper", "victim.epochs": 3},
    {"denoiser.preset": "small", "denoiser.t_star": 120},
    {"denoiser.preset": "unet"},
    {"poison.steps": 4, "defense.op_epochs": 2, "run.seed": 5},
]


@pytest.mark.parametrize("overrides", OVERRIDES, ids=str)
@pytest.mark.parametrize("short", SHORT, ids=lambda tree: str(tree)[:60])
def test_a_resolved_file_is_the_same_run_as_the_short_one_it_came_from(short, overrides, tmp_path):
    files = [tmp_path / "short.yaml", tmp_path / "resolved.yaml"]
    files[0].write_text(yaml.safe_dump(short))
    config = load_config(str(files[0]))
    files[1].write_text(to_yaml(config))
    assert load_config(str(files[1])) == config
    try:
        expected = with_overrides(config, overrides)
    except ConfigError as error:
        for file in files:
            with pytest.raises(ConfigError, match=re.escape(str(error))):
                load_config(str(file), overrides)
        return
    assert with_overrides(load_config(str(files[1])), overrides) == expected
    assert [load_config(str(file), overrides) for file in files] == [expected, expected]


def test_paper_preset_is_the_published_setting():
    denoiser = load_config(None, {"denoiser.preset": "paper"}).denoiser
    assert denoiser.block_out_channels == (128, 256, 256, 256)
    assert (denoiser.layers_per_block, denoiser.attention_levels) == (3, (1, 2))
    assert denoiser.t_max == denoiser.num_train_timesteps == 4000
    assert (denoiser.t_star, denoiser.num_inference_steps, denoiser.replication) == (100, 100, 4)
    assert (denoiser.iterations, denoiser.ema_decay, denoiser.ema_warmup) == (250_000, 0.9999, False)
    assert (denoiser.variance_type, denoiser.vlb_weight) == ("learned_range", 1e-3)
    assert denoiser.rescale_timesteps
    assert (denoiser.learning_rate, denoiser.lr_decay, denoiser.warmup_iterations) == (1e-4, "none", 0)
    assert denoiser.max_grad_norm is None
    compensation = load_config(None, {"denoiser.preset": "paper"}).compensation
    assert (compensation.p, compensation.sigma, compensation.coarse_sigma) == (0.4, 0.05, 0.0)
    assert Config().compensation.coarse_sigma > 0


def test_order_of_precedence(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"denoiser": {"preset": "debug", "iterations": 7}, "run": {"seed": 1}}))
    config = load_config(str(file), {"run.seed": 2})
    assert config.denoiser.image_size == 16
    assert config.denoiser.iterations == 7
    assert config.run.seed == 2


def test_t_max_follows_t_star_unless_set():
    assert load_config().denoiser.t_max == 500
    assert load_config(None, {"denoiser.t_star": 200}).denoiser.t_max == 250
    assert with_overrides(load_config(), {"denoiser.t_star": 200}).denoiser.t_max == 250
    assert load_config(None, {"denoiser.t_max": 600}).denoiser.t_max == 600


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"purify.tstar": 1}, "did you mean purify.t_star"),
        ({"denoiser.t_max": 50}, "only timesteps below t_max are trained"),
        ({"denoiser.preset": "unet", "denoiser.block_out_channels": [30, 60]}, "norm_num_groups"),
        ({"denoiser.network": "shuffled", "denoiser.block_out_channels": [32, 64]}, "set network to unet2d"),
        ({"denoiser.network": "shuffled", "denoiser.dropout": 0.1}, "set network"),
        ({"seed": 1}, "section.key, for example run.seed"),
        ({"nothing": 1}, "section.key, for example purify.t_star"),
        ({"compensation.p": 1.5}, "less than or equal to 1"),
        ({"run.watchdog_seconds": float("inf")}, "watchdog_seconds: expected a finite number"),
        ({"poison.eps_255": float("inf")}, "poison.eps_255: expected a finite number"),
    ],
)
def test_mistakes_are_explained_in_one_line(settings, words):
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")) as caught:
        load_config(None, settings)
    assert "\n" not in str(caught.value)


WRONG = [
    (
        "matrix: {defenses: ['']}",
        "matrix.defenses, entry 1: no value is given; write one, or leave the setting out",
    ),
    (
        "matrix: {defenses: [none, 3]}",
        "matrix.defenses, entry 2: expected a text or keys with values, found 3; put it",
    ),
    (
        "matrix: {defenses: [[none]]}",
        "matrix.defenses, entry 1: expected a text or keys with values, found ['none']",
    ),
    (
        "matrix: {defenses: [null]}",
        "matrix.defenses, entry 1: no value is given; write one, or leave the setting out",
    ),
    ("matrix: {poisons: ar}", "matrix.poisons: expected a list, found 'ar'; write [ar]"),
    ("matrix: {poisons: [{1: ar}]}", "matrix.poisons, entry 1: expected a text or names as keys, found {1: 'ar'}"),
    ("matrix: 3", "matrix: expected keys with values, found 3"),
    ("matrix: {nope: 1}", "matrix.nope: unknown setting; did you mean matrix.num_gpus?"),
    ("data: {shard_images: 9}", "data.shard_images: unknown setting; did you mean purify.shard_images?"),
    ("victim: {seeds: 9}", "victim.seeds: unknown setting; did you mean evaluate.seeds or sweep.seeds?"),
    ("victim: {epoch: 9}", "victim.epoch: unknown setting; did you mean victim.epochs?"),
    ("watchdog_seconds: 9", "watchdog_seconds: unknown setting; did you mean run.watchdog_seconds?"),
    ("defense: {epochs: 9}", "defense.epochs: unknown setting; did you mean defense.op_epochs or victim.epochs?"),
    ("defense: {t_max: 9}", "defense.t_max: unknown setting; did you mean denoiser.t_max?"),
    ("poison: {holdout: 9}", "poison.holdout: no poison has such a setting; did you mean sweep.holdout"),
    ("poison: {foo: 1, bar: 2}", "poison.foo, poison.bar: no poison has such a setting; there are poison.scope, "),
    (
        "sweep: {space: {purify.t_star: {low: 1, high: 3, seed: 1}}}",
        "sweep.space.purify.t_star.seed: unknown setting; did you mean sweep.space.purify.t_star.",
    ),
    ("run: {1: 2}", "run: expected names as keys, found 1"),
    ("3: {a: 1}", "settings: expected names as keys, found 3"),
    ("purfy: {t_star: 3}", "purfy: unknown setting; did you mean purify?"),
    ("purify: {t_star: [1]}", "purify.t_star: expected an integer, found [1]"),
    ("purify: {t_star: 1.5}", "purify.t_star: expected an integer, found 1.5"),
    ("purify: {batch_size: null}", "purify.batch_size: no value is given; write one, or leave the setting out"),
    ("purify: {sampler: dmp}", "purify.sampler: expected 'ddpm' or 'ddim', found 'dmp'; did you mean ddpm?"),
    ("purify: {tile: 64, tile_overlap: 60}", "purify: tile_overlap 60 exceeds half of tile 64"),
    ("data: {source: 3}", "data.source: expected a text, found 3; put it into quotes"),
    ("data: {source: {a: b}}", "data.source: expected a text, found {'a': 'b'}"),
    ("data: {strict: maybe}", "data.strict: expected true or false, found 'maybe'"),
    (
        "denoiser: {block_out_channels: [a]}",
        "denoiser.block_out_channels, entry 1: expected an integer, found 'a'",
    ),
    ("denoiser: {block_out_channels: []}", "denoiser.block_out_channels: expected a list of 1 or more, found []"),
    ("compensation: {p: -1}", "compensation.p: expected a number greater than or equal to 0, found -1"),
    ("defense: {aa_draws: 0}", "defense.aa_draws: expected a number greater than or equal to 1, found 0"),
    ("poison: {name: em, steps: many}", "poison.steps: expected an integer, found 'many'"),
    ("victim: {momentum: x}", "victim.momentum: expected a number, found 'x'"),
    ("evaluate: {seeds: -2}", "evaluate.seeds: expected a number greater than or equal to 1, found -2"),
    (
        "sweep: {space: {purify.t_star: 3}}",
        "sweep.space.purify.t_star: expected a list or keys with values, found 3",
    ),
    ("sweep: {space: {purify.t_star: {low: 3}}}", "sweep.space.purify.t_star.high: no value is given; write one"),
    (
        "sweep: {space: {purify.t_star: {low: 1, high: 3, stp: 1}}}",
        "sweep.space.purify.t_star.stp: unknown setting; did you mean sweep.space.purify.t_star.step?",
    ),
    (
        "sweep: {space: {compensation.p: {low: 9, high: 3}}}",
        "sweep.space.compensation.p: low 9 must lie below high 3",
    ),
    (
        "sweep: {space: {purify.t_star: {low: {int: 3, Range: 4}, high: 3}}}",
        "sweep.space.purify.t_star.low: expected an integer or a number, found {'int': 3, 'Range': 4}",
    ),
    (
        "sweep: {space: {Range: {Range: 1, low: 1, high: 2}}}",
        "sweep.space.Range.Range: unknown setting; did you mean",
    ),
    ("sweep: {space: {Range: {low: 1}}}", "sweep.space.Range.high: no value is given; write one"),
    ("sweep: {space: {7: {low: 1}}}", "sweep.space.7.high: no value is given; write one"),
    (
        "sweep: {space: {purify.t_star: {low: true, high: 3}}}",
        "sweep.space.purify.t_star.low: expected a number, fo",
    ),
    *(
        (f"{section}: {{{more}{key}: {value}}}", f"{section}.{key}{where}: expected a number, found True")
        for section, more, key, value, where in [
            ("purify", "", "t_star", "true", ""),
            ("run", "", "seed", "yes", ""),
            ("run", "", "max_cpus", "on", ""),
            ("compensation", "", "p", "true", ""),
            ("denoiser", "", "block_out_channels", "[true]", ", entry 1"),
            ("poison", "", "eps_255", "true", ""),
            ("poison", "name: em, ", "steps", "true", ""),
            ("poison", "name: efp, ", "surrogate_milestones", "[7, true]", ", entry 2"),
            ("defense", "", "aa_draws", "true", ""),
            ("defense", "", "aa_roughness", "[0, true]", ", entry 2"),
        ]
    ),
    *(
        (
            f"{section}: {{{key}: {value}}}",
            f"{section}.{key.rpartition(' ')[2]}, entry {where}: expected a number g",
        )
        for section, key, value, where in [
            ("denoiser", "block_out_channels", "[0]", 1),
            ("denoiser", "network: unet2d, block_out_channels", "[8, -8]", 2),
            ("denoiser", "attention_levels", "[-1]", 1),
            ("poison", "name: adp, unet_channels", "[16, 0]", 2),
            ("poison", "name: efp, surrogate_milestones", "[-3]", 1),
            ("defense", "aa_intensity", "[-1, 1]", 1),
        ]
    ),
    (
        "denoiser: {network: unet2d, block_out_channels: [8, 8], attention_levels: [2]}",
        "denoiser: attention_levels [2]: the levels of block_out_channels are 0 to 1",
    ),
    (
        "defense: {aa_roughness: [0.7, 0.3]}",
        "defense.aa_roughness: expected the smaller number first, found [0.7, 0",
    ),
    ("audit: {crop: 60}", "audit.crop: expected a multiple of 8, found 60"),
    ("run: {loggers: [tensorboad]}", "run.loggers, entry 1: expected 'tensorboard', 'mlflow' or 'wandb', found"),
    (
        "run: {seed: x, log_format: 3}",
        "run.seed: expected an integer, found 'x'; run.log_format: expected 'text' or",
    ),
]


@pytest.mark.parametrize(("text", "sentence"), WRONG, ids=[text for text, _ in WRONG])
def test_a_wrong_value_is_named_as_it_was_written_with_what_was_expected(text, sentence, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        resolve(str(tmp_path / "run.yaml"), None, {})
    assert str(caught.value).startswith(sentence)


RIGHT = """
sweep: {space: {purify.t_star: {low: 1, high: 3, log: true}, compensation.p: [1], denoiser.ema_warmup: [true]}}
data: {strict: true}
denoiser: {network: unet2d, block_out_channels: [8, 16], attention_levels: [0, 1], use_gpu: true}
poison: {name: efp, surrogate_milestones: [1, 2], surrogate_augment: true}
defense: {aa_roughness: [0.5, 0.5], aa_intensity: [0, 1]}
"""


def test_the_right_values_beside_the_wrong_ones_are_taken(tmp_path):
    (tmp_path / "run.yaml").write_text(RIGHT)
    found = resolve(str(tmp_path / "run.yaml"), None, {})
    assert (found.data.strict, found.denoiser.use_gpu, found.denoiser.attention_levels) == (True, True, (0, 1))


def test_files_that_are_no_settings_or_missing_are_refused(tmp_path):
    for text in "- a\n- b\n", "purify: 3\n", "a: [1\n", "x: !!python/object/apply:os.system [ls]\n":
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError):
            load_config(str(tmp_path / "bad.yaml"))
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_assignments_are_read_as_yaml():
    assert parse_assignment("purify.t_star=100") == ("purify.t_star", 100)
    assert parse_assignment("denoiser.block_out_channels=[8, 16]") == ("denoiser.block_out_channels", [8, 16])
    assert parse_assignment("data.source=a=b") == ("data.source", "a=b")
    with pytest.raises(ConfigError, match="expected section"):
        parse_assignment("purify.t_star")


TWICE = [
    ("data:\n  source: a\nrun: {seed: 1}\ndata:\n  output: b\n", "line 4: data is there already, on line 1"),
    ("purify:\n  denoiser: den\n  denoiser: other\n", "line 3: denoiser is there already, on line 2"),
    ("matrix: {poisons: [{name: ar, name: em}]}", "line 1: name is there already, on line 1"),
]


@pytest.mark.parametrize(("text", "words"), TWICE)
def test_a_key_that_stands_twice_is_refused_by_its_name_and_lines(text, words, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(str(tmp_path / "run.yaml"))
    with pytest.raises(ConfigError, match="seed is there already"):
        parse_assignment("poison.x={seed: 1, seed: 2}")


def test_a_merged_mapping_may_change_what_it_takes(tmp_path):
    first, second = "&a {name: eclipse, purify.t_star: 3}", "{<<: *a, label: b, purify.t_star: 4}"
    (tmp_path / "run.yaml").write_text(f"matrix: {{defenses: [{first}, {second}]}}")
    defenses = load_config(str(tmp_path / "run.yaml")).matrix.defenses
    assert defenses[1] == {"name": "eclipse", "label": "b", "purify.t_star": 4}


@pytest.mark.parametrize("section", Config.model_fields)
def test_a_section_without_keys_is_empty(section, tmp_path):
    (tmp_path / "run.yaml").write_text(f"{section}:\n  # key: value\n")
    assert load_config(str(tmp_path / "run.yaml")) == Config()


VALUES = [
    ("data.source", "2024-13-45", "2024-13-45"),
    ("data.source", "2024-05-06", "2024-05-06"),
    ("data.source", "010", "010"),
    ("data.source", "1:30", "1:30"),
    ("run.seed", "010", 10),
    ("run.seed", "089", 89),
    ("run.seed", "0x10", 16),
    ("run.seed", "1_000", 1000),
    ("denoiser.learning_rate", "1e-4", 1e-4),
    ("denoiser.dropout", "0.0", 0.0),
]


@pytest.mark.parametrize(("key", "typed", "value"), VALUES)
def test_values_are_what_people_mean_and_stay_so_in_a_resolved_file(key, typed, value, tmp_path):
    section, name = key.split(".")
    (tmp_path / "run.yaml").write_text(f"{section}: {{{name}: {typed}}}")
    config = load_config(str(tmp_path / "run.yaml"))
    assert getattr(getattr(config, section), name) == value
    assert load_config(None, dict([parse_assignment(f"{key}={typed}")])) == config
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "resolved.yaml")) == config


NO_VALUES = [
    ("1:30", "run.seed: .*integer.*'1:30'"),
    ("0x_", "line 1: '0x_' is no !!int"),
    ("!!int ''", "line 1: '' is no !!int"),
    ("!!bool x", "line 1: 'x' is no !!bool"),
    ("!!timestamp x", "line 1: 'x' is no !!timestamp"),
    ("9" * 5000, "line 1: '9+' is no !!int"),
    ("&a [*a]", "line 1: this value holds itself"),
    ("&a {b: {c: *a}}", "line 1: this value holds itself"),
    ("[" * 5000, "nested too deeply"),
    ("", "run.seed(=|): no value is given; write one, or"),
    ("[1, 2", "line 1: while parsing a flow sequence, expected"),
]


@pytest.mark.parametrize(("typed", "words"), NO_VALUES, ids=[typed[:20] for typed, _ in NO_VALUES])
def test_values_that_cannot_be_read_are_one_sentence(typed, words, tmp_path):
    (tmp_path / "run.yaml").write_text(f"run:\n  seed: {typed}")
    for use in (
        lambda: load_config(str(tmp_path / "run.yaml")),
        lambda: load_config(None, dict([parse_assignment(f"run.seed={typed}")])),
    ):
        with pytest.raises(ConfigError, match=words.replace("line 1", "line [12]")) as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["data.output", "data.labels", "denoiser.against", "poison.denoiser", "run.address"]
)
def test_a_setting_that_is_an_empty_text_is_refused(key):
    with pytest.raises(ConfigError, match=f"{key}: no value is given"):
        load_config(None, {key: ""})


def test_difference_names_each_changed_setting():
    old = {"purify": {"t_star": 100, "batch_size": 64}}
    new = {"purify": {"t_star": 150, "batch_size": 64}, "run": {"seed": 1}}
    assert difference(old, new) == ["purify.t_star: 100 -> 150", "run.seed: None -> 1"]


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=6))
def test_digest_ignores_order(tree):
    assert digest(tree) == digest(dict(reversed(list(tree.items()))))


def test_another_preset_takes_its_values_along_but_not_what_was_chosen():
    debug = load_config(None, {"denoiser.preset": "debug", "denoiser.iterations": 7})
    small = with_overrides(debug, {"denoiser.preset": "small"})
    assert small == load_config(None, {"denoiser.iterations": 7})
    paper = with_overrides(load_config(), {"denoiser.preset": "paper", "denoiser.iterations": 9})
    assert paper == load_config(None, {"denoiser.preset": "paper", "denoiser.iterations": 9})
    assert paper.compensation.coarse_sigma == 0


def test_what_an_earlier_version_recorded_is_read_less_the_settings_that_are_gone():
    old = load_config(None, {"purify.t_star": 7, "poison.name": "tap", "poison.steps": 3}).model_dump(mode="json")
    old["purify"]["watchdog_seconds"] = 1800
    old["gone"] = {"key": 1}
    found = recorded_config(old)
    assert found == load_config(None, {"purify.t_star": 7, "poison.name": "tap", "poison.steps": 3})
    with pytest.raises(ValidationError, match="t_star"):
        recorded_config({"purify": {"t_star": "deep"}})


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:hunter2@bucket/data",
        "https://host/data?token=hunter2",
        "https://host/data?X-Amz-Credential=a&X-Amz-Signature=hunter2",
        "https://account.blob.core.windows.net/c?sv=2024&sig=hunter2",
        "zip://a.zip::https://user:hunter2@host/a.zip",
        "https://host/data#access_token=hunter2",
        "https://[broken/hunter2",
    ],
)
def test_a_url_with_a_secret_is_refused_without_showing_it(url):
    assert holds_secret(url)
    for use in (
        lambda: load_config(None, {"data.source": url}),
        lambda: resolve(Config(), {"data.output": url}, {}),
        lambda: load_config(None, {"matrix.poisons": [{"name": "ar", "data.source": url}]}),
    ):
        with pytest.raises(ConfigError, match="holds a password, token or signature") as caught:
            use()
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["s3://bucket/a@b:c/data", "/local/a:b@c?token=1", "gs://me@bucket/x", "https://host/x?revision=main"]
)
def test_other_locations_are_taken(url):
    assert load_config(None, {"data.source": url}).data.source == url


def test_a_refused_call_writes_nothing(tmp_path):
    write_synthetic(str(tmp_path / "src"), 4, 16, 0)
    with pytest.raises(ConfigError):
        verbs.convert(
            str(tmp_path / "src"), str(tmp_path / "dst"), settings={"data.test": "https://x/y?token=hunter2"}
        )
    assert not (tmp_path / "dst").exists()


def test_a_config_file_may_lie_at_any_url(tmp_path):
    (tmp_path / "run.yaml").write_text("purify: {t_star: 7}\nrun: {seed: 3}\n")
    config = resolve(f"file://{tmp_path}/run.yaml", {"run.seed": 4}, {})
    assert (config.purify.t_star, config.run.seed) == (7, 4)
    with pytest.raises(ConfigError, match="there is no such file"):
        resolve(f"file://{tmp_path}/none.yaml", None, {})
    with pytest.raises(ConfigError) as caught:
        resolve("https://me:hunter2@host/run.yaml", None, {})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("folder", "this is a folder; name a YAML file"),
        ("empty.yaml", "the file is empty; write settings into it, or leave it out"),
        ("latin.yaml", "this is no text in UTF-8; name a YAML file"),
        ("binary.yaml", "not valid YAML: no text has the character 0x0"),
        ("missing.yaml", "there is no such file"),
        ("closed.yaml", "cannot be read: Permission denied; name a YAML file"),
        ("empty.yaml/x", "cannot be read: Not a directory; name a YAML file"),
        ("a\0b", "cannot be read: embedded null byte; name a YAML file"),
    ],
)
def test_what_is_no_config_file_is_said_in_one_sentence(name, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for file, data in ("empty", b" \n"), ("latin", b"run: \xe4"), ("binary", b"\0\1"), ("closed", b"{}"):
        Path(f"{file}.yaml").write_bytes(data)

    def read(file):
        # Who runs the tests may read any file.
        if file == "closed.yaml":
            raise PermissionError(13, "Permission denied", file)
        return Path(file).read_bytes()

    with pytest.raises(ConfigError) as caught:
        load_config(name, None, read)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(f"{name}: ")
    assert "\n" not in str(caught.value)
