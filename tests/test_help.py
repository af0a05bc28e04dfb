"""The face of the command line: help of every command, words for mistakes, the whole surface frozen in a file."""

import inspect
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import typer

from eclipse_ray import cli, parameters, verbs
from eclipse_ray.config import Config, load_config, parse_assignment
from eclipse_ray.log import counted
from eclipse_ray.parameters import PLANS, declared, resolve, resolved
from eclipse_ray.results import DatasetResult, GcResult, Result, StatusResult, VerifyResult
from tests.support import call

ROOT = Path(__file__).resolve().parents[1]
GROUP = typer.main.get_command(cli.app)
COMMANDS = GROUP.commands
SURFACE = ROOT / "tests" / "command_line.txt"
SETTINGS = {section: parameters.section_fields(section) for section in Config.model_fields}


def example_lines(name: str) -> list[str]:
    return [line for line in (COMMANDS[name].epilog or "").split("\n\n") if line.startswith("eclipse-ray ")]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_its_purpose_in_a_sentence(name):
    purpose = (COMMANDS[name].help or "").split("\n\n")[0]
    assert purpose.endswith("."), f"{name}: {purpose!r}"
    assert purpose.count(". ") == 0, f"{name}: one sentence, please: {purpose!r}"
    assert len(purpose) <= 115


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_two_examples_that_its_own_parser_takes(name):
    lines = example_lines(name)
    assert len(lines) >= 2, f"{name}: give two examples to @verb"
    for line in lines:
        assert len(line) <= 78, f"{line}: too long for a terminal"
        program, verb, *words = shlex.split(line)
        assert (program, verb) == ("eclipse-ray", name)
        context = COMMANDS[name].make_context(name, list(words))
        assignments = dict(map(parse_assignment, context.params.get("settings") or []))
        file = context.params.get("config")
        load_config(str(ROOT / file) if file else None, assignments)


@pytest.mark.parametrize("columns", ["40", "72"])
def test_no_name_of_an_option_is_cut_on_a_narrow_terminal(columns):
    code = (
        "from eclipse_ray import cli\n"
        "for name in ([], *([verb] for verb in cli.VERBS)):\n"
        "    print('\\f'); cli.app([*name, '--help'], prog_name='eclipse-ray', standalone_mode=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "COLUMNS": columns}, capture_output=True, text=True
    )
    overview, *pages = done.stdout.split("\f\n")[1:]
    assert "store are fit for a run, and what to mend" in " ".join(overview.replace("│", " ").split())
    for name, page in zip(cli.VERBS, pages, strict=True):
        options = [one for each in COMMANDS[name].params for one in (*each.opts, *each.secondary_opts)]
        assert [one for one in options if one.startswith("--") and one not in page] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained_and_stands_in_a_group_and_a_config_is_one_of_them(name):
    assert name in ("submit", "settings") or {"config", "settings"} <= {one.name for one in COMMANDS[name].params}
    for one in COMMANDS[name].params:
        if one.name == "help":
            continue
        assert one.help, f"{name} {one.name}"
        if one.param_type_name == "option":
            assert one.rich_help_panel, f"{name} --{one.name}: name a rich_help_panel"


def surface() -> list[str]:
    """Return one line for each parameter of each command: command, name, type, default."""
    lines = []
    for info in cli.app.registered_commands:
        typed = get_type_hints(info.callback, include_extras=True)
        for one in COMMANDS[info.name].params:
            if one.name == "help":
                continue
            argument = one.param_type_name == "argument"
            shown = one.metavar if argument else " ".join([*one.opts, *one.secondary_opts]).strip()
            kind = get_args(typed[one.name])[0]
            kind = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
            default = "required" if one.required else "" if one.default is None else repr(one.default)
            lines.append(f"{info.name:<17} {shown:<21} {kind.removeprefix('typing.')} {default}".rstrip())
    return sorted(lines)


def test_the_command_line_is_the_one_that_is_frozen():
    """After a change that is meant: `python -m tests.test_help` writes the file anew."""
    assert surface() == SURFACE.read_text().splitlines()


@pytest.mark.parametrize(
    ("key", "first", "count"),
    [
        ("", "data.source  str | null; default null", sum(len(found) for found in SETTINGS.values())),
        ("purify", "purify.denoiser  str | null; default null", len(SETTINGS["purify"])),
        ("purify.t_star", "purify.t_star  int | null, 1 or more; default null", 1),
        ("purify.", "purify.denoiser  str | null; default null", len(SETTINGS["purify"])),
    ],
)
def test_settings_are_printed_with_range_and_default(monkeypatch, capfd, key, first, count):
    code, out, _ = call(monkeypatch, capfd, "settings", *([key] if key else []))
    lines = out.splitlines()
    assert (code, lines[0], sum(not line.startswith(" ") for line in lines)) == (0, first, count)


