"""Where compiled loops are kept: a folder that the user alone can write to, and that has room for programs."""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
import stat
import sys
import tempfile
from pathlib import Path

from .compiler import BuildError

# More than one compiled loop takes.
_ROOM = 1 << 19
_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_OWN = "Set XDG_CACHE_HOME to a folder of your own"


def folder() -> Path:
    """The user's folder, made if it is not there.

    What lies in it is run, so nobody else may put anything there.

    Raises:
        BuildError: it cannot be had, or is not the user's alone.
    """
    try:
        asked = Path(os.environ.get("XDG_CACHE_HOME", ""))
        home = asked if asked.is_absolute() else Path.home() / ".cache"
        for missing in reversed([place for place in (home, *home.parents) if not place.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)
        above = _folder(home)
        open_to_all = above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX
        if open_to_all or above.st_uid not in (0, _user()):
            raise BuildError(f"{home} can be written by other users", _OWN)
        path = home / "implicitdl"
        path.mkdir(mode=0o700, exist_ok=True)
        found = _folder(path)
    except (OSError, RuntimeError) as error:  # no home
        raise BuildError(f"there is no folder to keep them in ({error})", _OWN) from error
    if found.st_uid != _user():
        raise BuildError(f"{path} belongs to another user", _OWN)
    if found.st_mode & _OTHERS:
        raise BuildError(f"{path} can be written by other users", f"Empty it, and close it: chmod go-w {path}")
    return path


def _folder(path: Path) -> os.stat_result:
    found = path.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{path} is no folder")
    return found


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


@functools.cache
def workshop() -> tuple[Path, BuildError | None] | BuildError:
    """Where to compile: the user's folder; or one that goes with the process, and why; or nowhere."""
    reason: BuildError | None = None
    for place in (folder, lambda: Path(tempfile.gettempdir())):
        try:
            path = place()
            _try(path)
            return path, reason
        except BuildError as error:
            reason = BuildError(f"{reason.why}; {error.why}", reason.do) if reason else error
        except OSError as error:  # no folder for temporary files
            reason = BuildError(f"{reason.why if reason else ''}; {error}", _OWN)
    assert reason is not None
    return reason


def _try(path: Path) -> None:
    """That programs have room here and may run, in a millisecond: to find out by compiling takes seconds."""
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(_ROOM))
            file.flush()
            if sys.platform == "linux":
                mmap.mmap(file.fileno(), _ROOM, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()
    except OSError as error:
        raise BuildError(f"{path} has no room for programs, or may not run them ({error.strerror})", _OWN) from error


def kept(home: Path, key: str) -> list[Path]:
    """What was compiled under this key before: whole files, of which the name holds the digest, and the user's own."""
    return [path for path in sorted(home.glob(f"{key}-*.so")) if _is_own(path) and path.name == _name(key, path)]


def keep(home: Path, key: str, library: Path) -> Path:
    """Move a library there, whole or not at all, when two processes compile at once."""
    library.chmod(0o700)  # whatever the umask
    return library.replace(home / _name(key, library))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _name(key: str, library: Path) -> str:
    return f"{key}-{digest(library.read_bytes())}.so"


def _is_own(path: Path) -> bool:
    found = path.lstat()  # a file, and not a pipe, which would be waited for
    return stat.S_ISREG(found.st_mode) and found.st_uid == _user() and not found.st_mode & _OTHERS
