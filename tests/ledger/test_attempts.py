"""Images that kill their worker are found, even if workers also die for other reasons."""

from hypothesis import given, settings
from hypothesis import strategies as st

from eclipse_ray.ledger import Care, begin, hand_over, hopeless, session, try_alone
from eclipse_ray.ledger.attempts import DEATHS_TO_BLAME, PATIENCE
from eclipse_ray.storage.store import Store
from tests.ledger.helpers import memory_store

ROWS = 12


class Died(Exception):
    """Replaces the death of a worker process."""


def attempt(store: Store, killers: set[int], strike: int = -1) -> tuple[frozenset[int], Care]:
    """Run one worker on a shard; it dies at `killers`, and once at image `strike` for another reason."""
    number = begin(store, "000000", 0, "decode")
    touched = 0

    def work(row: int) -> None:
        nonlocal touched
        if row in killers or touched == strike:
            raise Died
        touched += 1

    blamed, care = try_alone(store, "000000", 0, "decode", number, ROWS, work)
    for row in range(ROWS):
        if row not in blamed and care is not Care.GIVE_UP:
            work(row)
    return blamed, care


def live(store: Store, killers: set[int], strikes: list[int]) -> tuple[frozenset[int], Care, int]:
    for deaths in range(500):
        try:
            return *attempt(store, killers, strikes.pop() if strikes else -1), deaths
        except Died:
            continue
    raise AssertionError("workers died for ever")


def test_no_image_is_tried_alone_before_patience_runs_out():
    store = memory_store()
    for _ in range(PATIENCE):
        assert try_alone(store, "000000", 0, "decode", begin(store, "000000", 0, "decode"), ROWS, exit) == (
            frozenset(),
            Care.USUAL,
        )
    assert {entry.key for entry in store.list("_eclipse/attempts")} == {
        f"_eclipse/attempts/000000/0-decode-{number}" for number in range(1, PATIENCE + 1)
    }


def test_two_killers_cost_three_deaths_and_two_each():
    blamed, care, deaths = live(memory_store(), {3, 7}, [])
    assert (blamed, care) == ({3, 7}, Care.USUAL)
    assert deaths == PATIENCE + 2 * DEATHS_TO_BLAME


@settings(max_examples=200)
@given(
    killers=st.sets(st.integers(0, ROWS - 1), max_size=4),
    strikes=st.lists(st.integers(0, 2 * ROWS), max_size=8, unique=True),
)
def test_killers_are_blamed_and_nobody_struck_once_is(killers, strikes):
    # The places differ, so that no image is blamed for two deaths that have other reasons.
    store = memory_store()
    blamed, care, _ = live(store, killers, list(strikes))
    assert care is not Care.GIVE_UP or strikes
    alone = blamed - killers
    assert not killers or killers <= blamed or care is Care.GIVE_UP
    assert len(alone) <= len(strikes) // DEATHS_TO_BLAME
    store.fs.rm(store.root, recursive=True)


def test_a_shard_that_kills_as_a_whole_is_done_one_by_one_then_given_up():
    store, cares = memory_store(), []
    for _ in range(4 * PATIENCE):
        number = begin(store, "000000", 0, "purify")
        cares.append(try_alone(store, "000000", 0, "purify", number, ROWS, lambda row: row)[1])
    expected = [Care.USUAL] * (2 * PATIENCE) + [Care.ONE_BY_ONE] * PATIENCE + [Care.GIVE_UP] * PATIENCE
    assert cares == expected


def test_a_shard_that_kills_while_it_is_read_is_hopeless():
    store = memory_store()
    found = [hopeless(store, "000000", 0, "decode", begin(store, "000000", 0, "decode")) for _ in range(8)]
    assert found == [False] * (2 * PATIENCE) + [True] * (8 - 2 * PATIENCE)


def test_a_torn_record_starts_the_trial_again():
    store = memory_store()
    for _ in range(PATIENCE):
        begin(store, "000000", 0, "decode")
    for torn in (b"", b"{", b"[]", b'{"other": 1}'):
        store.write("_eclipse/attempts/000000/0-decode-trial", torn)
        assert attempt(store, set()) == (frozenset(), Care.USUAL)
        store.delete("_eclipse/attempts/000000/0-decode-trial")


def test_a_driver_counts_anew_unless_the_one_before_was_stopped_by_a_hanging_worker():
    store = memory_store()
    first, second = session(store), session(store)
    assert first != second
    hand_over(store, second)
    assert session(store) == second
    assert session(store) not in (first, second)
    store.write("_eclipse/attempts/hung", b"../../elsewhere")
    assert session(store).isalnum()