def test_settings_are_printed_as_one_object():
    words = [sys.executable, "-m", "eclipse_ray", "settings", "victim.epochs", "--json"]
    out = subprocess.run(words, capture_output=True, check=True).stdout
    (found,) = json.loads(out)["settings"]
    assert (found["key"], found["kind"], found["default"]) == ("victim.epochs", "int", "12")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("t_star", "t_star is no setting and no section; did you mean denoiser.t_star or purify.t_star?"),
        ("purify.tstar", "did you mean purify.t_star?"),
        ("purifi", "did you mean purify?"),
        ("nothing", "no section; sections: data, denoiser, purify,"),
    ],
)
def test_settings_that_are_none_name_the_nearest(monkeypatch, capfd, key, words):
    code, _, said = call(monkeypatch, capfd, "settings", key)
    assert code == 2
    assert words in said


def test_what_sets_the_same_thing_has_the_same_name_in_every_verb():
    names: dict[str, set[str]] = {}
    for verb in verbs.VERBS.values():
        for name, (parameter, declaration) in declared(verb.function).items():
            if declaration.setting and parameter.kind is parameter.KEYWORD_ONLY:
                names.setdefault(declaration.setting, set()).add(name)
    assert len(names) > 8
    assert {key: found for key, found in names.items() if len(found) > 1} == {}


def test_a_parameter_of_a_verb_is_on_the_command_line_or_known_to_be_for_python_only():
    found = {
        (name, key)
        for name, verb in verbs.VERBS.items()
        for key in inspect.signature(verb.function).parameters.keys() - declared(verb.function)
    }
    python_only = ("arguments", "stop_on_interrupt", "show", "config", "settings")
    assert found == {("submit", key) for key in python_only}


def test_an_argument_overrides_the_setting_that_it_names():
    given = {"clean": "c", "against": None, "out": "o", "resize": 48, "strict": True}
    given |= {"config": None, "settings": {"data.clean": "other"}}
    config = resolved(verbs.train, given)
    assert (config.data.clean, config.denoiser.output, config.data.resize) == ("c", "o", 48)
    kept = resolved(verbs.train, {**given, "clean": None})
    assert kept.data.clean == "other"


def test_help_imports_nothing_heavy():
    heavy = ("torch", "ray", "pyarrow", "fsspec", "numpy", "PIL")
    code = (
        "import sys\nfrom eclipse_ray.cli import main\n"
        "try:\n    main(['purify', '--help'])\n"
        f"finally:\n    print([name for name in {heavy} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert "--denoiser" in done.stdout


def test_the_package_offers_every_verb_and_every_dry_run():
    import eclipse_ray

    for function in (*(verb.function for verb in verbs.VERBS.values()), *PLANS.values()):
        assert getattr(eclipse_ray, function.__name__) is function
        assert function.__name__ in eclipse_ray.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = eclipse_ray.nothing


def test_a_config_is_read_once(monkeypatch, tmp_path):
    read = []
    monkeypatch.setattr(parameters, "_read_anywhere", lambda url: read.append(url) or b"run: {seed: 7}")
    seen = []
    monkeypatch.setattr("eclipse_ray.datasets.write.split", lambda *given: seen.append(given[3]) or {})
    with pytest.raises(KeyError, match="clean"):
        cli.app(["split", "a", "--clean", "1", "--out", str(tmp_path), "--config", "x"], standalone_mode=False)
    assert (read, seen) == (["x"], [7])


def test_a_dry_run_has_the_parameters_of_its_verb():
    for verb, plan in PLANS.items():
        assert inspect.signature(plan).parameters == inspect.signature(verb).parameters
    with pytest.raises(TypeError, match="nonsense"):
        verbs.sweep_plan(nonsense=1)


def test_every_result_of_a_verb_has_words():
    source = inspect.getsource(cli)
    for one in Result.__subclasses__():
        assert f"made.{one.__name__}" in source, f"{one.__name__}: say it in cli.in_words"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["purfy"], "no such command 'purfy'. Did you mean 'purify'? see eclipse-ray --help"),
        (["purify", "a", "b", "--denoizer", "c"], "no such option: --denoizer; did you mean --denoiser? see"),
        (["purify", "a", "b", "--zzz"], "no such option: --zzz; see eclipse-ray purify --help"),
        (["convert", "a", "b", "--layout", "foldr"], "did you mean folder? see eclipse-ray convert --help"),
        (["poison", "ar", "a", "b", "--set-size", "3"], "no such option: --set-size; see"),
        (["split", "a", "--trials", "3"], "no such option: --trials; did you mean --set sweep.trials=VALUE? see"),
        (
            ["train", "--t-star", "3"],
            "no such option: --t-star; did you mean --set denoiser.t_star=VALUE or --set purify.t_star=VALUE? see",
        ),
        (["train", "--resize", "abc"], "invalid value for '--resize': it must be a valid integer; see"),
        (["status", "a", "--every", "x"], "invalid value for '--every': it must be a valid number; see"),
        (["split", "a", "--clean", "0", "--out", "b"], "'--clean': it must be greater than or equal to 1; see"),
        (["convert", "a"], "missing argument 'DST'; see eclipse-ray convert --help"),
        (["poison", "llsp", "a", "b"], "did you mean lsp?"),
        (["train", "--set", "denoiser.preset=papr"], "did you mean paper?"),
        (["train", "--set", "denoiser.iteration=3"], "unknown setting; did you mean denoiser.iterations?"),
        # Also where a command only looks.
        *(
            ([verb, "x", "--set", "run.sed=1"], "did you mean run.seed?")
            for verb in ("status", "verify", "gc", "report")
        ),
    ],
)
def test_a_slip_of_the_pen_is_one_sentence_and_exit_2(monkeypatch, capfd, words, sentence):
    code, _, err = call(monkeypatch, capfd, *words)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence in err


