"""The offline interface, as vLLM's: a script that generates or chats with that runs here when its import line changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from nbengine.checks import checks_keywords
from nbengine.engine import Engine, as_list, spread
from nbengine.metrics import Metric, metrics_of
from nbengine.prompts import Prompt, chat_prompt
from nbengine.sampling_params import RequestOutputKind, SamplingParams
from nbengine.vllm_names import OF_LLM, advice
from nbengine.waiting import wait_all

if TYPE_CHECKING:
    from nbengine.outputs import RequestOutput

Message = Mapping[str, Any]


class LLM:
    """A model to run batches of prompts through.

    >>> llm = LLM("tales")                                                           # doctest: +SKIP
    >>> llm.generate("Once upon a time", SamplingParams(max_tokens=40))[0].outputs[0].text   # doctest: +SKIP
    """

    def __init__(self, model: str, **config: Any) -> None:
        """Load a model; `config` takes the names of EngineConfig, which are vLLM's."""
        self.engine = Engine(model, **config)

    @checks_keywords(lora_request=None, tokenization_kwargs=None)
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Run all prompts together; the outputs come in their order. An interrupt cancels them all.

        `use_tqdm` shows a progress bar, or one made by what is given in place of tqdm.
        """
        return self._run(as_list(prompts), sampling_params, use_tqdm=use_tqdm, priority=priority)

    @checks_keywords(lora_request=None, mm_processor_kwargs=None, chat_template_content_format="auto", tokenization_kwargs=None)
    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several together, written by the model's own chat template."""
        conversations = _conversations(messages)
        if chat_template_kwargs is not None and not isinstance(chat_template_kwargs, Mapping):
            raise TypeError(f"chat_template_kwargs must be a dict of what the template reads, not {chat_template_kwargs!r}")
        tokenizer = self.engine.get_tokenizer()
        options = {
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "continue_final_message": continue_final_message,
            "tools": tools,
            "chat_template": chat_template if chat_template is not None else self.engine.config.chat_template,
            **(chat_template_kwargs or {}),
        }
        prompts: list[Prompt] = [chat_prompt(tokenizer, conversation, **options) for conversation in conversations]
        return self._run(prompts, sampling_params, use_tqdm=use_tqdm)

    def _run(
        self,
        prompts: list[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        use_tqdm: bool | Callable[..., Any],
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        if params is None:
            params = self.get_default_sampling_params()
        final = []
        for given in spread("params", params, len(prompts), SamplingParams):
            one = given.clone()
            one.output_kind = RequestOutputKind.FINAL_ONLY  # nobody looks before the end
            final.append(one)
        requests = self.engine.submit_all(prompts, final, priority=priority)
        return wait_all(requests, show=use_tqdm)

    def get_tokenizer(self) -> Any:
        """The model's tokenizer as a transformers object, as vLLM gives it."""
        return self.engine.get_tokenizer().hf

    def get_default_sampling_params(self) -> SamplingParams:
        """What prompts without params get: the model's own generation config."""
        return self.engine.default_params()

    def get_metrics(self) -> list[Metric]:
        """The engine's counters, as vLLM gives them: each has a name and a value. `engine.stats()` has more."""
        return metrics_of(self.engine.stats(), self.engine.config.model)

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix."""
        self.engine.reset_prefix_cache()
        return True

    def sleep(self, level: int = 1) -> None:
        """Give the KV cache back (level 1), the weights too (level 2)."""
        self.engine.sleep(level)

    def wake_up(self) -> None:
        """Undo `sleep()`."""
        self.engine.wake_up()

    def close(self) -> None:
        """End the engine and give all memory back."""
        self.engine.close()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(f"'LLM' object has no attribute {name!r}{advice(name, OF_LLM)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LLM({self.engine!r})"


def _conversations(messages: Any) -> list[Sequence[Message]]:
    """One conversation or several, as a list of conversations."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise TypeError("messages must be a list of {'role': ..., 'content': ...} dicts, or a list of such lists")
    return [messages] if isinstance(messages[0], Mapping) else list(messages)
