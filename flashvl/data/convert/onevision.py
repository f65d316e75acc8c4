"""LLaVA-OneVision's Parquet: `id`, `image` (bytes or null), `conversations` and `data_source`.

A row whose image is null is text alone, as in its parts `magpie_pro`.
"""

from flashvl.data.convert.conversations import as_images, build_conversation
from flashvl.data.convert.family import CONVERSATIONS_TABLE, Converted, Family, Record


def convert(record: Record) -> Converted:
    """
    Raises:
        DataError: the turns cannot be used, or have other places for images than there are images.
    """
    fields = record.fields
    images = as_images(fields.get("image"))
    return build_conversation(fields.get("conversations"), images, fields.get("data_source"))


FAMILY = Family(
    table=CONVERSATIONS_TABLE,
    kinds=("parquet",),
    needed=("conversations",),
    used=("id", "image", "data_source"),
    convert=convert,
)