def test_what_a_poison_does_not_have_is_not_said():
    result = DatasetResult(3, "out", {"poison": "ar", "variant": "", "eps_255": None, "classes": 0})
    assert cli.in_words(result) == "3 images poisoned (poison ar, classes 0) in out"


ONE_OF_EACH = [
    (DatasetResult(1, "out"), "1 image written to out"),
    (DatasetResult(2000, "out"), "2,000 images written to out"),
    (DatasetResult(1, "out", {"poison": "ar"}), "1 image poisoned (poison ar) in out"),
    (DatasetResult(1, "out", {"matched": 1}), "1 of 1 image matched and labelled in out"),
    (DatasetResult(3, "out", {"clean": 1, "rest": 2}), "1 image in out/clean, 2 in out/rest"),
    (StatusResult(1, 0, 1, 1, 1), "1 of 1 shard, 0 of 1 image, 1 failed"),
    (VerifyResult(True, 2, 1, 1), "1 image and 1 failure of 2\nok"),
    (GcResult(1, 1, "out"), "1 leftover removed, 1 upload aborted in out"),
]


def test_one_of_a_thing_is_said_in_the_singular():
    assert [cli.in_words(result) for result, _ in ONE_OF_EACH] == [words for _, words in ONE_OF_EACH]
    assert [counted(count, "class") for count in (0, 1, 2)] == ["0 classes", "1 class", "2 classes"]


def test_help_shows_default_and_range_of_a_setting():
    (option,) = [one for one in COMMANDS["purify"].params if one.name == "max_failed_fraction"]
    assert option.help == "More failed images end in exit 3; 0 to 1 (default 0.01)."


def test_every_result_shows_itself_in_a_notebook_escaped():
    from eclipse_ray.results import Check, DoctorResult, VerifyResult

    shown = DatasetResult(1_000, "<script>alert(1)</script>", {"<b>": "&"})._repr_html_()
    assert "<script>" not in shown
    assert "&lt;b&gt;: &amp;" in shown
    assert "<td>1,000</td>" in shown
    assert "<td></td>" in VerifyResult(True, 1, 1, 0)._repr_html_()
    assert "&lt;i&gt;" in DoctorResult(True, [Check("<i>", "ok", "x")])._repr_html_()


def test_a_path_with_a_slip_gets_the_nearest(monkeypatch, tmp_path):
    from eclipse_ray.errors import did_you_mean

    (tmp_path / "photographs" / "cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert did_you_mean("photgraphs/cats") == "; did you mean photographs/cats?"
    assert did_you_mean("photographs/cat") == "; did you mean photographs/cats?"
    assert did_you_mean(f"{tmp_path}/photograps") == f"; did you mean {tmp_path}/photographs?"
    assert did_you_mean("elsewhere") == ""
    assert did_you_mean("photographs/cats") == ""
    assert did_you_mean("s3://bucket/photographs") == ""


def test_no_thread_of_a_stopped_run_joins_a_cluster_by_itself():
    words = ("import eclipse_ray.cluster.connect", "import ray._private.auto_init_hook as hook")
    program = "; ".join([*words, "print(hook.enable_auto_connect)"])
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ENABLE_AUTO_CONNECT"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_no_subpackage_hides_the_verb_of_its_name():
    code = (
        "import importlib, pkgutil, eclipse_ray\n"
        "for one in pkgutil.iter_modules(eclipse_ray.__path__):\n"
        "    if one.name != '__main__':\n"
        "        importlib.import_module(f'eclipse_ray.{one.name}')\n"
        "print([name for name in eclipse_ray.__all__ if not callable(getattr(eclipse_ray, name))])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_settings_of_a_poison_that_is_named_later_are_kept():
    assert resolve(None, {"poison.rounds": 8}, {}).poison.own() == {"rounds": 8}


if __name__ == "__main__":
    SURFACE.write_text("\n".join(surface()) + "\n")
