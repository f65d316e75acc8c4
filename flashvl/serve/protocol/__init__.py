"""What goes over HTTP: OpenAI's requests and answers as far as a vision-language model has them.

A field that the service does not know is refused and not ignored: a client that sends it relies on
it.
"""

from flashvl.serve.protocol.errors import RequestError
from flashvl.serve.protocol.parts import Answer, Closed

__all__ = ["Answer", "Closed", "RequestError"]
