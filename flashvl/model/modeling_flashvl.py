"""Flash-VL: vision tower -> pixel shuffle -> adapter -> language model (paper, section 3.1).

Tower and LLM are classes of transformers; only the adapter and the connections are defined here.
Modules are called as in transformers (`model.vision_tower`, `model.multi_modal_projector`,
`model.language_model`), so that PEFT, TRL, `pipeline("image-text-to-text")` and vLLM's Transformers
backend work.

Dimensions: N tiles of all images, S patches a side, C tower channels, L text length, D LLM width.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoModel,
    Cache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    SuppressTokensLogitsProcessor,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)

from .configuration_flashvl import FlashVLConfig
from .saving import share_mode


def pixel_shuffle(
    features_NSSC: torch.Tensor, downsample_ratio: float, order: str = "row_major"
) -> torch.Tensor:
    """Fold every `1/ratio x 1/ratio` block of patches into the channels of one token.

    Args:
        features_NSSC: patch grid, row-major: (tiles, rows, columns, channels).
        order: order of the tokens, `row_major` or `column_major` (InternVL's version 2 or 1).

    Returns:
        (tiles, rows * ratio * columns * ratio, channels / ratio^2); the channels of a token are
        those of its block's patches in row-major order.
    """
    factor = round(1 / downsample_ratio)
    tiles, rows, columns, channels = features_NSSC.shape
    blocks = features_NSSC.reshape(
        tiles, rows // factor, factor, columns // factor, factor, channels
    )
    axes = (1, 3) if order == "row_major" else (3, 1)
    blocks = blocks.permute(0, *axes, 2, 4, 5)
    return blocks.reshape(tiles, -1, factor * factor * channels)


class FlashVLMultiModalProjector(nn.Sequential):
    """The adapter, paper equations (2)-(5): LayerNorm, Linear, GELU, Linear, GELU, Linear.

    In the static preset the widths are 4608 -> 7168 -> 7168 -> 1536, with 95,445,504 parameters.
    With `projector_num_layers` 2 it is the conventional adapter of the paper's Table 8.
    """

    def __init__(self, config: FlashVLConfig):
        hidden = [config.projector_hidden_size] * (config.projector_num_layers - 1)
        sizes = [config.projector_input_size, *hidden, config.text_config.hidden_size]
        layers = OrderedDict[str, nn.Module](layer_norm=nn.LayerNorm(sizes[0]))
        for number in range(1, len(sizes)):
            if number > 1:
                layers[f"act_{number - 1}"] = nn.GELU()
            layers[f"linear_{number}"] = nn.Linear(*sizes[number - 1 : number + 1])
        super().__init__(layers)


@dataclass
class FlashVLModelOutputWithPast(BaseModelOutputWithPast):
    """Outputs of the model without its head."""

    image_hidden_states: torch.Tensor | None = None
    """(tiles, tokens, D), the adapter's output; None without images."""


@dataclass
class FlashVLCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Outputs of the model with its head."""

    image_hidden_states: torch.Tensor | None = None
    """(tiles, tokens, D), the adapter's output; None without images."""


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

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args, **kwargs) -> None:
        """Save like the base class, with the file permissions that the umask says."""
        super().save_pretrained(save_directory, *args, **kwargs)
        share_mode(save_directory, "config.json")


