"""Processor of Flash-VL: messages and images -> `input_ids`, `attention_mask`, `pixel_values`."""

from transformers import ProcessorMixin
from transformers.processing_utils import MultiModalData

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
    """One `<|image_pad|>` an image in the text becomes that image's run of `image_seq_length`.

    The text is expanded by the base class, which calls `replace_image_token` for every image, and
    so can report the replacement offsets that vLLM's Transformers backend asks for.
    """

    text_kwargs = {"padding": False, "padding_side": "left"}

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_seq_length=256,
        chat_template=None,
        **kwargs,
    ):
        super().__init__(
            image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs
        )
        self.image_seq_length = image_seq_length
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The run of placeholders that stands for image `image_idx`."""
        return self.image_token * self.image_seq_length

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Visual tokens and tiles of images of `image_sizes` [(height, width), ...]."""
        num_images = len(image_sizes or [])
        return MultiModalData(
            num_image_tokens=[self.image_seq_length] * num_images,
            num_image_patches=[1] * num_images,
        )


FlashVLProcessor.register_for_auto_class()
