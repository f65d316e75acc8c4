"""JSON as LLaVA has it: a list of objects with `id`, `conversations` and, mostly, `image`.

LLaVA-1.5-665K, ShareGPT4V, ALLaVA; MMDU, whose `image` is a list and which marks an image's place
by `<ImageHere>`; and LLaVA-OneVision's parts that come as JSON. Images are paths from a folder.
"""

from flashvl.data.convert.conversations import as_images, build_conversation
from flashvl.data.convert.family import CONVERSATIONS_TABLE, Converted, Family, Record

MMDU_MARKER = "<ImageHere>"


def convert(record: Record) -> Converted:
    """
    Raises:
        DataError: the turns cannot be used, or have other places for images than there are images.
    """
    fields = record.fields
    images = as_images(fields.get("image", fields.get("images")))
    source = fields.get("data_source", fields.get("source"))
    return build_conversation(fields.get("conversations"), images, source, marker=MMDU_MARKER)


FAMILY = Family(
    table=CONVERSATIONS_TABLE,
    kinds=("json", "parquet"),
    needed=("conversations",),
    used=("id", "image", "images", "data_source", "source"),
    convert=convert,
)
