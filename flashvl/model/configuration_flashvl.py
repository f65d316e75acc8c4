"""Configuration of a Flash-VL model: a vision tower, an adapter and a language model."""

from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

from .tiling import Tiling


class FlashVLConfig(PreTrainedConfig):
    """What `config.json` of a Flash-VL folder holds.

    The towers and the LLM are the library's own classes, so their sections are the library's own
    configurations (`SiglipVisionConfig` or `Aimv2VisionConfig`, `Qwen2Config` or `LlamaConfig`).

    What the code of the published checkpoints does not show is a switch whose default is the
    likeliest: `pixel_shuffle_order`, `vision_feature_layer`, and those of `Tiling`.
    """

    model_type = "flashvl"
    # This file travels with a checkpoint, to transformers as old as 5.16 (vLLM's own). It does not
    # know `SubConfigSpec`, by which a newer one builds sections itself.
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: Any = None
    """The tower's own configuration; given as a dict it becomes one, of SigLIP if it names none."""
    text_config: Any = None
    """The language model's own configuration; given as a dict it becomes one, of Qwen2 if it names
    none."""
    image_token_id: int = 151655
    """Placeholder that a visual token replaces: Qwen2.5's `<|image_pad|>`."""
    tiling: dict[str, Any] | None = None
    """`mode` and what else of `Tiling` differs from its defaults; the sizes of tile and patch are
    the tower's. None: static."""
    vision_feature_layer: int | None = None
    """The tower's hidden state that the adapter reads, by its index (-1 the last, -2 the one before
    it, neither normalised). None: the tower's output, behind its last norm."""
    downsample_ratio: float = 0.5
    """Pixel shuffle: each side of the patch grid shrinks by this, channels grow by its square; 1
    leaves the patches as they are (ISS)."""
    pixel_shuffle_order: Literal["row_major", "column_major"] = "row_major"
    """Of the tokens behind the pixel shuffle: InternVL's version 2, or its version 1."""
    projector_num_layers: int = 3
    """Linear layers of the adapter: 3 are the paper's, 2 the conventional one of its Table 8."""
    projector_hidden_size: int = 7168
    """Width of the adapter's hidden layers."""
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        self.vision_config = _build_section(self.vision_config, "siglip_vision_model")
        self.text_config = _build_section(self.text_config, "qwen2")
        super().__post_init__(**kwargs)

    @classmethod
    def default_config_fields(cls) -> dict[str, Any]:
        """What is left out when a configuration is saved; transformers asks since 5.23.

        Naming the sections makes it leave out what says nothing inside them, too.
        """
        return super().default_config_fields() | {"vision_config": {}, "text_config": {}}

    @property
    def tiling_rule(self) -> Tiling:
        """How images are cut, with the tower's sizes.

        Raises:
            ValueError, TypeError: `tiling` does not fit the tower, or holds an unknown key.
        """
        return Tiling(
            tile_size=self.vision_config.image_size,
            patch_size=self.vision_config.patch_size,
            **(self.tiling or {}),
        )

    @property
    def image_seq_length(self) -> int:
        """Visual tokens that one tile puts in front of the LLM (256 in the static preset)."""
        return int(self.tiling_rule.kept_patches * self.downsample_ratio) ** 2

    @property
    def projector_input_size(self) -> int:
        """Channels of a visual token behind the pixel shuffle (4608 for SigLIP2-so400m)."""
        return int(self.vision_config.hidden_size / self.downsample_ratio**2)


def _build_section(section: dict[str, Any] | PreTrainedConfig | None, model_type: str) -> Any:
    """A section as `config.json` has it -> its configuration; built ones are kept as they are."""
    if isinstance(section, PreTrainedConfig):
        return section
    return AutoConfig.for_model(**{"model_type": model_type} | (section or {}))


FlashVLConfig.register_for_auto_class()
