"""Who shares the machine: foreign owners, links, modes and PID namespaces are refused, with a message that says why.

All of it is shown as root and as anybody else. Where only root can set a thing up, anybody else shows it by the nearest
way there is: a directory of root's, a user namespace, or a process that takes itself for another user.
"""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from shmsession.clock import SystemClock
from shmsession.errors import UnsafeStore
from shmsession.memory import environment as environments
from shmsession.memory import place as places
from shmsession.memory.store import MemoryStore, Missing
from tests.memory import (
    _LIBC,
    NEW_MOUNTS,
    NEW_PIDS,
    Neighbour,
    check_tables,
    closing,
    create,
    handle,
    in_child,
    memory_store,
    refusal,
    unshare,
    value_of,
    wait_until,
)

NOBODY: Final = 65534
FILES: Final = ("test/attached", "test/lmdb/data.mdb", "test/lmdb/lock.mdb")
DIRECTORIES: Final = (".", "test", "test/lmdb")


@pytest.fixture
def base(place: Path) -> Path:
    """A store with one session that nobody has open."""
    with closing(memory_store(place / "base", SystemClock())) as store:
        create(store, handle(1), "a")
    return place / "base"


def _refused(base: Path, *, attached: bool = False) -> str:
    """Why this process, or one that comes while another is attached, may not open the store."""
    with closing(memory_store(base, SystemClock())) as store:
        return refusal(lambda: value_of(store, handle(1)), UnsafeStore)


@pytest.fixture(params=[False, True], ids=["alone", "while another is attached"])
def neighbour(request: pytest.FixtureRequest, base: Path) -> Iterator[Neighbour | None]:
    """Each refusal is shown to the first who comes and to a later one."""
    if not request.param:
        yield None
        return
    with Neighbour(base) as other:
        assert other(value_of, handle(1)) == "a"
        yield other


def _still_there(base: Path) -> None:
    with closing(memory_store(base, SystemClock())) as store:
        assert value_of(store, handle(1)) == "a"
        check_tables(store)


# ── owners ────────────────────────────────────────────────────────────────────────────────────────────────────


def _as_somebody_else(work: Callable[[], str]) -> str:
    """What `work` returns in a process of another user, or in one that takes itself for one."""
    other = NOBODY if os.geteuid() == 0 else os.geteuid() + 1

    def child() -> str:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        else:
            os.geteuid = lambda: other
        return work()

    return in_child(child)


def test_the_directory_of_another_user_is_refused(base: Path) -> None:
    base.parent.chmod(0o755)
    message = _as_somebody_else(lambda: _refused(base))
    assert f"{base} belongs to uid {os.geteuid()}" in message
    assert "SHMSESSION_DIR" in message
    _still_there(base)


def test_the_store_of_another_user_in_one_s_own_directory_is_refused(base: Path) -> None:
    """Somebody who could write there once made it, and waits for sessions to come."""
    if os.geteuid() == 0:
        os.chown(base, NOBODY, NOBODY)
        base.parent.chmod(0o755)
        message = _as_somebody_else(lambda: _refused(base))
        assert f"{base / 'test'} belongs to uid 0" in message
    else:
        with closing(memory_store(Path("/"), SystemClock(), name="usr")) as store:
            message = refusal(store.environment.open, UnsafeStore)
        assert "/ belongs to uid 0" in message
    assert "SHMSESSION_DIR" in message


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_user_is_refused(base: Path, name: str) -> None:
    target = base / name
    if os.geteuid() == 0:
        os.chown(target, NOBODY, NOBODY)
        message = _refused(base)
        assert f"belongs to uid {NOBODY}" in message
        os.chown(target, 0, 0)
    else:
        directory = os.open(target.parent, os.O_RDONLY)

        def look() -> str:
            if name == FILES[0]:
                return refusal(lambda: places.open_file(target, directory), UnsafeStore)
            return refusal(lambda: places.check_entry(target, directory), UnsafeStore)

        message = _as_somebody_else(look)
        os.close(directory)
        assert f"belongs to uid {os.geteuid()}" in message
    assert str(target) in message
    _still_there(base)


