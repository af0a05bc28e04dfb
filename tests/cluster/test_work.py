"""Work on Ray: time-outs, errors that keep their class, results in order, progress. The tasks are real ones."""

import os
import time
from collections.abc import Iterator
from functools import partial
from threading import Lock

import pytest
import ray
from ray import exceptions
from ray.train import ControllerError, WorkerGroupError

from eclipse_ray.cluster.connect import connect
from eclipse_ray.cluster.work import (
    BoardWatcher,
    Tasks,
    Watch,
    brought_home,
    message_of,
    on_a_thread,
    on_threads,
    run_tasks,
    run_trials,
    start_board,
    watched,
)
from eclipse_ray.config import load_config
from eclipse_ray.errors import (
    ConfigError,
    EclipseError,
    InputError,
    InterruptedRunError,
    ResumeError,
    StorageError,
    error_of_note,
    note_of_error,
)


def stream(*steps: tuple[int, int] | float | Exception) -> Iterator[tuple[int, int]]:
    """Yield results, sleep for as many seconds as a number says, raise an error."""
    for step in steps:
        if isinstance(step, Exception):
            raise step
        if isinstance(step, tuple):
            yield step
        else:
            time.sleep(step)


def test_a_stream_that_stands_still_is_given_up():
    told: list[int] = []
    results = watched(stream((1, 0), 60.0), Watch("purify", "shard", 0.2, lambda: told.append(1)))
    assert next(results) == (1, 0)
    with pytest.raises(InterruptedRunError, match=r"no shard was finished for .* run the same command again"):
        next(results)
    assert told == [1]
    assert InterruptedRunError.exit_code == 75


def test_waiting_for_the_first_shard_does_not_make_the_watchdog_more_patient():
    results = watched(stream(0.5, (1, 0), (1, 0), 60.0), Watch("purify", "shard", 1.0))
    assert [next(results), next(results)] == [(1, 0), (1, 0)]
    # Ten times the half second of the start would be five.
    with pytest.raises(InterruptedRunError, match="no shard was finished for 1 s"):
        next(results)


def test_a_stream_that_breaks_says_why_and_a_users_mistake_stays_one():
    with pytest.raises(InterruptedRunError, match="the last line; run the same command again"):
        list(watched(stream((1, 0), OSError("a traceback\nthe last line")), Watch("purify", "shard", 5)))
    with pytest.raises(InputError, match="as it was"):
        list(watched(stream((1, 0), InputError("as it was")), Watch("purify", "shard", 5)))
    assert list(watched(iter([(1, 0), (2, 1)]), Watch("purify", "shard", 5))) == [(1, 0), (2, 1)]


def test_works_run_on_at_most_the_given_number_of_threads_and_return_in_order():
    running, most, lock = 0, 0, Lock()

    def work(number):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return number * number

    squares = on_threads([partial(work, number) for number in range(9)], 3, "work")
    assert squares == [number * number for number in range(9)]
    assert most == 3
    assert on_threads([], 3, "work") == []


def test_what_stops_on_a_thread_is_said_on_the_one_that_waits():
    with pytest.raises(ConfigError, match="as it is"):
        on_threads([partial(next, stream(ConfigError("as it is")))], 1, "work")
    with pytest.raises(EclipseError, match=r"work stopped: by zero; run the same command again"):
        on_threads([partial(next, stream(ZeroDivisionError("by zero"))), lambda: None], 2, "work")


def test_a_call_that_hangs_is_given_up():
    with pytest.raises(InterruptedRunError, match="training stopped: no iteration was finished for 0 s"):
        on_a_thread(lambda: time.sleep(60), Watch("training", "iteration", 0.3))


def test_results_are_made_only_as_they_are_taken():
    made = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    results = watched(numbers(), Watch("work", "number"))
    assert next(results) == 0
    time.sleep(0.3)
    assert len(made) <= 3
    assert list(results) == list(range(1, 100))


KINDS = [EclipseError, ConfigError, InputError, ResumeError, StorageError, InterruptedRunError]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_crosses_as_text_and_keeps_its_class_its_words_and_its_exit_code(kind):
    error = error_of_note(note_of_error(kind("what was wrong")))
    assert (type(error), str(error), error.exit_code) == (kind, "what was wrong", kind.exit_code)


def test_an_error_of_a_class_defined_elsewhere_comes_home_as_the_nearest_of_ours():
    class Special(InputError):
        pass

    assert type(error_of_note(note_of_error(Special("odd")))) is InputError


