"""A stand-in for the model vendors' APIs: fixed answers with known token counts, for the demo and for tests.

It is right enough that the vendors' own clients work against it unmodified, plain and streamed. What a call gets
beyond the usual answer it orders itself, in its `X-Script` header (`script`), so there is no state to set or reset.
"""

from sidecar.dev.mock_llm.script import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    MESSAGES,
    RESPONSES,
    Encoding,
    End,
    Script,
    ScriptError,
    Tokens,
)
from sidecar.dev.mock_llm.server import ScriptedLLM, Seen

__all__ = [
    "CHAT", "COMPLETIONS", "EMBEDDINGS", "MESSAGES", "RESPONSES",
    "Encoding", "End", "Script", "ScriptError", "ScriptedLLM", "Seen", "Tokens",
]  # fmt: skip