def test_a_directory_that_cannot_be_made_is_refused_with_the_reason(place: Path) -> None:
    missing = place / "missing" / "base"
    with closing(memory_store(missing)) as store:
        message = refusal(store.environment.open, UnsafeStore)
    assert f"{missing} cannot be made" in message
    assert "SHMSESSION_DIR" in message


# ── links ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [*DIRECTORIES, *FILES])
def test_a_symbolic_link_is_refused_even_to_the_real_thing(base: Path, neighbour: object, name: str) -> None:
    target = base / name
    real = base.parent / "moved"
    target.rename(real)
    target.symlink_to(real)
    message = _refused(base)
    assert f"{target} is a symbolic link" in message
    assert "remove it" in message
    target.unlink()
    real.rename(target)
    _still_there(base)


@pytest.mark.parametrize("name", [*DIRECTORIES, *FILES])
def test_a_symbolic_link_to_nowhere_is_refused_and_nothing_made_behind_it(base: Path, name: str) -> None:
    target = base / name
    target.rename(base.parent / "moved")
    target.symlink_to(base.parent / "victim")
    assert f"{target} is a symbolic link" in _refused(base)
    assert not (base.parent / "victim").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_a_second_name_is_refused(base: Path, neighbour: object, name: str) -> None:
    """Whoever holds the other name reads and writes along."""
    os.link(base / name, base.parent / "second")
    message = _refused(base)
    assert str(base / name) in message
    assert "2 hard links" in message
    (base.parent / "second").unlink()
    _still_there(base)


# ── modes and kinds ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_that_others_may_enter_is_refused(base: Path, neighbour: object, name: str, mode: int) -> None:
    (base / name).chmod(mode)
    message = _refused(base)
    assert f"{base / name} has mode {mode:04o}, it must be 0700" in message
    assert stat.S_IMODE((base / name).stat().st_mode) == mode, (
        "it is not for us to repair: sessions may be read already"
    )
    (base / name).chmod(0o700)
    _still_there(base)


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o602])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_others_may_open_is_refused(base: Path, neighbour: object, name: str, mode: int) -> None:
    (base / name).chmod(mode)
    assert f"{base / name} has mode {mode:04o}, it must be 0600" in _refused(base)
    (base / name).chmod(0o600)
    _still_there(base)


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_or_a_directory_in_the_place_of_a_file_is_refused_and_not_waited_for(base: Path, name: str) -> None:
    target = base / name
    target.rename(base.parent / "moved")
    os.mkfifo(target, 0o600)
    assert f"{target} is not a file" in _refused(base)
    target.unlink()
    target.mkdir(0o700)
    assert f"{target} is not a file" in _refused(base)
    target.rmdir()
    (base.parent / "moved").rename(target)
    _still_there(base)


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_file_in_the_place_of_a_directory_is_refused(base: Path, name: str) -> None:
    target = base / name
    target.rename(base.parent / "moved")
    target.touch(0o600)
    assert f"{target} is not a directory" in _refused(base)


def test_everything_is_checked_again_at_every_opening(base: Path) -> None:
    with closing(memory_store(base, SystemClock())) as store:
        assert value_of(store, handle(1)) == "a"
        (base / FILES[1]).chmod(0o644)
        assert value_of(store, handle(1)) == "a"
        store.environment.close()
        assert "0644" in refusal(lambda: value_of(store, handle(1)), UnsafeStore)
        (base / FILES[1]).chmod(0o600)
        assert value_of(store, handle(1)) == "a"


def test_a_refusal_leaves_no_descriptor_open(base: Path) -> None:
    (base / FILES[0]).chmod(0o644)
    _refused(base)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        _refused(base)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# ── PID namespaces ────────────────────────────────────────────────────────────────────────────────────────────


