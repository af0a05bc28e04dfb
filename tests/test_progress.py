"""Progress and messages: honest figures, a sign of life while nothing moves, the screen given back, JSON lines."""

import io
import json
import logging
import sys
import threading
import time
from functools import partial

import pytest

from eclipse_ray import log, progress
from eclipse_ray.log import say
from eclipse_ray.progress import ProgressLine, close_all, duration, last_words, pace, volume


class Terminal(io.StringIO):
    """Standard error of a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told to; the lines' own thread is kept from printing."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    monkeypatch.setattr(progress._Screen, "_tick", lambda self, idle: None)
    yield Clock
    close_all()


WORK = ("train", "iterations", 1000, 10)


@pytest.mark.parametrize(
    ("line", "steps", "said"),
    [
        # Nothing is promised before anything is done.
        (WORK, [(95, None)], "0/1,000 iterations, 1m35s gone, none done yet"),
        # The time left comes from the rate that was measured here.
        ((*WORK, 500), [(10, (100, 3))], "600/1,000 iterations, 10.0/s, up to 40s left, 3 failed"),
        # What the start is a part of is only a bound.
        (WORK, [(90, (10,))], "10/1,000 iterations, 6.7/min, up to 2h28m left"),
        (WORK, [(90, (10,)), *[(1, (1,))] * 91], "101/1,000 iterations, 1.0/s, 14m59s left"),
        # What is slow is counted by the minute.
        (("transform", "sets", 6, 10), [(40, (1,))], "1/6 sets, 1.5/min, up to 3m20s left"),
    ],
)
def test_a_line_says_how_far_it_is_and_how_long_still(clock, line, steps, said):
    with ProgressLine(*line) as shown:
        for seconds, done in steps:
            clock.now += seconds
            if done:
                shown.advance(*done)
            else:
                assert shown.seconds_left(clock.now) is None
        assert shown.numbers() == said


def test_a_slow_start_is_forgotten_and_a_stall_is_not(clock):
    with ProgressLine("purify", "images", 10_000, 1e9) as line:
        clock.now += 100
        line.advance(10)
        for _ in range(30):
            clock.now += 5
            line.advance(50)
        # 10 images a second since the first report; with the start it would be 6.
        assert line.seconds_left(clock.now) == pytest.approx((10_000 - 1510) / 10, rel=0.05)
        before = line.seconds_left(clock.now)
        clock.now += 600
        assert line.seconds_left(clock.now) > 2 * before


def test_off_a_terminal_a_line_an_interval_and_a_last_one(clock, capsys):
    line = ProgressLine("train", "iterations", 30, 10)
    for _ in range(3):
        clock.now += 4
        line.advance(10, note="loss 0.1")
    assert capsys.readouterr().err.splitlines() == ["train: 30/30 iterations, 2.5/s, took 12s, loss 0.1"]


def test_a_line_is_printed_while_nothing_moves(capsys):
    with ProgressLine("purify", "images", 10, 0.2):
        deadline = time.monotonic() + 20
        said = ""
        while "none done yet" not in said and time.monotonic() < deadline:
            time.sleep(0.05)
            said += capsys.readouterr().err
    assert "purify: 0/10 images" in said
    assert "none done yet" in said


def test_a_block_that_fails_gives_the_screen_back(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", Terminal())

    def work() -> None:
        with ProgressLine("purify", "images", 10, 10) as line:
            line.advance(4, failed=1)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()
    assert progress._screen.bars is None
    assert progress._screen.lines == []
    assert "4/10 images" in sys.stderr.getvalue()


def test_two_bars_at_once_and_words_between_them(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with ProgressLine("first", "epochs", 10, 10) as first, ProgressLine("second", "epochs", 5, 10) as second:
        first.advance(3)
        say("note: [brackets] are kept")
        second.advance(5)
        assert progress._screen.bars is not None
    assert progress._screen.bars is None
    shown = sys.stderr.getvalue()
    assert "note: [brackets] are kept" in shown
    assert "3/10 epochs" in shown
    assert "5/5 epochs" in shown


# A rate below one per second is told per minute or per hour.
WORDS = {
    duration: {0.4: "0s", 59: "59s", 185: "3m05s", 7800: "2h10m", 4 * 86400 + 21600: "4d06h"},
    volume: {0: "0.0 KiB", 400: "0.4 KiB", 3 * 2**20: "3.0 MiB", 2**30 - 1: "1,024.0 MiB", 2**41: "2,048.0 GiB"},
    partial(pace, unit="images"): {1234.56: "1,234.6 images/s", 1.0: "1.0 images/s", 0.98: "58.8 images/min"}
    | {1 / 60: "1.0 images/min", 0.004: "14.4 images/h", 0: "0.0 images/h"},
}


def test_durations_volumes_and_rates_in_words():
    for function, known in WORDS.items():
        assert {number: function(number) for number in known} == known


def test_a_line_says_what_it_waits_for_until_something_is_done(clock):
    with ProgressLine("fit em", "steps", 0, 10, phase="starting Ray") as line:
        clock.now += 12
        assert line.numbers() == "starting Ray, 12s gone"
        line.phase = "first step"
        line.total = 40
        line.begin(10)
        clock.now += 3
        assert line.numbers() == "first step, 15s gone"
        line.advance(6)
        assert line.numbers() == "16/40 steps, 2.0/s, up to 12s left"


def test_work_under_way_is_shown_and_neither_taken_back_nor_the_end(clock):
    with ProgressLine("purify", "images", 100, 10) as line:
        clock.now += 10
        line.reach(30)
        assert line.numbers() == "30/100 images, 3.0/s, up to 23s left"
        # An actor that was started again begins its shard again.
        line.reach(10)
        assert line.done == 30
        line.reach(100)
        assert line in progress._screen.lines


def test_what_never_got_beyond_its_first_phase_leaves_nothing_behind(clock, capsys):
    with (
        pytest.raises(ValueError, match="no such"),
        ProgressLine("train", "iterations", 30, 10, phase="starting Ray"),
    ):
        raise ValueError("no such")
    assert capsys.readouterr().err == ""


def test_nothing_is_said_after_the_last_words(capsys):
    line = ProgressLine("train", "iterations", 30, 0)
    line.advance(3)
    with last_words():
        say("error: stopped")
        other = threading.Thread(target=lambda: (line.advance(3), say("too late")), daemon=True)
        other.start()
        other.join(0.3)
        assert capsys.readouterr().err.splitlines()[-1] == "error: stopped"
        assert other.is_alive()
    other.join(10)


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
