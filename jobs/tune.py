"""Searches for the best network on the Ray this job runs under; takes the arguments of `carray tune`.

Submit: ray job submit --working-dir . -- python jobs/tune.py --manifest s3://bucket/manifest.parquet --out
s3://bucket/run
    --config jobs/configs/cars-cpu.yaml
Cost: what the configuration says; cars-cpu.yaml is meant for an hour of two cores.
"""

import sys
from pathlib import Path

# A submitted working directory is not an installed package; an installed carray of the same release is the same code.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from carray.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["tune"]
    main()
