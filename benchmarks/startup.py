"""How long the command line takes to answer: `python benchmarks/startup.py [--runs 15]`.

Whole processes, started one after the other; Python's own start is measured beside them.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from record import arguments, compile_puna, record

#: What is started, and the seconds that it may take.
COMMANDS = {
    "python -c pass": ([sys.executable, "-c", "pass"], None),
    "import puna": ([sys.executable, "-c", "import puna"], 0.2),
    "puna --help": ([str(Path(sys.executable).with_name("puna")), "--help"], 0.3),
}


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    args = arguments(parser)
    compile_puna()
    rows = []
    for name, (command, goal) in COMMANDS.items():
        seconds = []
        for _ in range(args.runs + 1):
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - started)
        warm = seconds[1:]  # the first fills the page cache
        rows.append({"command": name, "median_seconds": statistics.median(warm), "slowest": max(warm), "goal": goal})
    record("startup", rows)


if __name__ == "__main__":
    main()
