"""What a stage of training has left in its folder."""

from pathlib import Path

import numpy as np

from flashvl.train.run.export import read_log


def assert_every_row_once(output: Path, num_steps: int, num_rows: int) -> None:
    """The steps in the log trained as many rows as the stage has, and all of them were trained."""
    log = read_log(output)
    assert [record["step"] for record in log] == list(range(1, num_steps + 1))
    assert sum(record["samples"] for record in log) == num_rows
    last = max((output / "checkpoints").iterdir())
    bits = np.unpackbits(np.frombuffer((last / "consumed.bin").read_bytes(), np.uint8))
    assert bits[:num_rows].all()
