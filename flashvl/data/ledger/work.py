"""Rows answered exactly once: what every restartable job does around the work on its rows.

The same command resumes a job that was stopped or killed; a lock keeps other jobs off its output; a
share of dead letters that is too large stops it; and it ends with an audit that counts its files.
"""

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from flashvl.config import StrictModel
from flashvl.data.inputs.listing import ListedFile
from flashvl.data.inputs.source import Done, Source
from flashvl.data.ledger.lock import held
from flashvl.data.ledger.manifest import (
    GROWING,
    Fingerprint,
    check_files,
    check_same,
    claim,
    has_begun,
)
from flashvl.data.ledger.outputs import SUMMARY, OutputFolder, remove_rows
from flashvl.data.ledger.stopping import Drain, stopped_by_sigterm
from flashvl.data.ledger.tables import DEAD_LETTERS_TABLE, OutputTable, TableSpec
from flashvl.data.storage import Location
from flashvl.errors import ConfigError, FlashVLError
from flashvl.progress import ShowProgress

logger = logging.getLogger(__name__)

MIN_ROWS_OF_RATE = 1000
"""Rows of which the share of dead letters is taken at least, so that ten bad photographs in a small
folder do not stop the job."""


class Audit(StrictModel):
    """The closing audit, as written to `_summary.json`: `input == written + dead`."""

    input: int
    """Rows in the input, as counted before the job started, or `max_rows`."""
    written: int
    """Rows in the files of results."""
    dead: int
    """Rows in the files of dead letters."""
    duplicate_ids: int
    """Rows with the id of an earlier row, by a hash of 64 bits; `row` tells them apart."""
    seconds: float
    """Seconds that the run that finished the job took until its last row was on disk."""


AuditT = TypeVar("AuditT", bound=Audit)


class Meter(Protocol):
    """Measures how fast answers come."""

    def add(self, rows: pa.Table) -> Any:
        """Count answered rows."""

    def read(self, *, num_dead: int) -> Any:
        """The rates, whose text is shown beside the progress."""