def _into_a_container(own_proc: bool) -> Callable[[], int]:
    """A fork whose child is the first process of a new PID namespace, as in a container."""

    def fork() -> int:
        pid = os.fork()
        if pid:
            return pid
        if not unshare(NEW_PIDS | NEW_MOUNTS if own_proc else NEW_PIDS):
            # Neither root nor a user namespace: then at least the number that the kernel would have given.
            environments._pid_namespace = lambda: 4026530000
            return 0
        inner = os.fork()
        if inner:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]) & 0x7F)
        if own_proc:
            _LIBC.mount(b"proc", b"/proc", b"proc", 0, None)
        return 0

    return fork


@pytest.fixture(params=[False, True], ids=["the host's /proc", "a /proc of its own"])
def container(request: pytest.FixtureRequest) -> Callable[[], int]:
    return _into_a_container(request.param)


def _try(store: MemoryStore) -> str:
    return refusal(lambda: value_of(store, handle(1)), UnsafeStore)


def _when_it_is_free(store: MemoryStore, key: bytes) -> object:
    """What is stored, once the processes that were killed are gone: those of a container die after their first."""
    found: list[object] = []

    def is_free() -> bool:
        try:
            found.append(value_of(store, key))
        except UnsafeStore:
            return False
        return True

    wait_until(is_free)
    return found[0]


def _says_why(message: str) -> None:
    assert "another PID namespace" in message
    assert "container" in message
    assert "SHMSESSION_DIR" in message


def test_a_container_is_refused_while_the_host_is_attached_and_welcome_afterwards(
    base: Path, container: Callable[[], int]
) -> None:
    store = memory_store(base, SystemClock())
    with Neighbour(base, container) as contained:
        assert value_of(store, handle(1)) == "a"
        _says_why(contained(_try))
        assert value_of(store, handle(1)) == "a"
        store.close()
        assert contained(value_of, handle(1)) == "a"
        assert contained(create, handle(2), "b")
    with closing(memory_store(base, SystemClock())) as store:
        assert _when_it_is_free(store, handle(2)) == "b"
        check_tables(store)


def test_the_host_is_refused_while_a_container_is_attached_and_welcome_after_its_death(
    base: Path, container: Callable[[], int]
) -> None:
    with Neighbour(base, container) as contained:
        assert contained(value_of, handle(1)) == "a"
        with closing(memory_store(base, SystemClock())) as store:
            _says_why(_try(store))
            _says_why(_try(store))
            assert contained(create, handle(2), "b")
            contained.kill()
            assert _when_it_is_free(store, handle(2)) == "b"
            check_tables(store)


def test_two_containers_refuse_each_other(base: Path, container: Callable[[], int]) -> None:
    if not in_child(lambda: unshare(NEW_PIDS)):
        numbers = iter((4026530001, 4026530002))

        def container() -> int:
            number, pid = next(numbers), os.fork()
            if pid == 0:
                environments._pid_namespace = lambda: number
            return pid

    with Neighbour(base, container) as one, Neighbour(base, container) as other:
        assert one(value_of, handle(1)) == "a"
        _says_why(other(_try))
        assert one(create, handle(2), "b")
        one.kill()
        assert other(_when_it_is_free, handle(2)) == "b"


def test_processes_of_one_container_share_a_store(base: Path, container: Callable[[], int]) -> None:
    def both() -> tuple[object, object]:
        first = memory_store(base, SystemClock())
        create(first, handle(5), "first")
        found = in_child(lambda: (value_of(first, handle(5)), create(first, handle(6), "second")))
        return found, value_of(first, handle(6))

    assert in_child(both, container) == (("first", True), "second")


def test_a_refused_process_has_changed_nothing(base: Path, container: Callable[[], int]) -> None:
    with closing(memory_store(base, SystemClock())) as store, Neighbour(base, container) as contained:
        create(store, handle(2), "b")
        opened = store.environment.open()
        words = list(opened.words)
        _says_why(contained(_try))
        assert list(opened.words) == words
        assert store.environment.open() is opened
        assert value_of(store, handle(3)) is Missing.UNKNOWN
