"""A lock that keeps an output to one job at a time.

On a local disk the kernel locks a file, and unlocks it when the process ends. An object store has
no locks, and its clock may differ: there the file is a lease. Its holder writes it anew every
`RENEW_S`; another job takes it over after seeing it unchanged for `EXPIRES_S`.
"""

import contextlib
import fcntl
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from flashvl.data.storage import Location
from flashvl.errors import ConfigError

logger = logging.getLogger(__name__)

LOCK = "_lock"
RENEW_S = 5.0
"""Seconds after which a lease's holder writes it anew."""
EXPIRES_S = 30.0
"""Seconds without a change after which a lease may be taken over."""
SETTLE_S = 2.0
"""Seconds, longer than a write takes, after which a new lease is certain: of two jobs that wrote it
at once, the later holds it."""


@contextmanager
def held(folder: Location) -> Iterator[None]:
    """Make `folder` and keep other jobs off it, at the longest until this process ends or dies.

    Raises:
        ConfigError: another process runs a job on the folder, or it cannot be written.
    """
    with ExitStack() as stack:
        try:
            folder.make_folder()
            lock = folder / LOCK
            stack.enter_context(_locked(lock) if lock.is_local else _leased(lock))
        except OSError as error:
            raise ConfigError(
                f"output {folder} cannot be written ({error.strerror or error}); name another"
                " folder"
            ) from None
        except _HeldError:
            raise ConfigError(
                f"another job is running on output {folder}; wait for it, or name another folder"
            ) from None
        yield


class _HeldError(Exception):
    pass


@contextmanager
def _locked(lock: Location) -> Iterator[None]:
    with open(lock.path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _HeldError from None
        yield


@contextmanager
def _leased(lock: Location) -> Iterator[None]:
    owner = uuid.uuid4().hex
    _wait_for(lock)
    lock.write(_lease(owner))
    time.sleep(SETTLE_S)
    if not _is_of(owner, lock):
        raise _HeldError
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(lock, owner, ended), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        with contextlib.suppress(OSError):  # an old lease does no harm to what the job wrote
            if _is_of(owner, lock):
                lock.remove()


def _wait_for(lock: Location) -> None:
    """Wait until there is no lease or it has expired, as that of a killed job does.

    Raises:
        _HeldError: the lease's holder renews it.
    """
    found = _read(lock)
    deadline_s = time.monotonic() + EXPIRES_S
    while found is not None and time.monotonic() < deadline_s:
        time.sleep(1.0)
        if (now := _read(lock)) is None:
            return
        if now != found:
            raise _HeldError


def _renew(lock: Location, owner: str, ended: threading.Event) -> None:
    """Renew the lease until the job has ended.

    Where the store did not answer for longer than the lease lasts, and another job has taken over,
    stop this job.
    """
    while not ended.wait(RENEW_S):
        with contextlib.suppress(OSError):
            if not _is_of(owner, lock):
                logger.error("another job has taken over output %s: stopping this one", lock)
                os.kill(os.getpid(), signal.SIGTERM)
                return
            lock.write(_lease(owner))


def _lease(owner: str) -> bytes:
    return f"{owner} {time.monotonic_ns()}\n".encode()


def _is_of(owner: str, lock: Location) -> bool:
    return (_read(lock) or b"").startswith(owner.encode())


def _read(lock: Location) -> bytes | None:
    try:
        return lock.read()
    except FileNotFoundError:
        return None
