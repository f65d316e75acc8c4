"""Every error that a user can cause and put right.

The message is one line: the rule, the value that broke it, and the remedy. Entry points print it
and exit with status 2; anything that is not a `FlashVLError` is a bug and keeps its traceback.
"""


class FlashVLError(Exception):
    """Base of the errors below."""


class ConfigError(FlashVLError):
    """A recipe, an option or a path is wrong: nothing was started."""


class DataError(FlashVLError):
    """One row cannot be used. Pipelines turn it into a dead letter and go on."""


class CheckpointError(FlashVLError):
    """A model folder is missing, incomplete or not a Flash-VL checkpoint."""


def one_line(error: BaseException | str, width: int = 200) -> str:
    """The message of another library's error on one line of printable characters.

    Args:
        width: characters after which the message is cut.
    """
    text = " ".join(str(error).split())[:width] or type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in text)
