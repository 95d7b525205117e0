"""The walls of the sandbox: the command that starts a Python in bubblewrap, and what of the host that Python sees.

    setpriv …  bwrap --unshare-all … --ro-bind /usr /usr … --ro-bind STAGE/inside /puna/inside  --  python -c START
    not root   the namespaces          what is seen, read-only        what runs there

STAGE is a temporary folder, which holds the files of `inside/` compiled and, where an ordinary user may not read the
Python that judges, a copy of it. `puna.evaluate.sandbox` says what these walls stop and what they do not.
"""

import contextlib
import fcntl
import importlib.resources
import os
import py_compile
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from puna.devices import package_command
from puna.errors import PunaError

#: Folders of the host that a sandbox sees, read-only, where they exist; links (`/lib` on most systems) stay links.
HOST_FOLDERS = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store")

#: What the name of a judge's own temporary folder begins with, and how old one is that may have been left by a kill.
STAGE = "puna-sandbox-"
LEFT_SECONDS = 3600.0

#: What a sandbox's Python runs; `/puna` is on its path for no longer than that.
START = "import sys; sys.path.insert(0, '/puna'); from inside.main import main; sys.path.pop(0); main(*sys.argv[1:])"

#: All that a sandbox has of an environment. LD_BIND_NOW: symbols are looked up once, not in each new process.
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "LD_BIND_NOW": "1",
}

#: The ordinary uid and gid that root becomes: `nobody`.
NOBODY = 65534

#: Parts of a Python installation that a judged program does without; left out where Python has to be copied.
NOT_COPIED = (
    "site-packages", "dist-packages", "test", "tests", "idlelib", "ensurepip", "tkinter", "lib2to3", "config-*", "*.a",
)  # fmt: skip

#: Package manager -> the command that installs bubblewrap.
INSTALL = {
    "apt-get": "apt-get install -y bubblewrap",
    "dnf": "dnf install -y bubblewrap",
    "yum": "yum install -y bubblewrap",
    "apk": "apk add bubblewrap",
    "pacman": "pacman -S --noconfirm bubblewrap",
    "zypper": "zypper install -y bubblewrap",
}


def walled_python(cleanup: contextlib.ExitStack) -> tuple[list[str], str]:
    """The command that starts this Python behind the walls, to which arguments of `inside/main.py` are added.

    Args:
        cleanup: removes, when it is closed, what the command needs of the disk.

    Returns:
        The command and bubblewrap's version.

    Raises:
        PunaError: there is no bubblewrap, or no way to give up root.
    """
    bubblewrap, version, features = _bubblewrap()
    stage = _stage(cleanup)
    command = [*_ordinary_user(), bubblewrap, *_walls(features), *_view(stage)]
    executable = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    command += ["--remount-ro", "/", "--", executable, "-s", "-S", "-P", "-B", "-c", START]
    return command, version


def _bubblewrap() -> tuple[str, str, str]:
    """Path, version and help text of bubblewrap; the help says which of its newer options there are."""
    path = shutil.which("bwrap")
    if path is None:
        raise PunaError(
            f"generated code runs only inside bubblewrap, which is not here; install it: {install_command()}"
        )
    version, features = (
        subprocess.run([path, option], capture_output=True, text=True, check=False).stdout
        for option in ("--version", "--help")
    )
    return path, version.split()[-1] if version else "of unknown version", features


def install_command() -> str:
    """The command that installs bubblewrap on this machine."""
    if sys.platform != "linux":
        return "none; it is a Linux program: score on a Linux machine or in a virtual one"
    return package_command(INSTALL) or "see https://github.com/containers/bubblewrap"


def unusable(why: str) -> PunaError:
    """An error to raise where bubblewrap is there and does not work."""
    return PunaError(
        f"the sandbox does not work on this machine, so nothing was run: {why}\n"
        "it needs user namespaces: in a container, --security-opt seccomp=unconfined and apparmor=unconfined; "
        "on Ubuntu, sysctl kernel.apparmor_restrict_unprivileged_userns=0"
    )


def _ordinary_user() -> list[str]:
    """What a command starts with to be run by an ordinary user; nothing, where we are one."""
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise PunaError(
            "root scores only by way of setpriv (package util-linux), which is not here; score as another user"
        )
    return [setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]