Answer = Callable[[Done], tuple[Generator[pa.Table, None, None], Drain]]
"""Begins to answer the rows that are not done; gives the answers, with the columns of
`OutputFolder.write`, and what SIGTERM is to call. Where a machine was lost, rows may come twice or
not at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The rows of a job, whose input and output have been checked, and what decides its results."""

    input: str
    """Input as the user named it."""
    source: Source
    output: Location
    results: TableSpec
    kept: pa.Schema
    """Columns that are copied from the input."""
    fingerprint: Fingerprint
    known: list[ListedFile]
    """The source's first files: those whose rows the output already covers."""
    max_rows: int | None
    """First rows to answer, as a trial; None: all."""
    max_error_rate: float
    """Share of dead letters above which the job stops."""
    restart: bool
    """Throw away what the output holds of an earlier job."""

    @property
    def num_rows(self) -> int:
        """Number of rows to answer: all rows of the input, or its first `max_rows`."""
        return min(self.source.num_rows, self.max_rows or self.source.num_rows)

    def check_resumes(self, may_grow: bool) -> None:
        """Refuse an output that another job began, or whose input has changed since.

        Args:
            may_grow: the input may have further files.

        Raises:
            ConfigError: the output is another job's; the error names the difference.
        """
        if has_begun(self.output) and not self.restart:
            check_same(self.output, self.fingerprint, may_differ=GROWING)
            check_files(self.output, self.known, self.source.files, may_grow=may_grow)

    def count_done(self) -> int:
        """Number of rows that the output holds."""
        if self.restart or not has_begun(self.output):
            return 0
        names = (self.results.name, DEAD_LETTERS_TABLE.name)
        return sum(OutputTable(self.output / name).count_rows() for name in names)

    def read_audit(self, model: type[AuditT]) -> AuditT | None:
        """The closing audit of a finished job; None where rows are left to answer."""
        file = self.output / SUMMARY
        if self.restart or not file.is_file():
            return None
        audit = model.model_validate_json(file.read())
        return audit if audit.input == self.num_rows else None

    @contextmanager
    def begun(self) -> Iterator[OutputFolder]:
        """The output, with the rows that it holds already; no other job may write to it meanwhile.

        Raises:
            ConfigError: another job runs on the output or has begun it, it cannot be written, or it
                holds more rows than `max_rows`.
            FlashVLError: the output holds a row twice, or one that the input does not have.
        """
        with held(self.output):
            if self.restart:
                remove_rows(self.output, self.results.name)
            claim(self.output, self.fingerprint, self.source.files, self.known)
            (self.output / SUMMARY).remove()  # written by a trial, about the first rows only
            output = OutputFolder(self.output, self.source.num_rows, self.results, self.kept)
            if output.num_done > self.num_rows:
                raise ConfigError(
                    f"output {self.output} holds {output.num_done} rows, more than max_rows"
                    f" ({self.num_rows}); leave out max_rows, or name another output"
                )
            yield output

    def finish_rows(
        self,
        output: OutputFolder,
        answer: Answer,
        meter: Meter,
        on_progress: ShowProgress,
    ) -> None:
        """Answer the rows that `output` does not hold, until the files hold each row once.

        Ray repeats what was lost with a machine, but sometimes misses rows; so this counts the rows
        and starts again with those that did not come.

        Raises:
            FlashVLError: too many rows are dead letters; the disk is full; the audit failed, so
                that rows are missing or doubled; or SIGTERM came.
        """
        is_left_out = np.arange(len(output.is_done)) >= self.num_rows
        while not (is_done := output.is_done | is_left_out).all():
            num_before = output.num_done
            logger.info("%d rows of %s -> %s", (~is_done).sum(), self.input, self.output)
            self._answer_once(output, is_done, answer, meter, on_progress)
            if output.num_done == num_before:
                raise FlashVLError(
                    f"audit failed: {(~is_done).sum()} rows of {self.input} were read and did not"
                    " come back; did the input change meanwhile? Run again with --restart"
                )
        output.finish_rows()
        if not output.is_done[: self.num_rows].all() or output.num_done > self.num_rows:
            raise FlashVLError(
                f"audit failed: input ({self.num_rows}) must equal written"
                f" ({output.results.num_rows}) + dead ({output.dead_letters.num_rows});"
                " did another program change the output? Run again with --restart"
            )
        self._check_error_rate(output)

    def _answer_once(
        self,
        output: OutputFolder,
        is_done: Done,
        answer: Answer,
        meter: Meter,
        on_progress: ShowProgress,
    ) -> None:
        num_answered = 0
        answers, drain = answer(is_done)
        with stopped_by_sigterm(drain) as stop, closing(answers) as tables:
            for rows in tables:
                num_answered += rows.num_rows
                meter.add(output.write(rows))
                self._check_error_rate(output)
                rates = meter.read(num_dead=output.num_dead)
                on_progress(output.num_done, self.num_rows, str(rates))
                if stop.is_asked:
                    output.flush()  # the machine may be taken away at any moment
                if stop.is_over(num_answered):
                    break
            if stop.is_asked and output.num_done < self.num_rows:
                output.flush()
                raise FlashVLError(
                    f"stopped by SIGTERM with {output.num_done} of {self.num_rows} rows on disk;"
                    " run the same command again for the rest"
                )

    def _check_error_rate(self, output: OutputFolder) -> None:
        """
        Raises:
            FlashVLError: more than `max_error_rate` of the rows so far, or all, are dead letters.
        """
        rate, num_done = self.max_error_rate, output.num_done
        is_all = output.num_dead == self.num_rows > 0 and rate < 1
        if is_all or output.num_dead > rate * max(num_done, MIN_ROWS_OF_RATE):
            output.flush()
            raise FlashVLError(
                f"{output.num_dead} of {num_done} rows are dead letters, more than max_error_rate"
                f" ({rate:g}) allows: {_example(output)}; correct the input or the options and"
                " give --restart, or resume with a greater --max-error-rate"
            )


def _example(output: OutputFolder) -> str:
    for steps, reasons in output.dead_letters.columns("step", "reason"):
        if len(reasons):
            return f"{steps[-1]}: {reasons[-1]}"
    return "see dead_letters"
