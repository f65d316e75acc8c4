"""The paper's averages (arXiv 2505.09498), recomputed from the rows that it prints.

A column is the eleven benchmarks in the order of the tables: MMMU, MMBench (en), MMBench (cn),
MMStar, MathVista, AI2D, MMVet, HallusionBench, OCRBench, MME, SEEDBench.
"""

import math

import pytest

from flashvl.errors import ConfigError
from flashvl.eval.tasks.catalogue import GENERAL, REASONING, general_average, reasoning_average

# fmt: off
PAPER = {
    "2 Qwen2-VL-2B": (41.9, 74.9, 73.5, 48.0, 43.0, 74.1, 49.5, 39.2, 794, 1872, 71.5, 60.2),
    "2 Aquila-VL-2B": (44.4, 78.6, 76.3, 54.9, 59.4, 75.0, 40.9, 38.5, 773, 1813, 78.9, 62.6),
    "2 InternVL2.5-2B": (41.8, 74.7, 71.6, 54.1, 50.9, 75.1, 61.7, 42.7, 800, 2091, 73.2, 63.6),
    "2 Flash-VL-2B s": (43.6, 78.4, 74.7, 53.8, 59.3, 74.2, 47.3, 43.5, 764, 1715, 73.6, 62.4),
    "2 Flash-VL-2B d": (42.9, 78.4, 74.9, 54.4, 58.1, 74.1, 52.7, 45.5, 831, 1866, 73.6, 64.0),
    "2 Flash-VL-2B d-ISS": (42.9, 79.1, 76.7, 54.1, 61.5, 74.4, 50.7, 49.0, 843, 1850, 74.5, 64.8),
    "3 AIMv2-H": (40.3, 68.2, 66.4, 43.3, 27.9, 60.0, 33.8, 34.8, 184, 1505, 69.1, 46.9),
    "3 SigLIP2-L": (38.8, 69.0, 67.5, 41.5, 27.8, 60.1, 32.4, 38.3, 342, 1557, 69.1, 48.6),
    "3 SigLIP2-so400m": (38.8, 71.7, 68.2, 43.3, 27.9, 62.3, 34.4, 39.8, 386, 1531, 70.7, 50.0),
    "4 s": (40.8, 76.7, 74.1, 53.4, 56.1, 73.6, 40.4, 44.6, 696, 1804, 73.2, 60.6),
    "4 s DPO": (43.6, 78.4, 74.7, 53.8, 59.3, 74.1, 47.3, 43.5, 764, 1715, 73.6, 62.4),
    "4 d": (43.3, 76.5, 74.7, 54.3, 54.7, 74.1, 48.1, 43.4, 786, 1910, 73.3, 62.7),
    "4 d DPO": (42.9, 78.4, 74.9, 54.4, 58.1, 74.1, 52.7, 45.5, 831, 1866, 73.6, 64.0),
    "4 d-ISS": (40.7, 77.8, 75.0, 55.0, 62.0, 75.2, 45.5, 47.6, 795, 1894, 74.4, 63.7),
    "4 d-ISS DPO": (42.9, 79.1, 76.7, 54.1, 61.5, 74.4, 50.7, 49.0, 843, 1850, 74.5, 64.8),
    "5 stage 1": (38.8, 67.4, 66.1, 41.9, 27.8, 62.2, 32.6, 38.4, 365, 1499, 69.9, 48.6),
    "5 stage 2": (41.3, 70.2, 65.8, 44.6, 45.7, 66.9, 38.3, 39.7, 563, 1623, 71.3, 54.4),
    "5 stage 3": (42.0, 74.4, 70.9, 51.5, 55.1, 72.9, 38.0, 39.6, 685, 1778, 72.5, 59.0),
    "5 stage 4": (40.8, 76.7, 74.1, 53.4, 56.1, 73.6, 40.4, 44.6, 696, 1804, 73.2, 60.6),
    "5 stage 5": (43.6, 78.4, 74.7, 53.8, 59.3, 74.1, 47.3, 43.5, 764, 1715, 73.6, 62.4),
    "6 static": (40.3, 68.2, 66.4, 43.3, 27.9, 60.0, 33.8, 34.8, 184, 1505, 69.1, 46.9),
    "6 dynamic": (39.6, 71.8, 70.4, 42.2, 28.4, 63.2, 35.2, 36.3, 383, 1697, 71.4, 50.6),
    "6 overlap": (39.0, 70.1, 68.4, 44.9, 27.6, 62.1, 33.8, 36.7, 366, 1601, 72.1, 49.9),
    "6 ISS": (40.4, 72.8, 70.2, 45.1, 28.5, 63.2, 33.9, 35.3, 427, 1687, 72.5, 51.4),
    "10 AIMv2": (40.3, 68.2, 66.4, 43.3, 27.9, 60.0, 33.8, 34.8, 184, 1505, 69.1, 46.9),
    "10 AIMv2 dynamic": (39.6, 71.8, 70.4, 42.2, 28.4, 63.2, 35.2, 36.3, 383, 1697, 71.4, 50.7),
    "10 SigLIP2": (38.8, 71.7, 68.2, 43.3, 27.9, 62.3, 34.4, 39.8, 386, 1531, 70.7, 50.0),
    "10 SigLIP2 dynamic": (39.1, 70.5, 68.4, 41.8, 27.1, 61.0, 32.3, 35.4, 367, 1662, 70.8, 49.3),
}
WITHOUT_MME = {
    "8 two linear layers": (36.7, 56.5, 55.2, 33.6, 27.8, 55.2, 17.6, 27.6, 54, 1436, 55.1, 39.4),
    "8 proposed": (38.3, 61.5, 57.3, 35.7, 24.0, 54.6, 23.9, 33.7, 168, 1569, 62.6, 40.8),
    "9 LLaMA-3.2-1B": (30.3, 41.4, 42.4, 28.5, 23.5, 54.0, 20.1, 29.1, 193, 1324, 46.9, 33.2),
    "9 Qwen-2-1.5B": (34.8, 62.3, 56.7, 35.0, 15.9, 52.3, 18.2, 28.4, 195, 1477, 62.1, 38.3),
    "9 Qwen-2.5-1.5B": (38.3, 61.5, 57.3, 35.7, 24.0, 54.6, 23.9, 33.7, 168, 1569, 62.6, 40.8),
}
# fmt: on
TABLE_7 = {
    "stage 4": (23.19, 26.72, 16.84, 16.24, 36.03, 23.80),
    "SFT": (28.28, 31.06, 16.97, 15.95, 38.16, 26.08),
    "RL": (26.94, 27.94, 17.73, 16.99, 46.55, 27.23),
    "SFT and RL": (30.61, 32.48, 18.45, 16.53, 47.18, 29.05),
}
"""DynaMath, MathVision, MathVerse, MMMU Pro, WeMath and the average, by the table's headings."""

