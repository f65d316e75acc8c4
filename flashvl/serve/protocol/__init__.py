"""What goes over HTTP: OpenAI's requests and answers as far as a vision-language model has them.

A field that we do not know is refused, not ignored: who asks for it relies on it.
"""

from flashvl.serve.protocol.errors import RequestError
from flashvl.serve.protocol.parts import Closed

__all__ = ["Closed", "RequestError"]
