"""How a generation looks: HTML and plain text, static, escaped, complete without any script."""

from __future__ import annotations

import json
from collections import Counter
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbengine.notebook.generation import Generation
    from nbengine.outputs import RequestOutput
    from nbengine.request import Request

SHOWN = 50  # outputs that a table has rows for
SHORT = 160  # characters of a prompt in a table
QUIET = "opacity:.7;font-size:85%"
CELL = "text-align:left;vertical-align:top;white-space:normal"

Bundle = dict[str, Any]


def body(generation: Generation) -> Bundle:
    """The text, as far as it has come."""
    handles = generation.handles
    if len(handles) > 1 or len(handles[0].completions) > 1:
        return _table(generation)
    plain = handles[0].text if handles[0].params.detokenize else repr(handles[0].completions[0].token_ids)
    if generation.show_tokens and generation.done and generation.logprobs:
        return {"text/plain": plain, "text/html": generation.tokens._repr_html_()}
    if generation.style == "markdown":
        return {"text/plain": plain, "text/markdown": plain}
    if generation.style == "json" and generation.done:
        return _json(plain)
    return {"text/plain": plain, "text/html": f"<div>{as_html(plain)}</div>"}


def line(generation: Generation) -> Bundle:
    """The quiet line under the text."""
    plain = line_text(generation)
    return {"text/plain": plain, "text/html": f'<div style="{QUIET}">{escape(plain)}</div>'}


def whole(generation: Generation) -> Bundle:
    """Text and line in one, for a result that is shown again."""
    text, under = body(generation), line(generation)
    bundle = {"text/plain": f"{text['text/plain']}\n\n{under['text/plain']}"}
    if "text/html" in text:
        bundle["text/html"] = text["text/html"] + under["text/html"]
    else:
        bundle["text/markdown"] = f"{text['text/markdown']}\n\n<sub>{under['text/plain']}</sub>"
    return bundle


def line_text(generation: Generation) -> str:
    """Tokens, time to the first one, tokens a second, cached tokens, why it ended."""
    handles = generation.handles
    tokens = sum(len(completion.token_ids) for handle in handles for completion in handle.completions)
    parts = [f"{len(handles):,} prompts"] if len(handles) > 1 else []
    parts.append(f"{tokens:,} token{'s' * (tokens != 1)}")
    waits = [handle.metrics.time_to_first_token for handle in handles if handle.metrics.time_to_first_token is not None]
    if waits:
        parts.append(f"first after {_seconds(min(waits))}")
    rate = None if generation.stalled else _rate(handles, tokens)
    if rate is not None:
        parts.append(f"{rate:,.0f} tokens/s")
    cached = sum(handle.num_cached_tokens for handle in handles)
    if cached:
        parts.append(f"{cached:,} of {sum(len(handle.prompt_token_ids) for handle in handles):,} prompt tokens cached")
    return " · ".join([*parts, _ending(generation)])


def _ending(generation: Generation) -> str:
    if not generation.done:
        status = generation.status
        if status in {"paused", "asleep"}:
            how = "%engine wake" if status == "asleep" else "%engine resume"
            return f"waiting: the engine is {status}; " + (
                f"{how} lets it go on" if generation.background else "resume it, or stop this cell"
            )
        return status
    failed = f": {generation.failure}" if generation.failure else ""
    reasons = Counter(completion.finish_reason or "" for handle in generation.handles for completion in handle.completions)
    if sum(reasons.values()) == 1:
        return next(iter(reasons)) + failed
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common()) + failed


def _rate(handles: list[Request], tokens: int) -> float | None:
    """Tokens a second: of one prompt after its first token, of several over all the time that they took."""
    ends = [handle.metrics.last_token_time for handle in handles if handle.metrics.last_token_time is not None]
    if len(handles) == 1:
        starts, counted = [handle.metrics.first_token_time for handle in handles], tokens - len(handles[0].completions)
    else:
        starts, counted = [handle.metrics.arrival_time for handle in handles], tokens
    began = min((start for start in starts if start is not None), default=None)
    if began is None or not ends or max(ends) <= began or counted < 1:
        return None
    return counted / (max(ends) - began)


def _seconds(value: float) -> str:
    return f"{1e3 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def as_html(text: str) -> str:
    """Text with its lines and its runs of spaces kept, also where style sheets are stripped."""
    return escape(text).replace("  ", "&nbsp; ").replace("\n", "<br>")


