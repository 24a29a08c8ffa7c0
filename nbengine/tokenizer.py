"""Text to token ids and back, straight from a model folder's tokenizer.json: no import of transformers unless it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbengine.checks import read_json
from nbengine.errors import CheckpointError, ModelNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import tokenizers

    from nbengine.chat_template import ChatTemplate
    from nbengine.pieces import Pieces

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OTHER_FORMATS = ("*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken", "tokenization_*.py")  # transformers reads these

LONG = 10_000  # characters or tokens: with so much to do, the interpreter's lock is left to others meanwhile, as batches do


class Tokenizer:
    """A model's tokenizer and chat template.

    What tokenizer.json says is obeyed to the letter: it is what the model was trained with. Other formats (a bare
    tokenizer.model, code on the hub) go through transformers; `backend` is then whatever fast tokenizer it made, or None.

    >>> tokenizer = Tokenizer.from_folder("tales")          # doctest: +SKIP
    >>> tokenizer.decode(tokenizer.encode("Once upon a time"))  # doctest: +SKIP
    'Once upon a time'
    """

    def __init__(self, folder: Path, backend: tokenizers.Tokenizer | None, config: Mapping[str, Any], hf: Any = None) -> None:
        self.folder = folder
        self.backend = backend
        self.special_tokens = _named_tokens(config) if hf is None else dict(hf.special_tokens_map)
        self._config = config
        self._hf = hf
        self._chat: ChatTemplate | None = None
        self._pieces: dict[bool, Pieces | None] = {}
        if backend is not None:
            added = backend.get_added_tokens_decoder()
            self.special_ids = frozenset(number for number, token in added.items() if token.special)
        else:
            self.special_ids = frozenset(hf.all_special_ids)

    @classmethod
    def from_folder(cls, path: str | Path, *, trust_remote_code: bool = False) -> Tokenizer:
        """The tokenizer of a model folder; code that came with the model runs only with trust_remote_code=True."""
        folder = Path(path)
        config = read_json(folder / "tokenizer_config.json")
        if (file := folder / "tokenizer.json").is_file():
            if "added_tokens_decoder" not in config:  # an older layout keeps the names in a file of their own
                config = {**config, **read_json(folder / "special_tokens_map.json")}
            return cls(folder, _read_backend(file, config), config)
        if not any(any(folder.glob(pattern)) for pattern in OTHER_FORMATS):
            raise ModelNotFoundError(
                f"{folder} holds no tokenizer (no tokenizer.json, no tokenizer.model): pass tokenizer='a folder or hub id that has one', "
                "or skip_tokenizer_init=True and prompts as token ids"
            )
        hf = _transformers_tokenizer(folder, trust_remote_code=trust_remote_code)
        return cls(folder, getattr(hf, "backend_tokenizer", None), config, hf)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if not isinstance(text, str):
            raise TypeError(f"a text prompt must be a string, not {type(text).__name__}; pass token ids as prompt_token_ids")
        if self.backend is None:
            return self._hf.encode(text, add_special_tokens=add_special_tokens)
        if len(text) > LONG:
            return self.encode_batch([text], add_special_tokens)[0]
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        if self.backend is None:
            return [self.encode(text, add_special_tokens) for text in texts]
        return [found.ids for found in self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        if self.backend is None:
            return self._hf.decode(list(ids), skip_special_tokens=skip_special_tokens)
        ids = ids if isinstance(ids, list) else list(ids)
        if len(ids) > LONG:
            return self.backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token as text, special ones by name: what stands beside a log-probability."""
        return self.decode([token_id], skip_special_tokens=False)

    def pieces(self, skip_special_tokens: bool) -> Pieces | None:
        """What each id adds to a text, remembered; None when this tokenizer's decoder cannot be taken apart."""
        if skip_special_tokens not in self._pieces:
            from nbengine.pieces import Pieces

            self._pieces[skip_special_tokens] = Pieces.of(self, skip_special_tokens=skip_special_tokens)
        return self._pieces[skip_special_tokens]

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        tools: Sequence[Any] | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt text of a conversation; encode it with add_special_tokens=False, since templates write their own."""
        return self._templates.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template=chat_template,
            **kwargs,
        )

    def unread_fields(self, message: Mapping[str, Any], chat_template: str | None = None) -> list[str]:
        """What a message holds and the template never looks at."""
        return self._templates.unread_fields(message, chat_template)

    @property
    def chat_template(self) -> str | None:
        return self._templates.templates.get("default")

    @property
    def _templates(self) -> ChatTemplate:
        if self._chat is None:
            from nbengine.chat_template import ChatTemplate, read_templates

            self._chat = ChatTemplate(read_templates(self.folder, self._config), self.special_tokens)
        return self._chat

    @property
    def bos_token_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._named_id("eos_token")

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        if token is None:
            return None
        return self._hf.convert_tokens_to_ids(token) if self.backend is None else self.backend.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, the added ones included."""
        return len(self._hf) if self.backend is None else self.backend.get_vocab_size(with_added_tokens=True)

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def hf(self) -> Any:
        """The same tokenizer as a transformers object, made when first asked for (that import takes seconds)."""
        if self._hf is None:
            from transformers import PreTrainedTokenizerFast

            self._hf = PreTrainedTokenizerFast.from_pretrained(self.folder)
        return self._hf


def _read_backend(file: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{file} cannot be read ({error}); it may be cut short or damaged: download or save it again") from error
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    # tokens that tokenizer_config.json adds to those of tokenizer.json
    listed = [
        tokenizers.AddedToken(**token) for _, token in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    ]
    known = {token.content for token in backend.get_added_tokens_decoder().values()} | {token.content for token in listed}
    wanted = dict.fromkeys([*_named_tokens(config).values(), *_extra_tokens(config)])
    listed += [tokenizers.AddedToken(text, special=True, normalized=False) for text in wanted if text not in known]
    if listed:
        backend.add_tokens(listed)
    return backend


def _transformers_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises nearly anything here, ImportError for sentencepiece among them
        raise ModelNotFoundError(
            f"{folder} has no tokenizer.json, and transformers cannot load its tokenizer: {error}. Install what it names, pass "
            "trust_remote_code=True if it is the model's own code that you trust, or tokenizer='a folder or hub id that has one'"
        ) from error


def _content(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and whatever else the configuration names, as templates see them."""
    extra = config.get("extra_special_tokens")
    named = {**config, **extra} if isinstance(extra, dict) else config
    order = [*NAMED, *(key for key in named if key.endswith("_token") and key not in NAMED)]
    return {key: text for key in order if (text := _content(named.get(key)))}


def _extra_tokens(config: Mapping[str, Any]) -> list[str]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return [] if isinstance(extra, dict) else [text for token in extra if (text := _content(token))]