def _walls(features: str) -> list[str]:
    walls = ["--unshare-all", "--die-with-parent", "--new-session", "--hostname", "puna"]
    if "--clearenv" in features:
        walls += ["--clearenv"]
    if "--disable-userns" in features:
        walls += ["--unshare-user", "--disable-userns"]
    for name, value in ENVIRONMENT.items():
        walls += ["--setenv", name, value]
    # The one capability that fresh namespaces and a /tmp take; every process gives it up before it runs a program.
    walls += ["--cap-add", "CAP_SYS_ADMIN"]
    return [*walls, "--dev", "/dev", "--remount-ro", "/dev", "--dir", "/tmp", "--chdir", "/tmp"]


def _view(stage: Path) -> list[str]:
    """What of the host is seen: system folders, the Python that judges, and what it runs."""
    view = []
    for folder in HOST_FOLDERS:
        if os.path.islink(folder):
            view += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            view += ["--ro-bind", folder, folder]
    for path in ("/etc/ld.so.cache", *map(str, Path("/etc").glob("java-*-openjdk"))):  # Debian keeps Java's there
        view += ["--ro-bind-try", path, path]
    for i, prefix in enumerate(_prefixes()):
        copy = stage / f"python-{i}"
        view += ["--ro-bind", str(copy if copy.exists() else prefix), prefix]
    return [*view, "--ro-bind", str(stage / "inside"), "/puna/inside"]


def _stage(cleanup: contextlib.ExitStack) -> Path:
    """A temporary folder with what runs inside, and a copy of this Python where `NOBODY` may not read it."""
    others = os.geteuid() == 0
    parents = [tempfile.gettempdir(), "/tmp", "/var/tmp"]
    parent = next((parent for parent in parents if not others or _is_open(Path(parent))), None)
    if parent is None:
        raise PunaError(
            f"an ordinary user can enter none of {', '.join(parents)}; set TMPDIR to a folder that all may enter"
        )
    _remove_left(Path(parent))
    stage = Path(tempfile.mkdtemp(prefix=STAGE, dir=parent))
    cleanup.callback(shutil.rmtree, stage, ignore_errors=True)
    held = os.open(stage, os.O_RDONLY)
    cleanup.callback(os.close, held)
    with contextlib.suppress(OSError):  # a file system without locks; what is left there stays
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    stage.chmod(0o755)
    (stage / "inside").mkdir(mode=0o755)
    for source in Path(str(importlib.resources.files("puna.evaluate.inside"))).glob("*.py"):
        compiled = stage / "inside" / f"{source.stem}.pyc"
        py_compile.compile(str(source), cfile=str(compiled), dfile=source.stem, doraise=True)
        compiled.chmod(0o644)
    for i, prefix in enumerate(_prefixes()):
        if others and not _is_open(Path(prefix)):
            _copy_python(Path(prefix), stage / f"python-{i}")
    return stage


def _remove_left(parent: Path) -> None:
    """Removes what judges that were killed have left: folders of this user's that no process holds.

    By itself, and not as `puna.files` does likewise: this file needs no package, so that any Python can run it.
    """
    for left in parent.glob(f"{STAGE}*"):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            made = left.lstat()
            if made.st_uid == os.geteuid() and time.time() - made.st_mtime > LEFT_SECONDS:
                folder = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
                stack.callback(os.close, folder)
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)


def _copy_python(prefix: Path, copy: Path) -> None:
    """Makes a Python that everyone may read; of links to the files where that is possible, which takes no time."""

    def link_or_copy(source: str, target: str) -> None:
        mode = os.stat(source).st_mode
        needed = stat.S_IROTH | (stat.S_IXOTH if mode & stat.S_IXUSR else 0)
        try:
            if mode & needed != needed:
                raise PermissionError
            os.link(source, target)
        except OSError:  # another file system, or not for everyone
            shutil.copy2(source, target)
            os.chmod(target, 0o755)

    shutil.copytree(prefix, copy, symlinks=True, copy_function=link_or_copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
    for folder, _, _ in os.walk(copy):
        os.chmod(folder, 0o755)


def _prefixes() -> list[str]:
    """Folders of this Python that the host folders do not hold already."""
    prefixes = dict.fromkeys(os.path.realpath(prefix) for prefix in (sys.base_prefix, sys.base_exec_prefix))
    return [prefix for prefix in prefixes if not any(Path(prefix).is_relative_to(folder) for folder in HOST_FOLDERS)]


def _is_open(path: Path) -> bool:
    """Whether every user may enter the folder."""
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in (path, *path.parents))