def _table(generation: Generation) -> Bundle:
    """A row for each output, of the first ones where there are many: the rest is not even turned into text while it runs."""
    handles = generation.handles
    several = len(handles) > 1
    outputs = [(i, completion) for i, handle in enumerate(handles) for completion in handle.completions]
    rows, plain = [], []
    for i, completion in outputs[:SHOWN]:
        number = _number(i, completion.index, several, len(handles[i].completions))
        text, end = completion.read_text(), completion.finish_reason or ""
        prompt = [as_html(_shortened(_prompt(generation, i)))] if several else []
        rows.append("".join(f'<td style="{CELL}">{cell}</td>' for cell in (number, *prompt, as_html(text), end)))
        plain.append(f"[{number}] {text}")
    more = f"{len(outputs) - SHOWN:,} more are in the result" if len(outputs) > SHOWN else ""
    names = [("", "2em"), *([("prompt", "28%")] if several else []), ("text", "auto"), ("end", "5em")]
    columns = "".join(f'<th style="{CELL};width:{width}">{name}</th>' for name, width in names)
    table = (
        f'<table style="width:100%"><thead><tr>{columns}</tr></thead><tbody>{"".join(f"<tr>{row}</tr>" for row in rows)}</tbody></table>'
    )
    under = f'<div style="{QUIET}">{more}</div>' if more else ""
    return {"text/plain": "\n\n".join([*plain, *([f"({more})"] if more else [])]), "text/html": table + under + _progress(generation)}


def _progress(generation: Generation) -> str:
    if generation.done:
        return ""
    done, total = sum(handle.finished for handle in generation.handles), len(generation)
    return f'<div style="{QUIET}"><progress value="{done}" max="{total}"></progress> {done:,} of {total:,}</div>'


def _number(prompt: int, output: int, several: bool, outputs: int) -> str:
    return f"{prompt}.{output}" if several and outputs > 1 else str(prompt if several else output)


def _prompt(generation: Generation, index: int) -> str:
    return generation.prompts[index] if index < len(generation.prompts) else generation.handles[index].prompt or ""


def _shortened(text: str) -> str:
    return text if len(text) <= SHORT else text[: SHORT - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _json(text: str) -> Bundle:
    """Indented where the text is JSON; otherwise the text, and why it is not."""
    try:
        value = json.loads(text)
    except ValueError as error:
        note = f"not valid JSON: {error}"
        return {"text/plain": f"{text}\n\n({note})", "text/html": f'<div>{as_html(text)}</div><div style="{QUIET}">{escape(note)}</div>'}
    pretty = json.dumps(value, indent=2, ensure_ascii=False)
    return {"text/plain": pretty, "text/html": f"<pre>{escape(pretty)}</pre>"}


def output_html(output: RequestOutput) -> str:
    """A RequestOutput: its texts, and what it took."""
    texts = "".join(f"<div>{as_html(o.text)}</div>" for o in output.outputs)
    tokens = sum(len(o.token_ids) for o in output.outputs)
    ends = ", ".join(o.finish_reason or "running" for o in output.outputs)
    told = f"{output.request_id} · {len(output.prompt_token_ids):,} prompt tokens, {output.num_cached_tokens:,} cached · {tokens:,} tokens · {ends}"
    return f'{texts}<div style="{QUIET}">{escape(told)}</div>'


# ── plain values ────────────────────────────────────────────────────────────────────────────────────────────────────────


def request_dict(output: RequestOutput) -> dict[str, Any]:
    """A RequestOutput as plain values."""
    metrics = output.metrics
    times = ("time_in_queue", "time_to_first_token", "inter_token_latency", "e2e_latency", "tokens_per_second")
    return {
        "request_id": output.request_id,
        "prompt": output.prompt,
        "prompt_token_ids": list(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
        "outputs": [
            {
                "index": o.index,
                "text": o.text,
                "token_ids": list(o.token_ids),
                "finish_reason": o.finish_reason,
                "stop_reason": o.stop_reason,
                "logprobs": None
                if o.logprobs is None
                else [
                    [{"token_id": i, "logprob": p.logprob, "rank": p.rank, "token": p.decoded_token} for i, p in entry.items()]
                    for entry in o.logprobs
                ],
            }
            for o in output.outputs
        ],
        "metrics": {name: getattr(metrics, name) for name in (*times, "num_prompt_tokens", "num_generation_tokens", "num_preemptions")},
    }


def rows(generation: Generation) -> list[dict[str, Any]]:
    """One row for each output."""
    return [
        {
            "prompt": _prompt(generation, i),
            "index": o.index,
            "text": o.text,
            "finish_reason": o.finish_reason,
            "prompt_tokens": len(output.prompt_token_ids),
            "cached_tokens": output.num_cached_tokens,
            "tokens": len(o.token_ids),
            "time_to_first_token": output.metrics.time_to_first_token,
            "seconds": output.metrics.e2e_latency,
            "request_id": output.request_id,
        }
        for i, output in enumerate(generation.requests)
        for o in output.outputs
    ]
