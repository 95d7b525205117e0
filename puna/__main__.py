"""`python -m puna` and the `puna` command."""

import os
import sys

#: OpenMP's threads sleep while they wait for each other. By default they spin, which wins 5 % on an idle machine and
#: loses twenty-fold where another program wants one of few cores. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """Runs the command line and exits with its code."""
    from puna.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
