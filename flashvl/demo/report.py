"""The demo's report: one HTML file that holds every picture and loads nothing."""

from dataclasses import dataclass
from pathlib import Path

from flashvl.batch.job import Summary
from flashvl.batch.report import THUMBNAIL_SIDE, render_page
from flashvl.data.images import decode_image, make_thumbnail
from flashvl.demo.results import DeadLetter, Result


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One picture of the report."""

    result: Result
    picture: str
    """The shrunk picture as a data URI."""
    width: int
    height: int
    """Pixels of the upright picture before it was shrunk."""


def write_report(
    path: Path, summary: Summary, results: list[Result], dead_letters: list[DeadLetter]
) -> None:
    """Write the report of a demo to `path`."""
    html = render_page(
        "flashvl.demo",
        summary=summary,
        num_right=sum(result.is_right for result in results),
        cards=[_card(result) for result in results],
        dead_letters=dead_letters,
    )
    path.write_text(html, encoding="utf-8")


def _card(result: Result) -> Card:
    image = decode_image(result.image)
    width, height = image.size
    picture = make_thumbnail(image, THUMBNAIL_SIDE)
    return Card(result=result, picture=picture, width=width, height=height)
