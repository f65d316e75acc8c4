"""What every entry point does around its one library call: errors, Ray, progress.

Heavy libraries are imported inside the functions, so that `flashvl --help` answers at once.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import requires
from typing import NoReturn

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flashvl.errors import ConfigError, FlashVLError
from flashvl.progress import ShowProgress

MIN_CPUS = 3
"""Logical CPUs of a local Ray, at least: a worker takes two, and reading data needs another."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # every model is a local folder
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # loading is too fast to watch
    "TOKENIZERS_PARALLELISM": "false",  # Ray's processes already run in parallel
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # our deployments' code never blocks
    "RAY_SERVE_PROXY_USE_GRPC": "1",  # sends pieces of answers faster than as objects
    "RAY_SERVE_LOG_TO_STDERR": "0",  # the log is in files
}
"""Environment variables of this process and of the workers that a local Ray starts."""
EXTRAS = ("ray", "serve", "train", "bench", "heif")
"""Extras of flashvl's package, ordered by how much they install."""
YIELD = "flashvl.batch.yielding.yield_cores"
"""Function that the workers of a job call first that shares its machines with a service."""
MIN_BAR, MAX_BAR = 10, 40
"""Columns that a progress bar takes, at least and at most."""
PROGRESS_LINE_S = 10.0
"""Seconds between two lines of progress where the output is not a terminal."""


def allow_downloads() -> None:
    """Let the hub be asked, with progress bars; call this before `report_errors` forbids both."""
    os.environ.setdefault("HF_HUB_OFFLINE", "0")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")


@contextmanager
def report_errors() -> Iterator[None]:
    """Print a `FlashVLError` as one line on stderr and exit with status 2; set `ENVIRONMENT` first.

    A library that is not installed is reported likewise if one of flashvl's extras installs it.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        yield
    except FlashVLError as error:
        _end(str(error))
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        extra = extra_that_brings(library)
        if extra is None:
            raise
        _end(
            f"this command needs the library {library!r}, which is not installed;"
            f" pip install 'flashvl[{extra}]'"
        )


def _end(message: str) -> NoReturn:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    raise SystemExit(2) from None


MODULES = {"grpc": "grpcio", "multipart": "python-multipart", "starlette": "fastapi"}
"""Distributions that install modules of another name."""


def extra_that_brings(module: str) -> str | None:
    """The extra of flashvl that installs a module; None where no extra does."""
    top = module.partition(".")[0]
    distribution = canonicalize_name(MODULES.get(top, top))
    # Parts of Ray are extras of Ray: `ray.serve` comes with another extra than `ray.data`.
    part = module.split(".")[1] if module.startswith("ray.") else ""
    for requirement in map(Requirement, requires("flashvl") or ()):
        if canonicalize_name(requirement.name) != distribution or requirement.marker is None:
            continue
        if part and part not in requirement.extras:
            continue
        for extra in EXTRAS:
            if requirement.marker.evaluate({"extra": extra}):
                return extra
    return None


def start_ray(
    num_cpus: int | None = None,
    *,
    include_dashboard: bool = False,
    log_to_driver: bool = False,
    is_beside_service: bool = False,
) -> None:
    """Connect to the cluster at `RAY_ADDRESS`, as in a submitted job, or else start a local Ray.

    Args:
        num_cpus: logical CPUs of a local Ray; by default the machine's, at least `MIN_CPUS`.
        include_dashboard: start a local Ray with its dashboard, which takes seconds.
        log_to_driver: show the output of workers.
        is_beside_service: let this job's workers take only cores that an online service on the
            cluster does not want, from before they import anything heavy, and this process few.

    Raises:
        ConfigError: no cluster answers at `RAY_ADDRESS`.
    """
    address = os.environ.get("RAY_ADDRESS")
    if is_beside_service:
        # Less than Ray's workers have, which is 15. It still gets some time: it holds the lock.
        os.setpriority(os.PRIO_PROCESS, 0, 19)
    if not address:
        # Ray's C++ part prints messages that only its developers need.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # While another process has their core, waiting OpenMP threads slow a step down sevenfold if
        # they spin, twofold if they sleep. Commands that have the machine to themselves lose
        # 40% by sleeping, so this is set only for those that run beside Ray's processes.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    # These report every execution, and that Ray's progress bars are off; flashvl shows its own.
    logging.getLogger("ray.data._internal.execution.streaming_executor").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    if address:
        try:
            ray.init(
                logging_level=logging.WARNING,
                log_to_driver=log_to_driver,
                runtime_env={"worker_process_setup_hook": YIELD} if is_beside_service else None,
            )
        except ConnectionError:
            raise ConfigError(
                f"no Ray cluster answers at RAY_ADDRESS={address}; "
                "start it, or unset RAY_ADDRESS to use this machine"
            ) from None
        return
    with (
        _no_stderr()
    ):  # hides that the C++ part announces the level set above; failures are exceptions
        ray.init(
            address="local",
            num_cpus=num_cpus or max(MIN_CPUS, os.cpu_count() or 1),
            include_dashboard=include_dashboard,
            # Errors only: its warnings, as of a small /dev/shm, do not matter at this size.
            logging_level=logging.ERROR,
            log_to_driver=log_to_driver,
        )


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Discard what this process and its children write to the file descriptor 2."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@contextmanager
def show_progress(what: str) -> Iterator[ShowProgress]:
    """Yield a `ShowProgress` that draws a bar on stderr, or prints lines where that is no terminal.

    Args:
        what: name of the work, shown before the bar.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _print_lines(what)
        return
    bar = BarColumn(MIN_BAR)
    columns = (TextColumn("{task.description}"), bar, MofNCompleteColumn(), TimeRemainingColumn())
    note_column = TextColumn("{task.fields[note]}")
    with Progress(*columns, note_column, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None, note="")

        def on_progress(done: int, total: int, note: str = "") -> None:
            others = f"{what}  {total}/{total} 00:00:00 "
            room = console.width - len(others) - MIN_BAR
            note = _cut_note(note, room)
            bar.bar_width = max(min(MIN_BAR + room - len(note), MAX_BAR), 1)
            progress.update(task, completed=done, total=total, note=note)

        yield on_progress


def _cut_note(note: str, room: int) -> str:
    """The first figures of a note that fit into `room` columns."""
    while note and len(note) > room:
        note = note.rpartition(", ")[0]
    return note


def _print_lines(what: str) -> ShowProgress:
    next_s = time.monotonic() + PROGRESS_LINE_S
    began_s = 0.0
    first: int | None = None
    """What was done at the first call, by earlier runs, too; `began_s` is its time."""

    def on_progress(done: int, total: int, note: str = "") -> None:
        nonlocal next_s, began_s, first
        now_s = time.monotonic()
        if first is None:
            began_s, first = now_s, done
        if now_s >= next_s:
            next_s = now_s + PROGRESS_LINE_S
            left = ""
            if done > first:
                seconds = (now_s - began_s) * (total - done) / (done - first)
                left = f", {timedelta(seconds=round(seconds))} left"
            note = f", {note}" if note else ""
            sys.stderr.write(f"{what}: {done} of {total}{note}{left}\n")

    return on_progress
