"""Configuration of a Flash-VL model: a vision tower, an adapter and a language model."""

from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

from .tiling import Tiling


class FlashVLConfig(PreTrainedConfig):
    """The contents of a Flash-VL folder's `config.json`.

    Tower and LLM are classes of transformers, so their sections are configurations of transformers
    (`SiglipVisionConfig` or `Aimv2VisionConfig`, `Qwen2Config` or `LlamaConfig`).

    `pixel_shuffle_order`, `vision_feature_layer` and some fields of `Tiling` are options because
    the published code does not show what its models use; the defaults are the likeliest values.
    """

    model_type = "flashvl"
    # This file is copied into checkpoints, and must run with transformers 5.16, which vLLM uses and
    # which has no `SubConfigSpec`, by which newer versions build the sections themselves.
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: Any = None
    """Configuration of the vision tower, or a dict of it; one without `model_type` is SigLIP's."""
    text_config: Any = None
    """Configuration of the LLM, or a dict of it; one without `model_type` is Qwen2's."""
    image_token_id: int = 151655
    """Placeholder that a visual token replaces: Qwen2.5's `<|image_pad|>`."""
    tiling: dict[str, Any] | None = None
    """Fields of `Tiling` that differ from its defaults, except the sizes of tile and patch, which
    are the tower's. None: static."""
    vision_feature_layer: int | None = None
    """Index of the tower's hidden state that the adapter reads (-1 is the last, -2 the one before;
    neither is normalised). None: the tower's output, after its last norm."""
    downsample_ratio: float = 0.5
    """Factor by which pixel shuffle shrinks each side of the patch grid, while channels grow by its
    inverse square; 1 leaves the patches as they are (ISS)."""
    pixel_shuffle_order: Literal["row_major", "column_major"] = "row_major"
    """Order of the tokens after the pixel shuffle: InternVL's version 2, or its version 1."""
    projector_num_layers: int = 3
    """Linear layers of the adapter: 3 in the paper, 2 in the conventional one of its Table 8."""
    projector_hidden_size: int = 7168
    """Width of the adapter's hidden layers."""
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        self.vision_config = _build_section(self.vision_config, "siglip_vision_model")
        self.text_config = _build_section(self.text_config, "qwen2")
        super().__post_init__(**kwargs)

    @classmethod
    def default_config_fields(cls) -> dict[str, Any]:
        """Values that need not be saved; transformers calls this since 5.23.

        Naming the sections makes it leave out the default values inside them, too.
        """
        return super().default_config_fields() | {"vision_config": {}, "text_config": {}}

    @property
    def tiling_rule(self) -> Tiling:
        """The rule by which images are cut, with the tower's sizes of tile and patch.

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
        """Visual tokens that the LLM gets of each tile (256 in the static preset)."""
        return int(self.tiling_rule.kept_patches * self.downsample_ratio) ** 2

    @property
    def projector_input_size(self) -> int:
        """Channels of a visual token after the pixel shuffle (4608 for SigLIP2-so400m)."""
        return int(self.vision_config.hidden_size / self.downsample_ratio**2)


def _build_section(section: dict[str, Any] | PreTrainedConfig | None, model_type: str) -> Any:
    """A section of `config.json` -> its configuration; one that is built already is returned."""
    if isinstance(section, PreTrainedConfig):
        return section
    return AutoConfig.for_model(**{"model_type": model_type} | (section or {}))


FlashVLConfig.register_for_auto_class()
