"""The demo's report: one HTML file that needs no other, with every picture in it."""

from dataclasses import dataclass
from pathlib import Path

import jinja2

from flashvl.batch.job import Summary
from flashvl.data.images import decode_image, make_thumbnail
from flashvl.demo.results import DeadLetter, Result

THUMBNAIL_SIDE = 320
"""Twice what a card shows, for screens of twice the density."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One picture of the report."""

    result: Result
    picture: str
    """A data URI."""
    width: int
    height: int
    """Of the picture before it was shrunk, upright."""


def write_report(
    path: Path, summary: Summary, results: list[Result], dead_letters: list[DeadLetter]
) -> None:
    """Write the report to `path`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flashvl.demo", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    html = environment.get_template("report.html.jinja").render(
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