NAMES = [task.name for task in GENERAL]


def closes(average: float, printed: float) -> bool:
    return abs(average - printed) <= 0.05 + 1e-9


def test_the_tables_with_all_eleven_close_in_26_of_28_columns() -> None:
    averages = {
        column: general_average(dict(zip(NAMES, rows[:-1], strict=True)))
        for column, rows in PAPER.items()
    }
    assert len(averages) == 28
    open_ones = {
        column: round(average, 2)
        for column, average in averages.items()
        if not closes(average, PAPER[column][-1])
    }
    assert open_ones == {"2 InternVL2.5-2B": 63.68, "6 dynamic": 50.67}
    # Both are cut off to one decimal rather than rounded.
    assert [math.floor(10 * average) / 10 for average in open_ones.values()] == [63.6, 50.6]


def test_the_tables_of_adapters_and_language_models_leave_mme_out() -> None:
    def without_mme(rows: tuple[float, ...]) -> float:
        figures = dict(zip(NAMES, rows[:-1], strict=True))
        whole = general_average(figures) * len(NAMES)
        return (whole - figures["mme"] / 28) / (len(NAMES) - 1)

    closing = {
        column for column, rows in WITHOUT_MME.items() if closes(without_mme(rows), rows[-1])
    }
    assert closing == {"8 proposed", "9 Qwen-2.5-1.5B"}
    assert not any(
        closes(general_average(dict(zip(NAMES, rows[:-1], strict=True))), rows[-1])
        for rows in WITHOUT_MME.values()
    )


def test_the_table_of_reasoning_is_the_mean_of_five() -> None:
    names = [task.name for task in REASONING]
    for *figures, printed in TABLE_7.values():
        average = reasoning_average(dict(zip(names, figures, strict=True)))
        assert average == pytest.approx(printed, abs=0.011)


SIZES = (5010, 3940, 3040, 1730, 1740)


def share_of(figure: float, items: int) -> bool:
    """Whether a figure is right answers out of all items in percent, cut off to two decimals."""
    hundredths = round(100 * figure)
    rights = math.ceil(hundredths * items / 10_000)
    return rights * 10_000 // items == hundredths


def test_the_figures_of_reasoning_are_shares_of_whole_benchmarks() -> None:
    """3940 is the size of MathVerse's testmini and 3040 that of MathVision, though the table has
    them the other way round: its headings seem to be exchanged. 1740 is the size of WeMath's
    testmini, whose figure is thus plain accuracy."""
    for figures in TABLE_7.values():
        assert all(map(share_of, figures[:-1], SIZES))
    assert not all(share_of(figures[1], 3040) for figures in TABLE_7.values())
    assert not all(share_of(figures[2], 3940) for figures in TABLE_7.values())


def test_the_average_needs_all_benchmarks() -> None:
    with pytest.raises(ConfigError, match="all of 11 benchmarks, and mmmu is missing"):
        general_average({"mme": 2000})
