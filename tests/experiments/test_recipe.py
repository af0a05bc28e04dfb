"""Keys of a matrix: what changes a number changes its key, and nothing else does."""

from dataclasses import replace
from pathlib import Path

import pytest

from eclipse_ray.config import Config, load_config
from eclipse_ray.defenses import DEFENSES
from eclipse_ray.diffusion.process import cosine_alphas_cumprod
from eclipse_ray.errors import ConfigError
from eclipse_ray.experiments.recipe import Facts, Grid, Recommended, build_grid, published_sources
from tests.support import dotted

FACTS = Facts("source", "test", {None: "sparse", 5: "five"}, published={"sets/tap": "tap"})
GIVEN = {"given": Recommended(5, 4, 1, "ddpm", 512, True, cosine_alphas_cumprod(20), "weights")}
BASE = {
    "denoiser.preset": "debug",
    "evaluate.seeds": 2,
    "matrix.poisons": ["ar", "urp"],
    "matrix.clean": True,
    "matrix.defenses": ["none", "iss-g", "eclipse"],
}


def grid(facts: Facts = FACTS, **changes: object) -> Grid:
    return build_grid(load_config(None, {**BASE, **dotted(changes)}), facts)


def keys(made: Grid) -> dict[str, str]:
    return {cell.title: cell.key for cell in made.recipes}


def changed(before: Grid, after: Grid) -> set[str]:
    """Titles, without the seed, whose key differs."""
    old, new = keys(before), keys(after)
    return {title.rsplit(",", 1)[0] for title in old if old[title] != new.get(title)}


def test_there_is_a_cell_for_each_combination_and_each_has_a_key_of_its_own():
    made = grid()
    assert len(made.recipes) == 3 * 3 * 2
    assert len(set(keys(made).values())) == len(made.recipes)


def test_a_grown_grid_keeps_the_keys_it_had():
    before = grid()
    after = grid(
        matrix__poisons=["lsp", "ar", "urp"],
        matrix__defenses=["cutout", "eclipse", "none", "iss-g"],
        matrix__victims=["small", "resnet18"],
        evaluate__seeds=3,
    )
    assert changed(before, after) == set()
    assert len(after.recipes) == 4 * 4 * 2 * 3


def test_labels_limits_of_speed_and_published_names_change_no_key():
    before = grid()
    after = grid(
        matrix__max_concurrent=1, matrix__published="cifar10", matrix__first_poisons=["urp"], purify__actors=1
    )
    assert changed(before, after) == set()
    renamed = grid(matrix__poisons=[{"name": "ar", "label": "AR"}, "urp"])
    assert set(keys(renamed).values()) == set(keys(before).values())


@pytest.mark.parametrize(
    ("setting", "value", "affected"),
    [
        ("victim.epochs", 3, {"none", "iss-g", "eclipse"}),
        ("purify.t_star", 2, {"eclipse"}),
        ("compensation.p", 0.1, {"eclipse"}),
        ("denoiser.iterations", 7, {"eclipse"}),
        ("defense.iss_jpeg_quality", 50, {"iss-g"}),
    ],
)
def test_a_setting_changes_the_cells_that_it_decides(setting, value, affected):
    titles = changed(grid(), grid(**{setting.replace(".", "__"): value}))
    assert {title.split(", ")[1] for title in titles} == affected
    assert {title.split(", ")[0] for title in titles} == {"clean", "ar", "urp"}


def test_a_setting_of_a_poison_changes_its_column_only():
    titles = changed(grid(), grid(matrix__poisons=["ar", {"name": "urp", "label": "urp", "eps_255": 4}]))
    assert {title.split(", ")[0] for title in titles} == {"urp"}


