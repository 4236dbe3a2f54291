"""The directory a store lives in: private to one user, checked by descriptor before anything in it is opened."""

import fcntl
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from shmsession.config import MIN_MAP_SIZE
from shmsession.errors import StoreFull, UnsafeStore

logger = logging.getLogger("shmsession")

DEFAULT_MAP_SIZE: Final = 256 << 20
_HINT: Final = "remove it, or set SHMSESSION_DIR to a directory of this user's own"


def default_directory() -> Path:
    """`shmsession-<uid>` in the shared memory file system, or in the temporary directory where there is none."""
    shared = Path("/dev/shm")  # noqa: S108  # the directory made in it is private, and checked
    parent = shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    return parent / f"shmsession-{os.geteuid()}"


def _check(path: Path, info: os.stat_result, *, directory: bool) -> None:
    kind = "directory" if directory else "file"
    if stat.S_ISLNK(info.st_mode):
        raise UnsafeStore(f"{path} is a symbolic link: {_HINT}")
    if not (stat.S_ISDIR if directory else stat.S_ISREG)(info.st_mode):
        raise UnsafeStore(f"{path} is not a {kind}: {_HINT}")
    if info.st_uid != os.geteuid():
        raise UnsafeStore(f"{path} belongs to uid {info.st_uid}, this process runs as uid {os.geteuid()}: {_HINT}")
    if info.st_mode & 0o077:
        wanted = "0700" if directory else "0600"
        raise UnsafeStore(f"{path} has mode {stat.S_IMODE(info.st_mode):04o}, it must be {wanted}: {_HINT}")
    if not directory and info.st_nlink > 1:
        raise UnsafeStore(f"{path} has {info.st_nlink} hard links, it must have one: {_HINT}")


def open_directory(path: Path) -> int:
    """A descriptor of `path`, a directory of our own with mode 0700; it is made when missing, its parent is not.

    Raises UnsafeStore for symbolic links, other users and other modes.
    """
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise UnsafeStore(f"{path} cannot be made: {error.strerror}. Set SHMSESSION_DIR to a writable place") from error
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        _check(path, path.lstat(), directory=True)
        raise UnsafeStore(f"{path} cannot be opened ({error.strerror}): {_HINT}") from error
    try:
        _check(path, os.fstat(descriptor), directory=True)
    except UnsafeStore:
        os.close(descriptor)
        raise
    return descriptor


def open_file(path: Path, directory: int, *, create: bool = False) -> int:
    """A descriptor of a file in `directory`, of our own, mode 0600, one link. Raises FileNotFoundError, UnsafeStore."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_CREAT if create else 0)
    try:
        descriptor = os.open(path.name, flags, 0o600, dir_fd=directory)
    except FileNotFoundError:
        raise
    except OSError as error:
        _check(path, os.stat(path.name, dir_fd=directory, follow_symlinks=False), directory=False)
        raise UnsafeStore(f"{path} cannot be opened ({error.strerror}): {_HINT}") from error
    try:
        _check(path, os.fstat(descriptor), directory=False)
    except UnsafeStore:
        os.close(descriptor)
        raise
    return descriptor


def check_entry(path: Path, directory: int) -> os.stat_result | None:
    """The same checks without opening: closing a descriptor of LMDB's lock file would drop the process's locks."""
    try:
        info = os.stat(path.name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    _check(path, info, directory=False)
    return info


@contextmanager
def gate(directory: int) -> Iterator[None]:
    """One process at a time opens, makes or rebuilds what is in the directory. Death opens the gate."""
    fcntl.flock(directory, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(directory, fcntl.LOCK_UN)


def size_for(directory: int, wanted: int | None) -> int:
    """The map's size in bytes: the wanted one, or the default cut to half of the free space, with a warning."""
    if wanted is not None:
        return wanted & -4096
    room = os.fstatvfs(directory)
    half = room.f_bavail * room.f_frsize // 2
    if half >= DEFAULT_MAP_SIZE:
        return DEFAULT_MAP_SIZE
    size = max(MIN_MAP_SIZE, half) & -4096
    logger.warning(
        "only %d MiB are free for sessions: the memory store takes %d MiB instead of %d; "
        "give /dev/shm more (docker run --shm-size) or set SHMSESSION_MAP_SIZE",
        half * 2 >> 20,
        size >> 20,
        DEFAULT_MAP_SIZE >> 20,
    )
    return size


def give(descriptor: int, size: int) -> None:
    """Make a file `size` bytes long, all of them backed: a mapped byte that is not is a SIGBUS on a full disk."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # pragma: no cover  # macOS
        os.ftruncate(descriptor, size)


def allocate(path: Path, directory: int, size: int) -> None:
    """Give the file all its bytes now, so that a full file system is an error at the start and never a SIGBUS later."""
    descriptor = open_file(path, directory)
    try:
        give(descriptor, size)
    except OSError as error:
        raise StoreFull(
            f"no room for a memory store of {size >> 20} MiB in {path.parent} ({error.strerror}): "
            "set SHMSESSION_MAP_SIZE to less, or SHMSESSION_DIR to another place"
        ) from error
    finally:
        os.close(descriptor)
