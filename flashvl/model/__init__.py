"""The Hugging Face model; importing this package registers Flash-VL with the Auto classes."""

import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from flashvl.model.configuration_flashvl import FlashVLConfig
from flashvl.model.image_processing_flashvl import FlashVLImageProcessor
from flashvl.model.modeling_flashvl import FlashVLForConditionalGeneration, FlashVLModel
from flashvl.model.processing_flashvl import FlashVLProcessor

AutoConfig.register(FlashVLConfig.model_type, FlashVLConfig)
AutoModel.register(FlashVLConfig, FlashVLModel)
AutoModelForImageTextToText.register(FlashVLConfig, FlashVLForConditionalGeneration)
AutoImageProcessor.register(FlashVLConfig, FlashVLImageProcessor)
AutoProcessor.register(FlashVLConfig, FlashVLProcessor)
# Where TRL looks for the class when it loads the reference model of a full fine-tuning.
transformers.FlashVLForConditionalGeneration = FlashVLForConditionalGeneration  # type: ignore[attr-defined]

__all__ = [
    "FlashVLConfig",
    "FlashVLForConditionalGeneration",
    "FlashVLImageProcessor",
    "FlashVLModel",
    "FlashVLProcessor",
]
