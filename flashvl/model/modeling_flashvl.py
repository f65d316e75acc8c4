"""Flash-VL: vision tower -> pixel shuffle -> adapter -> language model (paper, section 3.1).

Tower and LLM are transformers' own classes; only the adapter and the wiring are here. Module names
are the library's (`model.vision_tower`, `model.multi_modal_projector`, `model.language_model`), so
PEFT, TRL, `pipeline("image-text-to-text")` and vLLM's Transformers backend find what they expect.

Dimensions in comments: N images, S patches a side, C tower channels, L text length, D LLM width.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)

from .configuration_flashvl import FlashVLConfig


def pixel_shuffle(features_NSSC: torch.Tensor, downsample_ratio: float) -> torch.Tensor:
    """Fold every `1/ratio x 1/ratio` block of patches into the channels of one token.

    Args:
        features_NSSC: patch grid, row-major: (images, rows, columns, channels).

    Returns:
        (images, rows * ratio * columns * ratio, channels / ratio^2), row-major; the channels of a
        token are its block's patches in row-major order, as in InternVL's version 2.
    """
    factor = round(1 / downsample_ratio)
    images, rows, columns, channels = features_NSSC.shape
    blocks = features_NSSC.reshape(
        images, rows // factor, factor, columns // factor, factor, channels
    )
    blocks = blocks.permute(0, 1, 3, 2, 4, 5)
    return blocks.reshape(images, -1, factor * factor * channels)


class FlashVLMultiModalProjector(nn.Module):
    """The adapter, paper equations (2)-(5): LayerNorm, Linear, GELU, Linear, GELU, Linear.

    4608 -> 7168 -> 7168 -> 1536 in the static preset: 95,445,504 parameters.
    """

    def __init__(self, config: FlashVLConfig):
        super().__init__()
        hidden_size = config.projector_hidden_size
        self.layer_norm = nn.LayerNorm(config.projector_input_size)
        self.linear_1 = nn.Linear(config.projector_input_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)
        self.linear_3 = nn.Linear(hidden_size, config.text_config.hidden_size)
        self.act = nn.GELU()

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        hidden = self.act(self.linear_1(self.layer_norm(image_features)))
        hidden = self.act(self.linear_2(hidden))
        return self.linear_3(hidden)


@dataclass
class FlashVLModelOutputWithPast(BaseModelOutputWithPast):
    """`image_hidden_states`: (images, tokens, D), the adapter's output; None without images."""

    image_hidden_states: torch.Tensor | None = None


@dataclass
class FlashVLCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`image_hidden_states`: (images, tokens, D), the adapter's output; None without images."""

    image_hidden_states: torch.Tensor | None = None


class FlashVLPreTrainedModel(PreTrainedModel):
    config_class = FlashVLConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class FlashVLModel(FlashVLPreTrainedModel):
    """Flash-VL without its language modelling head."""

    def __init__(self, config: FlashVLConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = FlashVLMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Encode images for the LLM.

        Args:
            pixel_values: (images, 3, height, width), normalised.

        Returns:
            `pooler_output`: (images, image_seq_length, D), the projected visual tokens;
            `last_hidden_state`: (images, patches, C), the tower's own features.
        """
        kwargs.pop("return_dict", None)
        outputs = self.vision_tower(
            pixel_values=pixel_values.to(self.dtype), return_dict=True, **kwargs
        )
        patches_NPC = outputs.last_hidden_state
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        grid_NSSC = patches_NPC.unflatten(1, (side, side))
        tokens = pixel_shuffle(grid_NSSC, self.config.downsample_ratio)
        outputs.pooler_output = self.multi_modal_projector(tokens)
        return outputs

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        image_features: torch.Tensor,
    ) -> torch.BoolTensor:
        """(batch, L, 1): True where a visual token goes.

        Raises:
            ValueError: the placeholders and the visual tokens differ in number.
        """
        if input_ids is None:
            image_id = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            placeholder = (inputs_embeds == self.get_input_embeddings()(image_id)).all(-1)
        else:
            placeholder = input_ids == self.config.image_token_id
        num_features = image_features.shape[0] * image_features.shape[1]
        num_tokens = num_features if torch.compiler.is_compiling() else int(placeholder.sum())
        if num_tokens != num_features:
            raise ValueError(
                f"Image features and image tokens do not match: {num_tokens} placeholder tokens,"
                f" {num_features} visual tokens; let FlashVLProcessor expand the prompt"
            )
        return placeholder.unsqueeze(-1)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> FlashVLModelOutputWithPast:
        """Args as in every transformers image-text model; `pixel_values`: (images, 3, H, W)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_outputs = (mm_encoder_outputs or {}).get("image")
        if image_outputs is None and pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values)
        image_features = None
        if image_outputs is not None:
            image_features = image_outputs.pooler_output.to(inputs_embeds)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)

        kwargs.pop("return_dict", None)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        return FlashVLModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )


class FlashVLForConditionalGeneration(FlashVLPreTrainedModel, GenerationMixin):
    """Flash-VL with its head: answers about images, `AutoModelForImageTextToText`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: FlashVLConfig):
        super().__init__(config)
        # Saving adds this class; vLLM's Transformers backend asks for the base model too.
        config.auto_map = {"AutoModel": "modeling_flashvl.FlashVLModel"}
        self.model = FlashVLModel(config)
        text_config = config.text_config
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """As `FlashVLModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> FlashVLCausalLMOutputWithPast:
        """Args as in every transformers image-text model.

        `labels`: (batch, L), -100 where no loss is taken; the shift by one happens inside.
        `logits_to_keep`: logits of the last so many positions only (0: all).
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, keep, :])
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return FlashVLCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


FlashVLModel.register_for_auto_class("AutoModel")
FlashVLForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
