"""Says how many epochs early stopping leaves of a search, and how long they take.

From: configurations, and what each one's images cost. To: ranges of epochs and of seconds.
Invariants: who is stopped is decided by the search's own scheduler (rehearsal); which trial is good is made up, since
nobody knows beforehand, and another each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from carray.estimates.ranges import Range, middle
from carray.estimates.rehearsal import Costs, Curve, replay
from carray.estimates.training import NetCost, frozen_key
from carray.trials.hyper import CnnHyper, TransferHyper
from carray.trials.resources import Share
from carray.trials.space import TuneSettings

__all__ = ["EPOCH_SECONDS", "TRIAL_SECONDS", "rehearse"]

TRIAL_SECONDS, EPOCH_SECONDS = Range(0.3, 2.0), Range(0.05, 0.5)
"""What a trial, and an epoch, cost beside their training (results/tune.csv, fixed)."""
_REHEARSALS = 40

Hyper = CnnHyper | TransferHyper
Tops = npt.NDArray[np.float64]


def rehearse(
    settings: TuneSettings, hypers: Sequence[Hyper], known: Sequence[NetCost], counts: Mapping[str, int], share: Share
) -> tuple[Range, Range]:
    """Rehearse a search over made-up curves, quick and slow; gives epochs and seconds, the middle 80 % of many.

    Args:
        settings: Of the search.
        hypers: Its configurations, in their order.
        known: What each one's images cost.
        counts: Images of train and of val.
        share: How many trials run at once.
    """
    search = settings.search
    scheduler = search.scheduler if search.scheduler in ("asha", "median") else "none"
    epochs, low, high = list[float](), list[float](), list[float]()
    for seed in range(_REHEARSALS if scheduler != "none" else 1):
        tops_TE = _made_up_curves(len(hypers), search.epochs, seed)
        for slow, seconds in ((False, low), (True, high)):
            done = replay(
                [
                    _curve(place, hyper, tops_TE[place], net, counts, slow=slow)
                    for place, (hyper, net) in enumerate(zip(hypers, known, strict=True))
                ],
                scheduler=scheduler,
                reduction_factor=search.reduction_factor,
                grace_epochs=search.grace_epochs,
                workers=share.at_once,
                costs=Costs(trial=_end(TRIAL_SECONDS, slow), epoch=_end(EPOCH_SECONDS, slow)),
            )
            seconds.append(done.seconds)
            epochs.append(float(done.epochs))
    return middle(epochs), Range(middle(low).low, middle(high).high)


def _end(value: Range, slow: bool) -> float:
    return value.high if slow else value.low


def _made_up_curves(trials: int, epochs: int, seed: int) -> Tops:
    """Make curves up: each trial rises to a best of its own, with noise; which is good is the seed's."""
    random = np.random.default_rng(seed)
    best_T = random.uniform(0.2, 0.9, trials)
    rise_E = 1 - np.exp(-3.0 * np.arange(1, epochs + 1) / epochs)
    noise_TE = random.normal(0.0, 0.02, (trials, epochs))
    return np.clip(best_T[:, None] * rise_E + noise_TE, 0.0, 1.0)


def _curve(number: int, hyper: Hyper, top_E: Tops, net: NetCost, counts: Mapping[str, int], *, slow: bool) -> Curve:
    epoch = _end(net.train, slow) * counts["train"] + _end(net.val, slow) * counts["val"]
    views = hyper.cached_views if isinstance(hyper, TransferHyper) and frozen_key(hyper) else 0
    first = _end(net.frozen, slow) * counts["train"]
    # The first epoch's validation passes through the frozen part once, too.
    shared = [first + (_end(net.frozen, slow) * counts["val"] if not e else 0.0) for e in range(min(views, len(top_E)))]
    return Curve(
        number=number,
        family=hyper.family,
        val_top1_E=tuple(float(value) for value in top_E),
        seconds_E=(epoch,) * len(top_E),
        shared=frozen_key(hyper),
        shared_seconds_E=tuple(shared),
    )
