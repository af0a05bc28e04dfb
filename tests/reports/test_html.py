"""The page: whole, escaped, from nowhere else, and with the sections its folder calls for."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eclipse_ray import ledger, verbs
from eclipse_ray.cli import conclude
from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.formats import open_source
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.table import canonical_table
from eclipse_ray.datasets.write import write_dataset
from eclipse_ray.errors import InputError
from eclipse_ray.reports.experiments import _drawn
from eclipse_ray.reports.folder import record_command
from eclipse_ray.reports.page import write_report
from eclipse_ray.storage.store import Store
from tests.reports.material import audited, purify_here, write_folders

VOID = {"meta", "link", "img", "br", "source", "input"}
EVIL = "<script>alert(1)</script>\"'&.png"
RUN = ["changed", "classes", "pictures", "theory", "training"]
SECTIONS = {
    "purify": ["summary", *RUN, "provenance"],
    "train": ["summary", "training", "provenance"],
    "evaluate": ["summary", "accuracy", "provenance"],
    "matrix": ["summary", "accuracy", "provenance"],
    "demo": ["summary", "accuracy", *RUN, "provenance"],
    "sweep": ["summary", "sweep", "provenance"],
    "audit": ["summary", "audit", "provenance"],
}
EVERY = {name for names in SECTIONS.values() for name in names}


class Page(HTMLParser):
    """Checks that tags are balanced; keeps ids, addresses and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"an inline handler: {name}"
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.addresses.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def folders(world, tmp_path_factory) -> dict[str, Path]:
    """One folder of every kind."""
    return write_folders(tmp_path_factory.mktemp("reports"), world)


