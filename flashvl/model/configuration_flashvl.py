"""Configuration of a Flash-VL model: a vision tower, an adapter and a language model."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class FlashVLConfig(PreTrainedConfig):
    """What `config.json` of a Flash-VL folder holds.

    The towers and the LLM are the library's own classes, so their sections are the library's own
    configurations (`SiglipVisionConfig`, `Qwen2Config`).
    """

    model_type = "flashvl"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(AutoConfig, model_type="siglip_vision_model"),
        "text_config": SubConfigSpec(AutoConfig, model_type="qwen2"),
    }

    vision_config: Any = None
    """The tower's own configuration; given as a dict it becomes one."""
    text_config: Any = None
    """The language model's own configuration; given as a dict it becomes one."""
    image_token_id: int = 151655
    """Placeholder that a visual token replaces: Qwen2.5's `<|image_pad|>`."""
    downsample_ratio: float = 0.5
    """Pixel shuffle: each side of the patch grid shrinks by this, channels grow by its square."""
    projector_hidden_size: int = 7168
    """Width of the adapter's two hidden layers."""
    tie_word_embeddings: bool = True

    @property
    def image_seq_length(self) -> int:
        """Visual tokens that one tile puts in front of the LLM (256 at 512 px, patch 16)."""
        patches_per_side = self.vision_config.image_size // self.vision_config.patch_size
        return int(patches_per_side * self.downsample_ratio) ** 2

    @property
    def projector_input_size(self) -> int:
        """Channels of a visual token behind the pixel shuffle (4608 for SigLIP2-so400m)."""
        return int(self.vision_config.hidden_size / self.downsample_ratio**2)


FlashVLConfig.register_for_auto_class()
