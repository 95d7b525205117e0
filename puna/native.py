"""Builds C files that lie beside Python files, with the machine's compiler, when they are first asked for.

A library is made in a second or two and kept in the user's cache, under a name that holds what it was made of. Where it
cannot be made there is none, and whoever asked goes the way that torch knows: a compiler only makes things faster.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from puna.files import file_aside

#: Package manager -> the command that installs compilers for C and C++.
INSTALL_COMPILER = {
    "apt-get": "apt-get install -y g++",
    "dnf": "dnf install -y gcc-c++",
    "yum": "yum install -y gcc-c++",
    "apk": "apk add g++",
    "pacman": "pacman -S --noconfirm gcc",
    "zypper": "zypper install -y gcc-c++",
    "xcode-select": "xcode-select --install",
}

#: Likewise what Triton makes the C parts of its kernels with.
INSTALL_FOR_TRITON = {
    "apt-get": "apt-get install -y gcc python3-dev",
    "dnf": "dnf install -y gcc python3-devel",
    "yum": "yum install -y gcc python3-devel",
}

FLAGS = ("-O3", "-fopenmp", "-shared", "-fPIC")


def build(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    """The library of a C file; None: this machine has no compiler that makes it, or no room for it.

    Args:
        source: the file.
        flags: of the compiler, beside FLAGS.
    """
    if (program := compiler()) is None:
        return None
    flags = (*FLAGS, *flags)
    files = [source, *sorted(Path(__file__).parent.rglob("*.h"))]
    made_of = b"".join(file.read_bytes() for file in files) + " ".join(flags).encode()
    name = hashlib.sha256(made_of).hexdigest()[:16]
    try:
        library = _cache() / f"{source.stem}-{name}.so"
        if not library.exists():
            with file_aside(library) as file:
                subprocess.run([program, *flags, str(source), "-o", file.name, "-lm"], check=True, capture_output=True)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # an old compiler, no home, a full disk: only slower
        return None


def compiler() -> str | None:
    """The machine's C compiler; None: it has none."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def cpp_compiler() -> str | None:
    """The C++ compiler that compiled layers are built with on a CPU, as torch looks for it; None: there is none."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "puna"
