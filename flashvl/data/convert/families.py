"""The families of data sets, by their names."""

from flashvl.data.convert import (
    llava,
    onevision,
    preferences,
    problems,
    reasoning,
    tables,
    webdataset,
)
from flashvl.data.convert.config import ConversionJob
from flashvl.data.convert.family import Family

_FAMILIES = {
    "webdataset": webdataset.FAMILY,
    "llava": llava.FAMILY,
    "onevision": onevision.FAMILY,
    "reasoning": reasoning.FAMILY,
    "preferences": preferences.FAMILY,
    "problems": problems.FAMILY,
}


def find_family(job: ConversionJob) -> Family:
    """The family of a job's data.

    Raises:
        ConfigError: the job's mapping cannot be read.
    """
    if job.mapping is not None:
        return tables.build_family(job.mapping)
    return _FAMILIES[job.family]
