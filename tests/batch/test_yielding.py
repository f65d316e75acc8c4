"""Processes of offline work leave the cores to online work."""

import subprocess
import sys

PROGRAM = """
import os, threading
from flashvl.batch.yielding import yield_cores

def tell():
    print(os.sched_getscheduler(0))

begun, done = threading.Event(), threading.Event()
def wait_and_tell():
    begun.set()
    done.wait()
    tell()
old = threading.Thread(target=wait_and_tell)
old.start()
begun.wait()
tell()
yield_cores()
yield_cores()
tell()
done.set()
old.join()
new = threading.Thread(target=tell)
new.start()
new.join()
"""


def test_all_threads_of_a_process_yield_those_that_come_later_too() -> None:
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == ["0", "5", "5", "5"]  # SCHED_OTHER, then SCHED_IDLE
