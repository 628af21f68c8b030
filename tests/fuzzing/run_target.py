"""Fuzzes one target in this process: Atheris in front, libFuzzer's own arguments behind the target's name.

python tests/fuzzing/run_target.py --list                            print the targets
python tests/fuzzing/run_target.py pixels -max_total_time=60 CORPUS  seeds are written into CORPUS first
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import atheris


def main() -> None:
    """Fuzz the target until libFuzzer's arguments say that it is enough."""
    warnings.simplefilter("ignore")
    logging.disable()
    with atheris.instrument_imports(include=["carray", "PIL", "yaml", "scipy.io"]):
        import PIL.Image
        import scipy.io  # noqa: F401
        from targets import TARGETS

        PIL.Image.preinit()  # imports the formats, which would otherwise come later, and without instruments
    name, *arguments = sys.argv[1:]
    if name == "--list":
        print(*TARGETS)
        return
    from seeds import seeds_of

    for number, seed in enumerate(seeds_of(name)):
        Path(arguments[-1], f"seed-{number}").write_bytes(seed)
    TARGETS[name](b"")  # what a target imports late is no input's time
    atheris.Setup([name, *arguments], TARGETS[name], enable_python_coverage=True)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
