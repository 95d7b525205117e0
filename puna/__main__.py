"""`python -m puna` and the `puna` command."""

import gc
import io
import os
import signal
import sys

# GNU OpenMP's threads wait for each other spinning, 300,000 times before they sleep: where another program wants one of
# few cores, that is most of what they do. 5,000 times last from one product of a decoding step to the next, which sleep
# would make a tenth longer. Read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

# Tensors of 2 MB and more lie in pages of 2 MB, where Linux has some: one core read weights a seventh faster, and a
# training step took 7 % less of its processor time, with fewer pages to make and to look up. Read by torch's allocator.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# NumPy's OpenBLAS starts a thread for each core when it is loaded, and these spin too: half as much work again as to
# load NumPy. puna multiplies with torch alone.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def main() -> None:
    """Runs the command line and exits with its code."""
    from puna.cli import run

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # under nohup, one is not
            signal.signal(number, _leave)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it was closed before the start
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - as long as we are
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: a locale may not spell all of a text
    code = run(sys.argv[1:])
    if "triton" not in sys.modules:  # which complains, since 3.9, of objects that are left over
        gc.freeze()  # or Python would look for circles among all objects once more, with torch loaded for 0.1 s
    sys.exit(code)


def _leave(number: int, _: object) -> None:
    """Ends the process in good order: what is half written is removed, processes of ours are ended."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
