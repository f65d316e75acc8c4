"""The output folder of a captioning job: `flashvl.data.ledger.outputs`, and a page about it.

captions/part-*.parquet   schema CAPTIONS, and the columns that are kept
report.html               see `flashvl.batch.report`
"""

from flashvl.data.ledger.tables import DEAD_LETTERS_TABLE, TableSpec
from flashvl.data.schema import CAPTIONS

RESULTS = TableSpec(name="captions", schema=CAPTIONS)
TABLES = (RESULTS.name, DEAD_LETTERS_TABLE.name)
"""Folders of the two tables."""
