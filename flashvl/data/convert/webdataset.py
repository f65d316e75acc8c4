"""Infinity-MM's tars, and others of the same layout: `KEY.json` and the images `KEY.jpg`.

The JSON has `conversations`, and often `source`; a row of text alone has no image.
"""

from flashvl.data.convert.conversations import build_conversation
from flashvl.data.convert.family import CONVERSATIONS_TABLE, Converted, Family, Record
from flashvl.errors import DataError


def convert(record: Record) -> Converted:
    """
    Raises:
        DataError: the row names an image that its tar does not have, or its turns cannot be used.
    """
    fields, images = record.fields, record.attached
    if fields.get("image") and not images:
        raise DataError("row names an image, and its tar has none of its key; restore it")
    return build_conversation(fields.get("conversations"), images, fields.get("source"))


FAMILY = Family(
    table=CONVERSATIONS_TABLE,
    kinds=("tar",),
    needed=("conversations",),
    used=(),
    convert=convert,
)
