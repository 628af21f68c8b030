"""Runs the search of jobs/configs/cars-gpu.yaml on this machine's GPU, and measures the winner on test images.

    python -m jobs.bench.search.gpu --data ../shared/stanford-cars [--set search.time_budget_minutes=5]

Appends a row to results/gpu.csv, and resumes what `--work` already holds. Exit code 2 without a GPU that torch sees.
Not yet run. Cost: the time budget of the configuration (20 minutes), and a few minutes.
"""

from __future__ import annotations

import json

from jobs.bench.cars import learn
from jobs.bench.rows import Program, set_words

CONFIG = "jobs/configs/cars-gpu.yaml"


def main() -> None:
    """Search, measure, and append a row."""
    program = Program(__doc__, "gpu.csv")
    program.cars_options("gpu")
    program.option("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the search")
    given = program.parse()
    import torch

    if not torch.cuda.is_available():
        program.parser.error(f"torch {torch.__version__} sees no GPU; run it on a machine with one.")
    program.check_cars()
    program.accelerator = torch.cuda.get_device_name()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    figures = learn(given.data.resolve(), work, ["--config", CONFIG, *set_words(given.set)])
    row = {"torch": torch.__version__, **figures}
    program.record([row])
    print(json.dumps(row))


if __name__ == "__main__":
    main()