@pytest.mark.parametrize(
    "wrap",
    [
        lambda error: exceptions.RayTaskError("work", "a long trace", error),
        lambda error: exceptions.RayTaskError("work", "a long trace", error).as_instanceof_cause(),
        lambda error: WorkerGroupError("failed", {1: error}),
        lambda error: ControllerError(WorkerGroupError("failed", {0: error})),
    ],
    ids=["a task", "a task's cause", "a worker of Train", "the controller of Train"],
)
def test_whatever_ray_wraps_around_an_error_it_comes_home_as_it_was(wrap):
    error = InputError("image 3 is empty")
    assert brought_home(wrap(error), "train") is error
    other = brought_home(wrap(ZeroDivisionError("by zero")), "train")
    assert type(other) is InterruptedRunError
    assert str(other) == "train stopped: by zero; run the same command again to resume"


def test_losses_are_one_sentence():
    assert "ran out of memory" in message_of(
        exceptions.OutOfMemoryError("paragraphs\n\nRefer to the documentation")
    )
    assert message_of(exceptions.NodeDiedError("a\nb")) == "a machine of the cluster was lost"
    assert message_of(exceptions.ActorDiedError()) == "a worker process ended"


@pytest.fixture(scope="module")
def cluster():
    return connect(load_config(None, {}))


def work(number: int) -> int:
    if number == 3:
        raise InputError("three is not liked")
    if number == 5:
        os._exit(1)
    # Later ones end first.
    time.sleep(0.2 * (4 - number) if number < 4 else 0)
    return number * number


def test_tasks_return_in_order_and_each_has_its_own_error(cluster):
    tasks = Tasks(work, at_once=3, cpus=0.1, retries=0)
    found = list(
        run_tasks(tasks, ((number,) for number in range(7)), Watch("squares", "square", 60), in_order=True)
    )
    assert [done.number for done in found] == list(range(7))
    assert [done.value() for done in found if done.error is None] == [0, 1, 4, 16, 36]
    with pytest.raises(InputError, match="three is not liked"):
        found[3].value()
    assert isinstance(found[5].error, InterruptedRunError)
    assert str(found[5].error) == "squares stopped: a worker process ended; run the same command again to resume"


def test_a_task_that_hangs_is_given_up_and_cancelled(cluster):
    def sleep(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    tasks = Tasks(sleep, at_once=2, cpus=0.1, retries=0)
    results = run_tasks(tasks, [(0,), (3600,)], Watch("naps", "nap", 5))
    assert next(results).value() == 0
    with pytest.raises(InterruptedRunError, match="naps stopped: no nap was finished for 5 s"):
        next(results)
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, "the task still holds its share"
        time.sleep(0.2)


def trial(settings: dict[str, int], board=None) -> None:
    from ray import tune

    if settings["depth"] == 2:
        tune.report({"error": "too deep", "score": 0.0})
    else:
        board.post.remote({"depth": settings["depth"]})
        tune.report({"score": float(settings["depth"])})


@pytest.mark.chaos
def test_trials_that_fail_are_told_with_their_point_and_their_message(cluster):
    from ray import tune

    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    board, seen = start_board(), []
    watch = Watch("the search", "epoch", 120)
    space = {"depth": tune.grid_search([1, 2, 3])}
    with BoardWatcher(board, lambda entry: seen.append(entry["depth"]), watch):
        trainable = tune.with_parameters(trial, board=board)
        failed = run_trials(trainable, space, {"cpu": 0.5}, tune.TuneConfig(num_samples=1), watch)
    assert failed == [({"depth": 2}, "too deep")]
    assert sorted(seen) == [1, 3]


def test_entries_of_a_board_are_signs_of_life(cluster):
    def report(board) -> str:
        for step in range(8):
            board.post.remote({"step": step})
            time.sleep(0.5)
        return "done"

    board, seen = start_board(), []
    watch = Watch("fit", "step", 3)
    watch.slowest = 0.0
    ray.get(board.post.remote({"step": -1}))
    with BoardWatcher(board, lambda entry: seen.append(entry["step"]), watch):
        (done,) = run_tasks(Tasks(report, at_once=1, cpus=0.1), [(board,)], watch)
    assert done.value() == "done"
    assert seen == list(range(-1, 8))


def test_an_entry_that_is_still_under_way_when_the_work_ends_is_seen(cluster):
    @ray.remote(num_cpus=0)
    class Slow:
        def entry(self, seconds: float) -> dict[str, int]:
            time.sleep(seconds)
            return {"step": 1}

    def report(board, slow) -> None:
        board.post.remote(slow.entry.remote(3))

    board, slow, seen = start_board(), Slow.remote(), []
    # So that no process has to start first.
    ray.get([slow.entry.remote(0), board.take.remote()])
    watch = Watch("fit", "step", 60)
    with BoardWatcher(board, lambda entry: seen.append(entry["step"]), watch):
        list(run_tasks(Tasks(report, at_once=1, cpus=0.1), [(board, slow)], watch))
    assert seen == [1]
