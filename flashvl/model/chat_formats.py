"""Chat templates and control tokens, by the family of the LLM."""

from dataclasses import dataclass

from flashvl.model.processing_flashvl import CHAT_TEMPLATE

# CHAT_TEMPLATE with Llama 3's header tokens.
LLAMA_CHAT_TEMPLATE = (
    "{{- '<|begin_of_text|>' -}}"
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant.<|eot_id|>' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' -}}"
    "{%- if message['role'] == 'assistant' -%}{%- generation -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|eot_id|>' -}}"
    "{%- endgeneration -%}"
    "{%- else -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<|reserved_special_token_0|>\n' -}}"
    "{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|eot_id|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}"
    "{%- endif -%}"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormat:
    """Chat template and control tokens of a family of LLMs; its tokenizers have all of them."""

    image_token: str
    """Placeholder that a visual token replaces."""
    end_token: str
    """Token at the end of every message."""
    pad_token: str
    """Padding token of a tokenizer that names none."""
    template: str
    """Chat template, in Jinja."""


CHAT_FORMATS = {
    "qwen2": ChatFormat(
        image_token="<|image_pad|>",
        end_token="<|im_end|>",
        pad_token="<|endoftext|>",
        template=CHAT_TEMPLATE,
    ),
    "llama": ChatFormat(
        image_token="<|reserved_special_token_0|>",
        end_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        template=LLAMA_CHAT_TEMPLATE,
    ),
}
"""Chat formats by the LLM's `model_type`: Qwen2 and 2.5, Llama 3.1 and 3.2."""