def test_a_published_poison_is_a_column_without_cost_whose_key_is_its_content():
    entry = {"name": "published", "source": "sets/tap", "label": "theirs", "published": "tap"}
    made = grid(matrix__poisons=["ar", entry], matrix__first_poisons=["ar"], matrix__clean=False)
    column = made.columns[1]
    assert (column.entry.label, column.entry.published, column.config) == ("theirs", "tap", None)
    assert column.poisoned
    assert made.recipes[0].column.entry.label == "ar"
    assert {recipe.column.entry.label for recipe in made.recipes[:6]} == {"ar"}

    def key_of(facts: Facts, source: str) -> str:
        return grid(facts, matrix__poisons=[{"name": "published", "source": source}]).columns[1].key

    moved = replace(FACTS, published={"elsewhere": "tap", "sets/tap": "changed"})
    assert key_of(FACTS, "sets/tap") == key_of(moved, "elsewhere") == column.key
    assert key_of(moved, "sets/tap") != column.key


def test_a_published_poison_is_called_as_the_last_part_of_its_path():
    facts = replace(FACTS, published={"s3://bucket/tap-published/": "tap"})
    made = grid(facts, matrix__poisons=[{"name": "published", "source": "s3://bucket/tap-published/"}])
    assert (made.columns[1].entry.label, made.columns[1].entry.published) == ("tap-published", "")


def test_other_images_change_every_key_and_another_sparse_set_those_that_use_it():
    assert len(changed(grid(), grid(Facts("other", "test", {None: "sparse"})))) == 9
    assert len(changed(grid(), grid(Facts("source", "other", {None: "sparse"})))) == 9
    titles = changed(grid(), grid(Facts("source", "test", {None: "other"})))
    assert {title.split(", ")[1] for title in titles} == {"eclipse"}


def test_rows_that_train_on_the_same_images_share_one_transformed_set():
    made = grid(matrix__defenses=["eclipse", "eclipse-a", "eclipse-ab", "eclipse-published", "eclipse-c", "none"])
    sets = {cell.row.entry.label: cell.training for cell in made.recipes if cell.column.entry.label == "ar"}
    assert len({sets[name] for name in ("eclipse", "eclipse-a", "eclipse-ab", "eclipse-published")}) == 1
    assert sets["none"] == sets["eclipse-c"] == next(c.key for c in made.columns if c.entry.label == "ar")


def test_a_transform_that_moves_to_another_module_keeps_its_keys(monkeypatch):
    rows = ["eclipse", "eclipse-baked", "eclipse-draws", "iss-g", "iss-j", "op", "avatar", "iss-j+eclipse"]
    before = keys(grid(matrix__defenses=rows))
    for one in {defense.transform for defense in DEFENSES.values() if defense.transform}:
        monkeypatch.setattr(one, "__module__", "somewhere.else")
        monkeypatch.setattr(one, "__qualname__", "renamed")
    assert keys(grid(matrix__defenses=rows)) == before


def test_what_is_listed_first_is_done_first():
    made = grid(matrix__first_poisons=["urp"], matrix__first_defenses=["eclipse"])
    early = [(cell.column.entry.label, cell.row.entry.label, cell.seed) for cell in made.recipes[:4]]
    assert early == [(label, "eclipse", seed) for seed in (0, 1) for label in ("clean", "urp")]


def test_a_denoiser_of_its_own_belongs_to_its_row():
    made = grid(
        matrix__defenses=[
            "eclipse",
            {"name": "eclipse", "label": "more", "denoiser.replication": 6},
            {"name": "eclipse", "label": "fewer", "matrix.sparse_limit": 5},
        ]
    )
    assert len({row.denoiser for row in made.rows}) == 3


def test_a_given_denoiser_is_known_by_its_content_whichever_row_names_it():
    depths = {"a": ("one", 125), "copy": ("one", 125), "b": ("two", 900)}
    given = {
        place: Recommended(t_max, 100, 1, "ddpm", 512, True, cosine_alphas_cumprod(4000), weights)
        for place, (weights, t_max) in depths.items()
    }
    facts = replace(FACTS, denoisers=given)
    own = [{"name": "eclipse", "label": place, "purify.denoiser": place} for place in given]
    deep = {"name": "eclipse", "label": "deep", "purify.denoiser": "b", "purify.t_star": 800}
    trained = {"name": "eclipse", "label": "trained", "purify.denoiser": None}
    base = grid(facts, purify__denoiser="a")
    for of_all in ("a", None):
        made = grid(facts, purify__denoiser=of_all, matrix__defenses=[*own, deep, trained, "none"])
        used = {row.entry.label: row.denoiser for row in made.rows}
        assert used["a"] == used["copy"] == next(row.denoiser for row in base.rows if row.denoiser)
        assert used["b"] == used["deep"]
        assert len({used["a"], used["b"], used["trained"]}) == 3
    with pytest.raises(ConfigError, match=r"deep: .*t_star 800 is outside 1\.\.125"):
        grid(facts, matrix__defenses=[deep | {"purify.denoiser": "copy"}])


