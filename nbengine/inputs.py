"""Where vLLM has the types of prompts."""

from nbengine.prompts import TextPrompt, TokensPrompt

__all__ = ["TextPrompt", "TokensPrompt"]
