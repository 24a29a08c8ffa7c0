"""From a cell's text to prompts for the engine: variables filled, one for each item, written with the chat template or not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError

from nbengine.errors import nearest
from nbengine.notebook.fill import fill, names
from nbengine.prompts import chat_prompt

if TYPE_CHECKING:
    from nbengine.engine import Engine
    from nbengine.prompts import Prompt

Message = dict[str, Any]
ITEM = "item"  # what `--each` calls each item, beside the list's own name


def for_each(text: str, name: str, variables: Mapping[str, Any], *, raw: bool) -> list[str]:
    """One text for each item of the list, or row of the DataFrame, that this variable holds."""
    if name not in variables:
        raise UsageError(f"--each {name}: there is no variable {name!r}{nearest(name, variables)}")
    items = _items(name, variables[name])
    if not text.strip():
        return [str(item[ITEM]) for item in items]
    if raw:
        raise UsageError(f"--each {name} fills in each item, and --raw fills nothing: leave one of them out")
    if not set(names(text)) & items[0].keys():
        known = ", ".join(f"{{{key}}}" for key in items[0] if key.isidentifier())
        raise UsageError(f"--each {name}: the cell names none of {known}, so all {len(items)} prompts would be the same")
    return [fill(text, {**variables, **item}) for item in items]


def _items(name: str, value: Any) -> list[dict[str, Any]]:
    """What each item gives to fill in: a row's columns, a dict's keys, and the item itself."""
    if hasattr(value, "iterrows") and hasattr(value, "columns"):  # a DataFrame, without importing pandas
        rows = [dict(zip(map(str, value.columns), row, strict=True)) for row in value.itertuples(index=False, name=None)]
        items = [{name: row, ITEM: row, **row} for row in rows]
    elif isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise UsageError(f"--each {name}: {name} must be a list or a DataFrame, not {type(value).__name__}")
    else:
        items = [{name: item, ITEM: item, **(dict(item) if isinstance(item, Mapping) else {})} for item in value]
    if not items:
        raise UsageError(f"--each {name}: {name} is empty")
    return items


# ── chat ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def wants_chat(engine: Engine, *, asked: bool | None, system: str | None) -> bool:
    """Whether to write prompts with the chat template: as asked, or where the model has one and is tuned for it."""
    if asked is False and system is not None:
        raise UsageError("--system needs the chat template, and --no-chat leaves it out: give one of the two")
    if asked or system is not None:
        if not has_template(engine):
            raise UsageError(f"{engine.config.model} has no chat template: leave out {'--chat' if asked else '--system'}")
        return True
    return asked is None and has_template(engine) and tuned_for_chat(engine)


def has_template(engine: Engine) -> bool:
    return not engine.config.skip_tokenizer_init and bool(engine.config.chat_template or engine.get_tokenizer().chat_template)


def tuned_for_chat(engine: Engine) -> bool:
    """Whether the model ends its output where its template ends an answer; base models often bring a template that they never saw."""
    tokenizer = engine.get_tokenizer()
    turn: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text = tokenizer.apply_chat_template(turn, chat_template=engine.config.chat_template)
    except Exception:  # noqa: BLE001 - a template may refuse anything; then it says nothing about the model
        return False
    after = tokenizer.encode(text[text.rfind("b") + 1 :], add_special_tokens=False)
    return any(token in engine.info.eos_token_ids for token in after)


def answer_to(engine: Engine, messages: Sequence[Message]) -> Prompt:
    """A conversation as the model wants to read it, up to where its answer begins."""
    return chat_prompt(engine.get_tokenizer(), list(messages), add_generation_prompt=True, chat_template=engine.config.chat_template)


def with_system(text: str, system: str | None) -> list[Message]:
    first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": text}]
