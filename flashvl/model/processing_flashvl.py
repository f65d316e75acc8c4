"""Processor of Flash-VL: messages and images -> `input_ids`, `attention_mask`, `pixel_values`."""

import os

from transformers import ProcessorMixin
from transformers.processing_utils import MultiModalData

from .saving import share_mode

# As Qwen2.5 and the published checkpoints; a system message is put first where none is given.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}{%- generation -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>' -}}"
    "{%- endgeneration -%}"
    "{%- else -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<|image_pad|>\n' -}}"
    "{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>' -}}"
    "{%- endif -%}"
    "{{- '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


class FlashVLProcessor(ProcessorMixin):
    """One `<|image_pad|>` an image in the text becomes that image's run of placeholders.

    The run is `image_seq_length` placeholders for each of the image's tiles, without anything in
    between, as vLLM needs it, unless `tile_wrappers` is set. The text is expanded by the base
    class, which calls `replace_image_token` for every image, and so can report the replacement
    offsets that vLLM's Transformers backend asks for.

    Batches are padded on the left, where a prompt does not end, and `tokenizer` is set to it: what
    it says itself goes before what a processor says, and `pipeline` asks nobody else.
    """

    text_kwargs = {"padding": False}

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_seq_length=256,
        image_token="<|image_pad|>",
        tile_wrappers=None,
        chat_template=None,
        **kwargs,
    ):
        """
        Args:
            image_seq_length: placeholders for one tile.
            image_token: a token of the tokenizer's; Qwen2.5's own by default.
            tile_wrappers: two texts, before and after each tile's run, or None. The published
                dynamic models' code names `[PLACEHOLDER_0]` and `[PLACEHOLDER_1]`, but it is not
                known whether they are used.
        """
        super().__init__(
            image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs
        )
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.tile_wrappers = tile_wrappers
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        tokenizer.padding_side = "left"
        tokenizer.init_kwargs["padding_side"] = "left"  # what is saved of it

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs) -> list[str]:
        """As the library's; the umask says who may read it."""
        saved = super().save_pretrained(save_directory, **kwargs)
        share_mode(save_directory, "processor_config.json")
        return saved

    @property
    def unused_input_names(self) -> list[str]:
        """What the image processor returns and the model does not take."""
        return ["num_patches"]

    def image_text(self, num_tiles: int) -> str:
        """What stands in the text for an image of `num_tiles` tiles.

        Everything that counts image tokens counts these.
        """
        run = self.image_token * self.image_seq_length
        if self.tile_wrappers:
            start, end = self.tile_wrappers
            run = f"{start}{run}{end}"
        return run * num_tiles

    def num_image_tokens(self, size: tuple[int, int]) -> int:
        """Visual tokens of an image of `size`, (width, height) in pixels."""
        return self.image_processor.tiling_rule.num_tiles(size) * self.image_seq_length

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """`image_text` of image `image_idx`."""
        return self.image_text(int(image_inputs["num_patches"][image_idx]))

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Visual tokens and tiles of images of `image_sizes` [(height, width), ...]."""
        sizes = [(width, height) for height, width in image_sizes or []]
        rule = self.image_processor.tiling_rule
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens(size) for size in sizes],
            num_image_patches=[rule.num_tiles(size) for size in sizes],
        )


FlashVLProcessor.register_for_auto_class()