class FlashVLModel(FlashVLPreTrainedModel):
    """Flash-VL without its language modelling head; `AutoModel` loads it."""

    always_encodes = False
    """Whether tower and adapter run for every batch without images, not for those that are trained
    alone. The ranks of ZeRO 3 wait for each other in every module, in evaluation as well."""

    def __init__(self, config: FlashVLConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        # Else the sums of all its layers would have the memory layout of the convolution's output,
        # channels first, which took a fifth of the tower's time on a GPU.
        self.vision_tower.embeddings.register_forward_hook(_make_contiguous)
        self.multi_modal_projector = FlashVLMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def encode_tiles(
        self, pixel_values: torch.Tensor, **kwargs
    ) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        """Encode tiles, (tiles, 3, height, width), up to the adapter.

        Returns:
            The tower's outputs; and the adapter's input, (tiles, image_seq_length, channels).
        """
        kwargs.pop("return_dict", None)
        config = self.config
        layer = config.vision_feature_layer
        outputs = self.vision_tower(
            pixel_values=pixel_values.to(self.dtype),
            return_dict=True,
            **(kwargs if layer is None else kwargs | {"output_hidden_states": True}),
        )
        patches_NPC = outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]
        rule = config.tiling_rule
        side = rule.tile_size // rule.patch_size
        kept = slice(rule.dropped_patches, side - rule.dropped_patches)
        grid_NSSC = patches_NPC.unflatten(1, (side, side))[:, kept, kept]
        order = config.pixel_shuffle_order
        return outputs, pixel_shuffle(grid_NSSC, config.downsample_ratio, order)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.LongTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode images for the LLM.

        Args:
            pixel_values: (tiles of all images, 3, height, width), normalised.
            image_grid_thw: (images, 3); the product of a row is the number of that image's tiles.

        Returns:
            `pooler_output`: the projected visual tokens, (tiles, image_seq_length, D), or with
            `image_grid_thw` a tuple of a (tokens, D) for each image; `last_hidden_state`: (tiles,
            patches, C), the tower's output.
        """
        outputs, tokens = self.encode_tiles(pixel_values, **kwargs)
        features = self.multi_modal_projector(tokens)
        if image_grid_thw is not None:
            num_tiles = image_grid_thw.prod(-1).tolist()
            features = tuple(part.flatten(0, 1) for part in features.split(num_tiles))
        outputs.pooler_output = features
        return outputs

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        image_features: torch.Tensor,
    ) -> torch.BoolTensor:
        """(batch, L, 1): True at the placeholders that `image_features`, (tokens, D), replace.

        Raises:
            ValueError: the numbers of placeholders and of visual tokens differ.
        """
        if input_ids is None:
            image_id = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            placeholder = (inputs_embeds == self.get_input_embeddings()(image_id)).all(-1)
        else:
            placeholder = input_ids == self.config.image_token_id
        num_features = image_features.shape[0]
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
        image_grid_thw: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> FlashVLModelOutputWithPast:
        """Hidden states of a batch; the arguments are those of transformers' image-text models.

        Args:
            pixel_values: (tiles of all images, 3, H, W), in the order of the placeholders.
            image_grid_thw: ignored, as the order of the tiles is enough.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_outputs = (mm_encoder_outputs or {}).get("image")
        if image_outputs is None and pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values)
        image_features = None
        if image_outputs is not None:
            image_features = image_outputs.pooler_output
            tokens_TD = _flatten_features(image_features).to(inputs_embeds)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, tokens_TD)
            inputs_embeds = inputs_embeds.masked_scatter(mask, tokens_TD)
        elif self.always_encodes or (self.training and torch.is_grad_enabled()):
            inputs_embeds = inputs_embeds + self._no_image().to(inputs_embeds)

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

    def _no_image(self) -> torch.Tensor:
        """Zero, computed by tower and adapter, for a batch without images.

        Adding it gives their parameters a gradient of zero. Otherwise the ranks of ZeRO, some with
        images and some without, would disagree on what to reduce, and hang or mix up gradients.
        """
        side = self.config.vision_config.image_size
        pixel_values = torch.zeros((1, 3, side, side), device=self.device)
        return 0.0 * self.get_image_features(pixel_values).pooler_output.sum()


def _make_contiguous(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.contiguous()


def _flatten_features(features: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """The `pooler_output` of `get_image_features`, of either form -> (tokens of all images, D)."""
    if isinstance(features, torch.Tensor):
        return features.flatten(0, -2)
    return torch.cat([part.flatten(0, -2) for part in features])


class ImageTokenSuppressor(SuppressTokensLogitsProcessor):
    """Prevents `generate` from choosing the image's placeholder.

    It is a class of its own because a caller's processor replaces the library's of the same class.
    """

    supports_continuous_batching = True


class FlashVLForConditionalGeneration(FlashVLPreTrainedModel, GenerationMixin):
    """Flash-VL with its language modelling head; `AutoModelForImageTextToText` loads it."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: FlashVLConfig):
        super().__init__(config)
        # Saving adds this class to the map; vLLM's Transformers backend needs the base model too.
        config.auto_map = {"AutoModel": "modeling_flashvl.FlashVLModel"}
        self.model = FlashVLModel(config)
        text_config = config.text_config
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def _get_logits_processor(
        self,
        generation_config: GenerationConfig,
        *args,
        logits_processor: LogitsProcessorList | None = None,
        device: str | torch.device | None = None,
        **kwargs,
    ) -> LogitsProcessorList:
        """The processors of the base class and `ImageTokenSuppressor`.

        Every way to generate calls this method. Suppressing the token in `self.generation_config`
        would fail where a caller passes another one.
        """
        suppressor = ImageTokenSuppressor([self.config.image_token_id], device=device)
        return super()._get_logits_processor(
            generation_config,
            *args,
            logits_processor=LogitsProcessorList([*(logits_processor or []), suppressor]),
            device=device,
            **kwargs,
        )

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.LongTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode images for the LLM, as `FlashVLModel.get_image_features` does."""
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> FlashVLCausalLMOutputWithPast:
        """Logits and loss of a batch; the arguments are those of transformers' image-text models.

        Args:
            labels: (batch, L), -100 where no loss is taken; they are shifted by one here.
            logits_to_keep: number of last positions whose logits are computed (0: all), or a tensor
                of positions.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
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
