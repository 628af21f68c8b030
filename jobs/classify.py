r"""Classifies a bucket on the Ray this job runs under; takes the arguments of `carray classify`.

Submit, from the clone:

    ray job submit --working-dir . -- python jobs/classify.py s3://BUCKET/run/bundle s3://BUCKET/photos \
        --out s3://BUCKET/predictions

Where carray is installed on the nodes, from anywhere: the same with `python -m carray classify` for
`python jobs/classify.py`, and without --working-dir.
Cost: see `classify_*` in results/cars.csv; one GET an image.
"""

import sys
from pathlib import Path

# A submitted working directory is not an installed package; an installed carray of the same release is the same code.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from carray.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["classify"]
    main()
