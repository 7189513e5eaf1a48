import threading

import pytest

from matu_jax.data.feed import Grid, grid, prefetched


def test_a_round_that_fits_stays_whole_and_fills_the_devices():
    assert grid(7, 20, 100, multiple=2, at_once=2, budget_bytes=8 * 20 * 100) == Grid(1, 8, 1, 20)


@pytest.mark.parametrize("slots", [1, 5, 8, 61])
@pytest.mark.parametrize("steps", [1, 7, 12, 50])
@pytest.mark.parametrize("budget", [1, 1_000, 30_000])
def test_pieces_cover_the_round_within_the_budget(slots, steps, budget):
    cut = grid(slots, steps, 100, multiple=2, at_once=4, budget_bytes=budget)
    assert cut.chunks * cut.steps == steps
    assert (cut.groups - 1) * cut.slots < slots <= cut.groups * cut.slots
    assert cut.slots % 2 == 0
    size = cut.slots * cut.steps * 100
    assert size <= budget or (cut.steps == 1 and cut.slots <= 4)


def test_prefetched_in_order_from_any_start_and_by_other_threads():
    threads = set()

    def make(position):
        threads.add(threading.get_ident())
        return position**2

    assert list(prefetched(make, 3, 40)) == [n**2 for n in range(3, 40)]
    assert threading.get_ident() not in threads
    assert list(prefetched(make, 5, 5)) == []


def test_an_error_in_a_piece_reaches_the_reader():
    def make(position):
        if position == 2:
            raise OSError("disk gone")
        return position

    with pytest.raises(OSError, match="disk gone"):
        list(prefetched(make, 0, 4))
