"""Messages: sentences, or one JSON object a line."""

import json
import logging

import pytest

from eclipse_ray import log
from eclipse_ray.progress import ProgressLine


@pytest.fixture(autouse=True)
def _text_again():
    yield
    log.set_format("text")
    log.set_run("", "")


def test_text_is_the_sentence_alone(capsys):
    log.say("hello", shard="1")
    log.event("shard", shard="1")
    assert capsys.readouterr().err == "hello\n"


def test_json_lines_name_run_and_shard(capsys):
    log.set_format("json")
    log.set_run("purify", "abc")
    log.event("shard", shard="0001", ok=3)
    ProgressLine("purify", "images", 4, 10).advance(4, 1)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[0]["shard"] == "0001"
    assert lines[0]["run"] == "abc"
    assert lines[0]["verb"] == "purify"
    assert (lines[1]["done"], lines[1]["failed"], lines[1]["event"]) == (4, 1, "progress")


def test_of_a_library_people_see_errors_alone_and_a_log_gets_everything(capsys):
    library = logging.getLogger("a library")
    library.setLevel(logging.INFO)
    log.listen("a library")
    log.listen("a library")
    library.warning("nobody needs this")
    library.error("a machine is lost")
    library.error("said elsewhere", extra={"hide": True})
    assert capsys.readouterr().err == "a machine is lost\n"
    log.set_format("json")
    library.info("started in %d s", 3)
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["logger"], line["message"]) == ("info", "a library", "started in 3 s")
