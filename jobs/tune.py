r"""Searches for the best network on the Ray this job runs under; takes the arguments of `carray tune`.

Submit, from the clone:

    ray job submit --working-dir . -- python jobs/tune.py --manifest s3://BUCKET/manifest.parquet \
        --out s3://BUCKET/run --config jobs/configs/cars-cpu.yaml

Where carray is installed on the nodes, from anywhere: the same with `python -m carray tune` for `python jobs/tune.py`,
and without --working-dir; --config may be a file in a bucket.
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
