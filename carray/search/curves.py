"""Draws a run's learning curves: one line a trial, coloured by family, the winner marked.

From: RUN/epochs.parquet. To: RUN/curves.png.
"""

from __future__ import annotations

import io

from carray.core.store.files import join, write_bytes
from carray.search.run_folder import read_epochs

__all__ = ["plot_curves"]

_COLOURS = {"transfer": "#1b6ca8", "cnn": "#d1702a"}


def plot_curves(run: str) -> None:
    """Draw validation top-1 and training loss of every trial by epoch.

    Raises:
        StorageError: the log cannot be read, or the picture not be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    epochs = read_epochs(run)
    figure = Figure(figsize=(10, 4), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    usable = epochs.loc[(epochs["decision"] != "non_finite") & epochs["val_top1"].notna()]
    best = None if usable.empty else usable.nlargest(1, "val_top1")["trial_id"].iloc[0]
    labelled: set[str] = set()
    for (trial, named), rows in epochs.sort_values("epoch").groupby(["trial_id", "family"]):
        family = str(named)
        name = family if family not in labelled else None
        labelled.add(family)
        style = {"color": _COLOURS.get(family, "#555555"), "marker": "o", "markersize": 3}
        style |= {"linewidth": 2.6, "alpha": 1.0} if trial == best else {"linewidth": 1.1, "alpha": 0.6}
        accuracy.plot(rows["epoch"], rows["val_top1"], label=name, **style)
        loss.plot(rows["epoch"], rows["train_loss"], **style)
        if trial == best:
            top = usable[usable["trial_id"] == trial].nlargest(1, "val_top1").iloc[0]
            accuracy.annotate(
                f"{trial}: {top['val_top1']:.1%}",
                (top["epoch"], top["val_top1"]),
                textcoords="offset points",
                xytext=(-6, 8),
                ha="right",
                fontsize=9,
            )
    for axes, title in ((accuracy, "validation top-1"), (loss, "training loss (nats)")):
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    accuracy.margins(y=0.15)
    accuracy.set_ylim(bottom=0)
    if labelled:
        accuracy.legend(loc="best", frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_bytes(join(run, "curves.png"), picture.getvalue())