def page_of(folder) -> Page:
    return Page(Path(write_report(str(folder)).report).read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", SECTIONS)
def test_every_kind_of_folder_has_its_sections_and_nothing_comes_from_elsewhere(kind, folders):
    page = page_of(folders[kind])
    assert [name for name in page.ids if name in EVERY] == SECTIONS[kind]
    assert len(page.ids) == len(set(page.ids))
    for address in page.addresses:
        assert address.startswith(("data:", "#")), address
        assert not address.startswith("#") or address[1:] in page.ids
    report = folders[kind] / "report"
    charts = {path.stem for path in report.glob("*.svg")}
    assert charts == {path.stem for path in report.glob("*.png")}
    assert len(charts) == page.tags.count("picture")
    assert all(b"http-equiv" not in path.read_bytes() for path in report.glob("*.svg"))


def test_the_first_page_answers_the_questions_of_the_owner_of_the_data(folders):
    summary = page_of(folders["purify"]).text.split("Which images changed")[1]
    assert "240 of 240 images were purified, none failed." in summary
    assert "noised to t_star = 4 of 20" in summary
    recorded = read_changes(folders["purify"])
    half, low = np.quantile(recorded["psnr"], (0.5, 0.05))
    assert f"Half of the images keep at least {half:.1f} dB PSNR and" in summary
    assert f"one in twenty has less than {low:.1f} dB (all 240 images)." in summary
    assert re.search(r"Of the perturbation, -?\d+ % is left in 64 sampled images", summary)
    most, least = recorded["psnr"].to_numpy().argmin(), recorded["psnr"].to_numpy().argmax()
    assert f"Most: {recorded['id'][most]} (" in summary
    assert f"Least: {recorded['id'][least]} (" in summary
    assert "Every image that was tried could be purified." in summary
    assert re.search(r"[\d.]+ core-seconds per 1,000 images, \d+s in all\.", summary)
    assert re.search(r"[\d.]+ KiB in, [\d.]+ KiB out\.", summary)


def test_details_follow_for_classes_and_for_researchers(folders):
    page = page_of(folders["purify"])
    recorded = read_changes(folders["purify"])
    label = recorded["label"][0].as_py()
    mean = np.mean([row["psnr"] for row in recorded.to_pylist() if row["label"] == label])
    count = recorded["label"].to_pylist().count(label)
    name = open_source(str(folders["purify"]), DataConfig()).classes[label]
    assert f"{name}{count}0{mean:.1f}" in page.text
    assert page.tags.count("input") == 2
    assert "The 10 most changed images" in page.text
    assert "The 5 least changed images" in page.text
    assert "But it is a bound" in page.text
    assert "the command was not recorded" in page.text


def read_changes(folder: Path) -> pa.Table:
    store = Store(str(folder))
    return ledger.read_changes(store, list(ledger.read_statuses(store).values()))


def test_a_folder_without_records_of_changes_is_told_without_them(folders, tmp_path):
    shutil.copytree(folders["purify"], tmp_path / "old")
    shutil.rmtree(tmp_path / "old/_eclipse/changes")
    text = page_of(tmp_path / "old").text
    assert "There is no image to show." in text
    assert "most changed images" not in text
    assert verbs.verify(str(tmp_path / "old")).ok


def test_verdicts_of_audits_stand_on_the_first_page_before_and_after(world, folders, tmp_path):
    for name, source in (("one", str(folders["purify"])), ("two", world.poisoned), ("other", world.test)):
        audited(tmp_path / name, source)
    before, after, other = (str(tmp_path / name) for name in ("two", "one", "other"))
    write_report(str(folders["purify"]), [after, before])
    text = Page((folders["purify"] / "report/index.html").read_text()).text
    first, second = (
        text.index(f"An audit of the data {when} purification: Likely") for when in ("before", "after")
    )
    assert first < second < text.index("What changed most and least?")
    with pytest.raises(InputError, match="which is neither the source of"):
        write_report(str(folders["purify"]), [other])
    with pytest.raises(InputError, match="this is a train"):
        write_report(str(folders["train"]), [after])


def test_an_audit_that_is_not_there_is_refused_by_its_folder_with_what_is_expected(folders, tmp_path):
    own = {name: tmp_path / name for name in ("nothing", "empty", "half", "file")}
    own["empty"].mkdir()
    own["half"].mkdir()
    (own["half"] / "audit.json").write_text("{}")
    own["file"].write_text("{}")
    for place in (*own.values(), folders["train"]):
        with pytest.raises(
            InputError, match=rf"^{place}: no audit here \(audit.json and config.yaml are expected\); "
        ):
            write_report(str(folders["purify"]), [str(place)])
    with pytest.raises(InputError, match=r"did you mean .*/empty\?$"):
        write_report(str(folders["purify"]), [str(tmp_path / "emty")])
    with pytest.raises(InputError, match=r"could be reported; did you mean .*/empty\?$"):
        write_report(str(tmp_path / "emty"))


def test_a_sweep_and_an_audit_begin_with_what_they_found(folders):
    swept = page_of(folders["sweep"]).text
    assert (
        "The best of 6 trials has t_star 100, sigma 0.1: a victim trained on what it purifies is right on" in swept
    )
    assert "eclipse-ray purify SRC DST --config" in swept
    found = page_of(folders["audit"]).text
    assert found.count("Likely poisoned: high frequency, class-wise (p = 0.0007).") == 1
    assert "24 images of 2 classes were looked at." in found
    assert "Purify with t_star 100, p 0.4, sigma 0.05." in found
    assert "tells the class of 76.7 % of images by it" in found


@pytest.mark.parametrize(("kind", "file"), [("sweep", "results.parquet"), ("audit", "audit.json")])
def test_what_another_version_wrote_is_refused_in_one_sentence(folders, tmp_path, kind, file):
    shutil.copytree(folders[kind], tmp_path / kind)
    if kind == "sweep":
        pq.write_table(pa.table({"id": ["x"]}), tmp_path / kind / file)
    else:
        (tmp_path / kind / file).write_text('{"verdict": "poisoned"}')
    with pytest.raises(InputError, match=f"{file}: .*run the same {kind} command again"):
        write_report(str(tmp_path / kind))


def test_a_chart_leaves_out_rivals_before_our_own():
    names = ["none", "a", "b", "c", "d", "e", "f", "eclipse", "eclipse+aa"]
    assert _drawn(names) == ["none", "a", "b", "c", "eclipse", "eclipse+aa"]


def test_a_moved_demo_finds_its_own_folders(folders, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(folders["demo"], moved)
    text = page_of(moved).text
    assert "purified ones 88.9 %: 94 % of the gap" in text
    assert "perturbation ×10" in text


def test_ids_and_reasons_are_escaped_and_failures_are_listed(world, tmp_path):
    rng = np.random.default_rng(0)
    images = [encode_image(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8), "png") for _ in range(5)]
    table = canonical_table([f"{i}{EVIL}" for i in range(6)], [*images, b"no image"], [0, 1, 0, 1, 0, 1])
    write_dataset(str(tmp_path / "in"), [table], classes=["<b>cat", "$x_$"], source="<i>somewhere")
    purify_here(str(tmp_path / "in"), str(tmp_path / "out"), world.denoiser)
    record_command(str(tmp_path / "out"), "eclipse-ray purify s3://key:secret@host/<script>x")
    page = page_of(tmp_path / "out")
    assert page.tags.count("script") == 1
    assert "b" not in page.tags
    assert f"5{EVIL}" in page.text
    assert "not an image in a known format" in page.text
    assert "<b>cat" in page.text
    assert re.search(r"\$x_\$\s*2\s*1", page.text), "a failed image counts for its class"
    assert "s3://host/<script>x" in page.text
    assert "secret" not in page.text
    assert "No clean copies of these images are known" in page.text


def test_an_unfinished_run_and_a_lost_source_can_be_reported(world, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(world.poisoned, source)
    purify_here(str(source), str(tmp_path / "out"), world.denoiser, 1, **{"purify.shard_images": 60})
    assert "180 are still to be done" in page_of(tmp_path / "out").text
    shutil.rmtree(source)
    assert "cannot be shown" in page_of(tmp_path / "out").text


def test_a_report_does_not_touch_the_dataset_it_lies_in(folders):
    output = str(folders["purify"])
    write_report(output)
    assert verbs.verify(output).ok
    assert open_source(output, DataConfig()).images == 240


def test_a_folder_of_no_kind_is_refused(world):
    with pytest.raises(InputError, match="could be reported"):
        write_report(world.test)


def test_a_folder_in_a_store_is_reported_there(world, tmp_path):
    store = Store("memory://reports/denoiser")
    for path in Path(world.denoiser).iterdir():
        if path.is_file():
            store.write(path.name, path.read_bytes())
    result = write_report(store.url)
    assert result.report == "memory://reports/denoiser/report/index.html"
    assert b"Training of the denoiser" in store.read("report/index.html")


def test_a_finished_run_stays_finished_when_no_report_can_be_written(world, tmp_path, monkeypatch, capsys):
    import builtins

    real = builtins.__import__

    def without_matplotlib(name, *rest):
        if name.startswith("eclipse_ray.reports.page"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *rest)

    folder = tmp_path / "denoiser"
    shutil.copytree(world.denoiser, folder)
    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    conclude(str(folder))
    wanted = "a report needs matplotlib: pip install 'eclipse-ray[report]'"
    assert wanted in capsys.readouterr().err
    assert not (folder / "report").exists()
    conclude(str(folder), no_report=True)
    assert capsys.readouterr().err == ""
    assert json.loads((folder / "_eclipse/command.json").read_text())["command"].startswith("eclipse-ray")


def test_an_evaluation_is_not_written_over_another_run(world, folders):
    with pytest.raises(InputError, match="already holds data"):
        verbs.evaluate(world.rest, test=world.test, out=str(folders["purify"]))
    with pytest.raises(InputError, match="already holds data"):
        verbs.evaluate(world.rest, test=world.test, settings={"data.output": str(folders["purify"])})
