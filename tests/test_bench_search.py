"""The arithmetic behind results/tune/*.csv, with the search's own scheduler; what the GPU benchmark says is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from jobs.bench.rows import write_rows
from jobs.bench.search import gpu
from jobs.bench.search.curves import read_curves
from jobs.bench.search.replay import Costs, Curve, Replay, compare, highest_common, replay, shuffles

GOOD = Curve(0, "cnn", (0.5, 0.6, 0.7, 0.9), (10.0, 10.0, 10.0, 10.0))
POOR = Curve(1, "cnn", (0.1, 0.2, 0.3, 0.4), (10.0, 10.0, 10.0, 10.0))
SLOW = Curve(2, "cnn", (0.2, 0.3, 0.4, 0.5), (20.0, 20.0, 20.0, 20.0))


def test_nobody_is_stopped_without_a_scheduler() -> None:
    done = replay([POOR, GOOD], scheduler="none", workers=1)
    assert done.epochs == 8
    assert done.seconds == 80.0
    assert done.steps[:5] == ((10.0, 0.1), (20.0, 0.2), (30.0, 0.3), (40.0, 0.4), (50.0, 0.5))
    assert done.steps[-1] == (80.0, 0.9)


def test_asha_stops_the_poor_one_that_comes_second() -> None:
    """Of two results at the first rung, the lower one is below the cut: it ends after one epoch."""
    done = replay([GOOD, POOR, SLOW], scheduler="asha", workers=1)
    assert done.epochs == 4 + 1 + 1
    assert done.seconds == 40.0 + 10.0 + 20.0
    assert done.best == 0.9


def test_asha_lets_the_first_one_run_whatever_it_is() -> None:
    """Nothing to compare it with; the better one comes when the poor one has had all its epochs."""
    assert replay([POOR, GOOD], scheduler="asha", workers=1).seconds_to(0.9) == 80.0


def test_two_workers_share_the_trials_and_the_earlier_end_takes_the_next() -> None:
    done = replay([SLOW, POOR, GOOD], scheduler="none", workers=2)
    # POOR ends at 40, GOOD takes its place; SLOW ends at 80, as GOOD does.
    assert done.seconds_to(0.5) == 50.0
    assert done.seconds_to(0.9) == 80.0
    assert done.seconds == 80.0


def test_costs_are_paid_where_they_arise() -> None:
    costs = Costs(trial=3.0, epoch=1.0, first_of_epoch=(5.0, 7.0))
    done = replay([GOOD, POOR], scheduler="none", workers=1, costs=costs)
    # The first trial pays for views 1 and 2, the second one finds them there.
    assert done.seconds_to(0.5) == 3.0 + 10.0 + 5.0 + 1.0
    assert done.seconds_to(0.6) == done.seconds_to(0.5) + 10.0 + 7.0 + 1.0  # type: ignore[operator]
    assert done.seconds == 2 * (3.0 + 4 * 11.0) + 5.0 + 7.0


def test_an_epoch_without_a_finite_loss_ends_its_trial_and_is_never_best() -> None:
    broken = Curve(3, "cnn", (0.8, None, 0.99), (10.0, 10.0, 10.0))
    done = replay([broken, POOR], scheduler="asha", workers=1)
    assert done.best == 0.8
    assert done.seconds == 20.0 + 10.0


def test_families_are_judged_apart() -> None:
    other = Curve(1, "transfer", POOR.val_top1_E, POOR.seconds_E)
    assert replay([GOOD, other], scheduler="asha", workers=1).epochs == 8


def test_the_comparison_is_of_each_order_with_itself() -> None:
    pruned = [Replay(((10.0, 0.9),), 10.0, 1), Replay(((20.0, 0.9),), 20.0, 1), Replay(((5.0, 0.4),), 5.0, 1)]
    unpruned = [Replay(((50.0, 0.9),), 50.0, 5), Replay(((40.0, 0.95),), 40.0, 5), Replay(((5.0, 0.95),), 5.0, 5)]
    sooner = compare(pruned, unpruned, 0.9)
    assert sooner.asha_reached == pytest.approx(2 / 3)
    assert sooner.times == pytest.approx((5.0 + 2.0) / 2)
    assert 2.0 <= sooner.low < sooner.times < sooner.high <= 5.0
    assert 2.0 <= sooner.median_low <= sooner.times <= sooner.median_high <= 5.0
    assert highest_common(pruned) == 0.4
    with pytest.raises(ValueError, match="no order reached 0.99"):
        compare(pruned, unpruned, 0.99)


def test_shuffles_are_orders_of_all_and_repeatable() -> None:
    curves = [GOOD, POOR, SLOW]
    drawn = shuffles(curves, 20, seed=1)
    assert drawn == shuffles(curves, 20, seed=1)
    assert all(sorted(curve.number for curve in order) == [0, 1, 2] for order in drawn)
    assert len({tuple(curve.number for curve in order) for order in drawn}) > 1


def test_pruning_reaches_the_target_sooner_when_few_are_good() -> None:
    """One good trial among thirty: stopping the others early must bring it on several times sooner."""
    curves = [Curve(i, "cnn", tuple(0.1 + 0.001 * i + 0.01 * e for e in range(9)), (10.0,) * 9) for i in range(29)]
    curves.append(Curve(29, "cnn", tuple(0.5 + 0.05 * e for e in range(9)), (10.0,) * 9))
    orders = shuffles(curves, 50)
    pruned = [replay(order, scheduler="asha") for order in orders]
    unpruned = [replay(order, scheduler="none") for order in orders]
    assert highest_common([*pruned, *unpruned]) == pytest.approx(0.9)
    assert compare(pruned, unpruned, 0.9).times > 1.5


def test_the_search_on_a_gpu_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--work", str(tmp_path / "work")])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    assert "sees no GPU; run it on a machine with one" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_curves_are_read_with_what_was_paid_beside_them(tmp_path: Path) -> None:
    """Two workers, three trials: the third begins when the second ends, and finds the features of view 1 computed."""
    seconds = {0: [9.0, 4.0, 4.0], 1: [7.0, 3.0, 3.0], 2: [5.0, 5.0, 5.0]}
    clocks = {0: [10.0, 15.0, 20.0], 1: [8.0, 12.0, 16.0], 2: [24.0, 30.0, 36.0]}
    rows = [
        {"family": "cnn", "number": n, "epoch": e + 1, "seconds": seconds[n][e], "clock_seconds": clocks[n][e]}
        | {"val_loss": "" if (n, e) == (2, 2) else 1.0, "val_top1": 0.1 * e}
        for n in seconds
        for e in range(3)
    ]
    write_rows(tmp_path / "curves.csv", rows)
    curves, costs = read_curves(tmp_path / "curves.csv", workers=2, views=1)
    assert [curve.seconds_E for curve in curves] == [(4.0, 4.0, 4.0), (3.0, 3.0, 3.0), (5.0, 5.0, 5.0)]
    assert costs.epoch == 1.0
    assert costs.first_of_epoch == ((9.0 - 4.0) + (7.0 - 3.0),)
    assert costs.trial == 24.0 - 16.0 - 5.0 - 1.0
    assert curves[2].val_top1_E == (0.0, 0.1, None)
