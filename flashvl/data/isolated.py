"""Questions to a process of its own, for code that may compute for hours or fill the memory.

Python cannot stop a thread, and time limits by signals work in the main thread alone, which a Ray
worker's code does not run in. So the code runs in a process that sets the kernel's timers for each
question; when one ends, the kernel ends the process, even inside a long C function. A line of JSON
goes in, and a line comes out.
"""

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

START_SECONDS = 600.0
"""Time to start the process and to import what it needs, from a slow disk too."""


class Isolated:
    """The asking side; any thread may ask. The process starts at the first question."""

    def __init__(self, module: str, arguments: Sequence[str] = ()):
        """
        Args:
            module: what the process runs; it calls `serve`.
        """
        self._command = [sys.executable, "-P", "-m", module, *arguments]
        self._lock = threading.Lock()
        self._running: subprocess.Popen[str] | None = None
        self._owner = 0

    def ask(self, question: Any) -> Any:
        """The answer; None if the process ended, by its limits or by a fault. The next question
        starts another."""
        with self._lock:
            if self._running is None or self._owner != os.getpid():  # a fork must not share it
                self._start()
            running = self._running
            assert running is not None and running.stdin is not None and running.stdout is not None
            try:
                running.stdin.write(json.dumps(question) + "\n")
                running.stdin.flush()
                line = running.stdout.readline()  # ends at the latest when the kernel ends it
            except BrokenPipeError:
                line = ""
            if not line.endswith("\n"):
                running.kill()
                running.wait()
                self._running = None
                return None
            return json.loads(line)

    def _start(self) -> None:
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        self._running = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths},
            text=True,
            encoding="utf-8",
        )
        self._owner = os.getpid()
        atexit.register(self._running.kill)


def serve(
    build: Callable[[], Callable[[Any], Any]],
    *,
    wall_seconds: float,
    cpu_seconds: float = 0.0,
    memory_bytes: int | None = None,
) -> None:
    """Answer the questions on the standard input until it ends.

    Args:
        build: imports what is needed, and gives the function that answers; its answers are JSON.
        wall_seconds: time after which a question is given up, however little of it was computing.
        cpu_seconds: computing time for a question, which does not depend on what else the machine
            does; 0: any.
        memory_bytes: address space of the process; None: any.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when this process ends
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)  # which ends the process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGALRM, signal.SIGPROF))
    signal.setitimer(signal.ITIMER_REAL, START_SECONDS)
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the code prints is no answer
    answer = build()
    for line in sys.stdin.buffer:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        signal.setitimer(signal.ITIMER_REAL, wall_seconds)
        text = json.dumps(answer(question))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        out.write(text + "\n")
        out.flush()
