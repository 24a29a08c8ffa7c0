"""sharegpt with text in and out, where every third request has top-p 0.9 and penalties and is read as it comes."""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import TYPE_CHECKING, Any

from nbengine import SamplingParams
from nbengine.bench.measure import Run, Settings, opened
from nbengine.bench.results import Results, table
from nbengine.bench.texts import folder_with_tokenizer, text_prompts

if TYPE_CHECKING:
    from nbengine import LLM, Request

EVERY = 3
PARTICULAR: dict[str, Any] = {"top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1}
Texts = list[tuple[str, int]]


def measure(models: list[str], settings: Settings, results: Results) -> list[dict[str, Any]]:
    """The same requests without and with what a third of them asks for, in turns in one engine; the best of each counts."""
    rows = []
    for model in models:
        if not settings.allows(f"mixed on {model}"):
            continue
        folder = folder_with_tokenizer(model, settings.folder)
        with opened(model, settings, folder, skip_tokenizer_init=False) as (llm, _):
            plain, mixed = [], []
            for turn in range(settings.turns):
                plain.append(at_once(llm, text_prompts("sharegpt", folder, fresh=f"plain {turn}", quick=settings.quick)))
                mixed.append(a_third_read(llm, text_prompts("sharegpt", folder, fresh=f"mixed {turn}", quick=settings.quick)))
        one, other = max(run.rate for run in plain), max(run.rate for run in mixed)
        row = {
            "model": model,
            "workload": "sharegpt",
            "requests": mixed[0].requests,
            "tok_s": other,
            "plain_tok_s": one,
            "of_plain": other / one,
        }
        rows.append(
            results.add("mixed", {**row, "runs_tok_s": [run.rate for run in mixed], "particular": f"{EVERY}rd request: {PARTICULAR}"})
        )
    shown = [(row["model"], row["plain_tok_s"], row["tok_s"], row["of_plain"]) for row in rows]
    table("sharegpt as text; every third request with top-p, penalties and read as it comes", ("model", "plain", "mixed", "ratio"), shown)
    return rows


def params_of(new: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=1.0, max_tokens=new, ignore_eos=True, **more)


def at_once(llm: LLM, jobs: Texts) -> Run:
    """All through `LLM.generate`, text in and out."""
    began = perf_counter()
    outputs = llm.generate([text for text, _ in jobs], [params_of(new) for _, new in jobs], use_tqdm=False)
    return Run(perf_counter() - began, sum(len(output.outputs[0].token_ids) for output in outputs), len(jobs))


def a_third_read(llm: LLM, jobs: Texts) -> Run:
    """All at once again, with readers in a loop of their own."""
    params = [params_of(new, **({} if i % EVERY else PARTICULAR)) for i, (_, new) in enumerate(jobs)]
    began = perf_counter()
    requests = llm.engine.submit_all([text for text, _ in jobs], params)
    tokens = asyncio.run(_read(requests))
    return Run(perf_counter() - began, tokens, len(jobs))


async def _read(requests: list[Request]) -> int:
    async def stream(request: Request) -> int:
        text = [piece async for piece in request]
        output = request.output().outputs[0]
        assert "".join(text) == output.text, "what was read as it came is not the whole text"
        return len(output.token_ids)

    async def wait(request: Request) -> int:
        return len((await request).outputs[0].token_ids)

    return sum(await asyncio.gather(*(wait(request) if i % EVERY else stream(request) for i, request in enumerate(requests))))
