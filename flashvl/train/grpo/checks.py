"""What a GRPO recipe asks of its model and of its reward functions, checked before it is run."""

from flashvl.errors import ConfigError
from flashvl.model import FlashVLConfig
from flashvl.train.recipe import GrpoRecipe
from flashvl.train.rewards.scoring import Scorer


def check_rollouts(recipe: GrpoRecipe, config: FlashVLConfig) -> None:
    """
    Raises:
        ConfigError: a prompt and its completion may be longer than the model allows, or a reward
            function cannot be imported.
    """
    longest = config.text_config.max_position_embeddings
    if recipe.max_length + recipe.max_completion_length > longest:
        raise ConfigError(
            f"max_length ({recipe.max_length}) and max_completion_length"
            f" ({recipe.max_completion_length}) exceed {longest}, the tokens that"
            f" {recipe.init_from} takes; lower one of them"
        )
    Scorer(recipe.rewards).check()