def test_a_denoiser_that_a_poison_attacks_is_known_by_its_content_wherever_it_is_named():
    def column_of(given: str | None, weights: str, **changes: object) -> str:
        facts = replace(FACTS, denoisers={given: replace(GIVEN["given"], weights=weights)} if given else {})
        entry = {"name": "adp", "variant": "strong", "label": "adp"}
        return grid(facts, matrix__poisons=[entry | changes], matrix__defenses=["none"]).columns[1].key

    own, trained = column_of("a", "one", denoiser="a"), column_of(None, "")
    assert own == column_of("moved", "one", denoiser="moved")
    assert len({own, trained, column_of("a", "other", denoiser="a")}) == 3
    with pytest.raises(ConfigError, match=r"^matrix: adp: poison\.t_star 6: this denoiser is trained up to 5"):
        column_of("a", "one", denoiser="a", t_star=6)


def test_a_denoiser_in_the_section_is_for_the_poisons_that_attack_one():
    facts = replace(FACTS, denoisers={"given": GIVEN["given"]})
    strong = {"name": "adp", "variant": "strong"}
    columns = grid(
        facts, poison__denoiser="given", matrix__poisons=["em", strong], matrix__defenses=["none"]
    ).columns
    assert [column.config and column.config.poison.denoiser for column in columns] == [None, None, "given"]
    assert columns[1].key == grid(matrix__poisons=["em"]).columns[1].key


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"matrix__defenses": ["ecilpse"]}, "eclipse"),
        ({"matrix__poisons": ["ra"]}, "poison.name"),
        ({"matrix__poisons": [{"name": "ar", "epz_255": 4}]}, "poison.eps_255"),
        ({"matrix__poisons": [{"name": "ar", "victim.epochs": 4}]}, "cannot set victim.epochs"),
        ({"matrix__poisons": [{"name": "ar", "poison.name": "em"}]}, "ar cannot set poison.name, which its name"),
        (
            {"matrix__victims": [{"name": "small", "arch": "vgg16"}]},
            "small cannot set victim.arch, which its name",
        ),
        ({"matrix__defenses": [{"name": "eclipse", "compensation.mode": "none"}]}, "cannot set compensation.mode"),
        ({"matrix__defenses": [{"name": "eclipse", "matrix.limit": 9}]}, "cannot set matrix.limit; an entry sets"),
        ({"matrix__defenses": [{"name": "eclipse", "matrix.clean": True}]}, "cannot set matrix.clean; an entry"),
        ({"matrix__poisons": [{"label": "ar"}]}, "has no name"),
        ({"matrix__poisons": ["ar", "ar"]}, "two poison entries are called ar"),
        ({"matrix__poisons": ["clean"]}, "no poison"),
        ({"matrix__poisons": [{"name": "published"}]}, "`source: SRC`"),
        ({"matrix__poisons": [{"name": "tap", "source": "sets/tap"}]}, "`name: published`"),
        ({"matrix__poisons": [{"name": "published", "source": "sets/tap", "eps_255": 4}]}, "has no settings"),
        ({"matrix__poisons": [{"name": "published", "source": "x/clean"}]}, "no poison"),
        ({"matrix__defenses": [{"name": "none", "source": "sets/tap"}]}, "source"),
        ({"matrix__victims": ["resnet"]}, "victim.arch"),
        ({"matrix__defenses": []}, "no defense is listed"),
        ({"matrix__first_poisons": ["tap"]}, "first_poisons: tap is not listed"),
        ({"matrix__defenses": [{"name": "iss-g", "against": True}]}, "against is for a defense that purifies"),
        ({"matrix__defenses": [{"name": "eclipse", "against": "sets/tap"}]}, "it is true or false"),
        (
            {"matrix__defenses": [{"name": "eclipse", "denoiser.against": "sets/tap"}]},
            "a row of a grid says `against: true`",
        ),
        # What a denoiser would refuse, before it is trained for hours.
        ({"matrix__defenses": [{"name": "eclipse", "purify.t_star": 6}]}, r"eclipse .*t_star 6 is outside 1\.\.5"),
        ({"matrix__defenses": [{"name": "eclipse-draws", "purify.num_inference_steps": 5}]}, r"steps 5 .* 1\.\.4"),
        (
            {"matrix__defenses": [{"name": "eclipse", "denoiser.preset": "unet", "purify.tile_overlap": 65}]},
            "a tile, which has 128",
        ),
        ({"matrix__defenses": [{"name": "eclipse-baked", "purify.tile_overlap": 257}]}, "a tile, which has"),
        *(
            (
                {"defense__avatar_noise_255": 9, "matrix__defenses": [{"name": name, **int8}]},
                "int8 is for the default network",
            )
            for name in ("eclipse", "avatar")
            for int8 in [{"denoiser.preset": "unet", "purify.precision": "int8"}]
        ),
        (
            {"matrix__defenses": [{"name": "avatar", "avatar_noise_255": 99}]},
            r"avatar .*noises by 99 of 255, which is t_star \d+",
        ),
        (
            {"matrix__defenses": ["avatar"], "defense__avatar_noise_255": 9, "purify__tile_overlap": 257},
            "a tile, w",
        ),
        ({"matrix__poisons": [{"name": "adp", "variant": "strong", "t_star": 6}]}, "adp .*poison.t_star 6"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(changes, words):
    with pytest.raises(ConfigError, match=words):
        grid(**changes)


NO_EFFECT = [
    ("defenses", "iss-j", {"purify.t_star": 2}, "eclipse"),
    ("defenses", "none", {"compensation.p": 0.4}, "eclipse"),
    ("defenses", "iss-g", {"denoiser.iterations": 7}, "iss-g+eclipse"),
    ("defenses", "cutout", {"purify.denoiser": None}, "eclipse"),
    ("defenses", "cutmix", {"matrix.sparse_limit": 5}, "dilution"),
    ("defenses", "iss-g", {"iss_jpeg_quality": 50}, "iss-j"),
    ("defenses", "iss-j", {"aa_draws": 2}, "iss-j+aa"),
    ("defenses", "eclipse", {"purify.actors": 2}, None),
    ("defenses", "eclipse", {"denoiser.output": "x"}, None),
    ("defenses", "avatar", {"purify.t_star": 2}, "eclipse-draws"),
    ("defenses", "avatar", {"purify.sampler": "ddim"}, "eclipse-a"),
    ("defenses", "eclipse-a", {"compensation.sigma": 0.3}, "eclipse-c"),
    ("defenses", "eclipse-ab", {"compensation.sigma": 0.3}, "eclipse-bc"),
    ("defenses", "eclipse-ac", {"compensation.p": 0.3}, "eclipse-ab"),
    ("defenses", "eclipse-published", {"compensation.colour_sigma": 0.3}, "eclipse"),
    ("defenses", "eclipse-bc", {"compensation.coarse_grid": 7}, "eclipse-baked"),
    ("defenses", "eclipse", {"compensation.coarse_sigma": 0, "compensation.coarse_grid": 7}, None),
    ("defenses", "eclipse", {"purify.denoiser": "given", "denoiser.iterations": 7}, None),
    ("defenses", "eclipse", {"purify.denoiser": "given", "matrix.sparse_limit": 5}, "eclipse+dilution"),
    ("poisons", "em", {"denoiser": "given"}, None),
    ("poisons", "urp", {"cost": "reduced"}, "em"),
    ("poisons", "urp", {"save_seconds": 5}, "em"),
    ("poisons", "cuda", {"chunk_images": 5}, "em"),
    ("poisons", "urp", {"rounds": 5}, "em"),
    ("victims", "small", {"purify.t_star": 5}, None),
]


@pytest.mark.parametrize(("axis", "name", "settings", "uses"), NO_EFFECT, ids=str)
def test_a_setting_without_effect_on_its_entry_is_refused(axis, name, settings, uses):
    facts = replace(FACTS, denoisers=GIVEN)
    setting = list(settings)[-1]
    with pytest.raises(ConfigError, match=rf"^(matrix: .*)?({axis[:-1]}\.)?{setting}\b.*"):
        grid(facts, defense__avatar_noise_255=9, **{f"matrix__{axis}": [{"name": name, **settings}]})
    if uses:
        assert grid(facts, **{f"matrix__{axis}": [{"name": uses, **settings}]}).recipes


@pytest.mark.parametrize("key", ["label", "published"])
@pytest.mark.parametrize(
    "entry", [{"name": "ar"}, {"name": "urp", "eps_255": 4}, {"name": "published", "source": "sets/tap"}], ids=str
)
def test_a_label_is_a_text_and_null_stands_for_the_usual_one(entry, key):
    usual = grid(matrix__poisons=[entry]).columns[1].entry
    assert grid(matrix__poisons=[{**entry, key: None}]).columns[1].entry == usual
    assert getattr(grid(matrix__poisons=[{**entry, key: "x"}]).columns[1].entry, key) == "x"
    for wrong in ("", " ", [1], 5, True, {}):
        with pytest.raises(ConfigError, match=f"^matrix: {entry['name']}: {key} is .*; write a text"):
            grid(matrix__poisons=[{**entry, key: wrong}])


@pytest.mark.parametrize("name", ["avatar", "iss-g+avatar", "iss-g", "none"])
@pytest.mark.parametrize("setting", ["purify__t_star", "purify__num_inference_steps"])
def test_a_depth_that_a_defense_does_not_use_is_not_checked(name, setting):
    assert grid(matrix__defenses=[name], defense__avatar_noise_255=9, **{setting: 6}).rows
    with pytest.raises(ConfigError, match=setting.replace("__", ".")):
        grid(matrix__defenses=[name, "eclipse"], defense__avatar_noise_255=9, **{setting: 6})


def test_a_defense_that_needs_the_sparse_set_is_refused_without_one():
    with pytest.raises(ConfigError, match=r"data\.clean"):
        grid(Facts("source", "test", {}))
    assert len(grid(Facts("source", "test", {}), matrix__defenses=["none", "iss-g"]).recipes) == 12


FOLDER = Path(__file__).resolve().parents[2] / "configs"
CONFIGS = sorted(file for file in FOLDER.glob("*.yaml") if not file.stem.startswith("sweep-"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_ready_config_is_a_grid_and_the_same_one_when_it_is_written_out_in_full(file):
    config = load_config(str(file))
    counts = {None: "all", 150: "150", 1000: "1", 2000: "2", 3000: "3", 4000: "4"}
    facts = Facts("source", "test", counts, published=dict.fromkeys(published_sources(config), "published"))
    made = build_grid(config, facts)
    full = Config.model_validate(config.model_dump(mode="json"))
    assert keys(build_grid(full, facts)) == keys(made)
    assert len({cell.title for cell in made.recipes}) == len(made.recipes)
    assert config.data.output
    if file.stem == "quick":
        assert (len(made.columns), len(made.rows), config.matrix.limit) == (6, 6, 3000)


def test_all_tables_and_the_figure_have_a_config():
    names = {file.stem for file in CONFIGS}
    assert {"quick", "reduced", "figure5", *(f"table{number}" for number in range(1, 8))} <= names


def test_a_row_against_each_column_has_a_denoiser_for_each_and_leaves_other_rows_alone():
    rows = ["none", "iss-g", "eclipse", {"name": "eclipse", "label": "learned", "against": True}]
    made = grid(matrix__defenses=rows)
    assert changed(grid(), made) == set()
    used = {(cell.row.entry.label, cell.column.entry.label): cell.row.denoiser for cell in made.recipes}
    plain = {key for (label, _), key in used.items() if label == "eclipse"}
    learned = [used["learned", column] for column in ("clean", "ar", "urp")]
    assert len(plain) == 1
    assert len({*plain, *learned}) == 4
    assert {need.row.denoiser for cell in made.recipes for need in cell.needs} >= set(learned)
