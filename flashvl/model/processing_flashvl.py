"""Processor of Flash-VL: messages and images -> `input_ids`, `attention_mask`, `pixel_values`."""

import os

from transformers import ProcessorMixin
from transformers.processing_utils import MultiModalData

from .saving import share_mode

# The template of Qwen2.5 and the published checkpoints; it adds a system message if there is none.
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
    """Replaces the one `<|image_pad|>` of each image in the text by that image's placeholders.

    An image has `image_seq_length` placeholders for each of its tiles, with nothing in between, as
    vLLM requires, unless `tile_wrappers` is set. The base class expands the text: it calls
    `replace_image_token` for each image, so that it can report the offsets of the replacements to
    vLLM's Transformers backend.

    Batches are padded on the left, so that every prompt ends where its answer begins. This is set
    in `tokenizer`, because its own setting precedes a processor's, and `pipeline` reads only that.
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
            image_token: the placeholder, a token of the tokenizer.
            tile_wrappers: two texts, put before and after each tile's placeholders, or None. The
                code of the published dynamic models names `[PLACEHOLDER_0]` and
                `[PLACEHOLDER_1]`, but whether it uses them is not known.
        """
        super().__init__(
            image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs
        )
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.tile_wrappers = tile_wrappers
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        tokenizer.padding_side = "left"
        tokenizer.init_kwargs["padding_side"] = "left"  # the value that is saved

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs) -> list[str]:
        """Save like the base class, with the file permissions that the umask says."""
        saved = super().save_pretrained(save_directory, **kwargs)
        share_mode(save_directory, "processor_config.json")
        return saved

    @property
    def unused_input_names(self) -> list[str]:
        """Outputs of the image processor that the model does not take."""
        return ["num_patches"]

    def image_text(self, num_tiles: int) -> str:
        """The text that stands for an image of `num_tiles` tiles; it defines the image's tokens."""
        run = self.image_token * self.image_seq_length
        if self.tile_wrappers:
            start, end = self.tile_wrappers
            run = f"{start}{run}{end}"
        return run * num_tiles

    def num_image_tokens(self, size: tuple[int, int]) -> int:
        """Number of visual tokens of an image of `size`, (width, height) in pixels."""
        return self.image_processor.tiling_rule.num_tiles(size) * self.image_seq_length

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The `image_text` of the image with index `image_idx`."""
        return self.image_text(int(image_inputs["num_patches"][image_idx]))

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Numbers of visual tokens and tiles of images of `image_sizes`, [(height, width), ...]."""
        sizes = [(width, height) for height, width in image_sizes or []]
        rule = self.image_processor.tiling_rule
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens(size) for size in sizes],
            num_image_patches=[rule.num_tiles(size) for size in sizes],
        )


FlashVLProcessor.register_for_auto_class()
