"""%%generate and %generate in a real kernel."""

from __future__ import annotations

import json

import pytest


def test_a_cell_streams_into_one_display_and_ends_static(kernel):
    ran = kernel.run("%%generate --max-tokens 60 --ignore-eos --seed 1\nOnce upon a time")
    text, line = ran.shown
    assert text["text/plain"] in text["text/html"].replace("<br>", "\n").replace("&nbsp;", " ").replace("&#x27;", "'").replace(
        "&quot;", '"'
    )
    assert "60 tokens" in line["text/plain"]
    assert "first after" in line["text/plain"]
    assert "tokens/s" in line["text/plain"]
    assert line["text/plain"].endswith("length")
    assert ran.updates >= 2
    assert not any("widget" in kind for data in ran.shown for kind in data)
    assert ran.result is None  # the text is there already


def test_updates_come_ten_to_twenty_times_a_second_however_fast_the_tokens(kernel):
    ran = kernel.run("%%generate --max-tokens 250 --ignore-eos --no-chat\nOnce upon a time")
    bodies = ran.updates / 2  # text and line
    assert bodies <= 20 * ran.seconds + 4
    assert bodies >= 4 * ran.seconds  # fewer than ten only where the machine is busy


def test_the_result_is_the_cells_value_and_is_shown_again_when_asked(kernel):
    kernel.run("%%generate --max-tokens 8 --ignore-eos\nHello")
    assert kernel.value("_.finish_reason") == "length"
    again = kernel.run("_")
    assert kernel.value("_.text") in again.shown[0]["text/plain"]
    assert "8 tokens" in again.shown[0]["text/plain"]


def test_a_result_has_the_documented_attributes(kernel):
    kernel.run("%%generate --max-tokens 6 --ignore-eos --logprobs 2 --out r\nHello")
    assert kernel.value("r.text == r.requests[0].outputs[0].text and str(r) == r.text")
    assert kernel.value("len(r.token_ids)") == 6
    assert kernel.value("(r.finish_reason, len(r.logprobs), r.metrics.num_generation_tokens)") == ("length", 6, 6)
    assert kernel.value("type(r.requests[0]).__name__") == "RequestOutput"
    assert kernel.value("sorted(r._repr_mimebundle_())") == ["text/html", "text/plain"]
    told = json.loads(kernel.value("__import__('json').dumps(r.to_dict())"))
    assert told["requests"][0]["outputs"][0]["token_ids"] == kernel.value("r.token_ids")
    assert kernel.value("list(r.to_frame()['finish_reason'])") == ["length"]
    assert "Generation finished" in kernel.value("repr(r)")


def test_the_prompt_reaches_the_model_to_the_letter(kernel):
    prompt = 'JSON {"a": [1, {}]}, code if (x) { y(); } and \\frac{a}{b}  two  spaces\n\n  indented {undefined}'
    kernel.run(f"%%generate --no-chat -m 1 --out r\n{prompt}")
    assert kernel.value("r.requests[0].prompt") == prompt


def test_a_variable_is_filled_and_raw_leaves_it(kernel):
    kernel.run("animal = 'fox'")
    kernel.run("%%generate --no-chat -m 1 --out r\nThe {animal} ran")
    assert kernel.value("r.requests[0].prompt") == "The fox ran"
    kernel.run("%%generate --no-chat -m 1 --raw --out r\nThe {animal} ran")
    assert kernel.value("r.requests[0].prompt") == "The {animal} ran"


def test_a_line_takes_its_prompt_to_the_letter_after_the_options(kernel):
    kernel.run("animal = 'fox'")
    kernel.run('%generate -m 2 --no-chat -t 0 --out r  The "{animal}"  --temperature 3 $HOME')
    assert kernel.value("r.requests[0].prompt") == 'The "fox"  --temperature 3 $HOME'
    kernel.run("if True:\n    s = %generate -m 2 --no-chat The end")  # as a part of a cell: a plain magic
    assert kernel.value("s.requests[0].prompt") == "The end"


def test_a_line_may_end_in_a_question_mark(kernel):
    kernel.run("%generate -m 2 --no-chat --out r Who is it?")
    assert kernel.value("r.requests[0].prompt") == "Who is it?"


def test_sampling_options_reach_the_engine(kernel):
    kernel.run(
        "%%generate -n 2 -m 7 --min-tokens 3 -t 0.5 --top-p 0.8 --top-k 9 --min-p 0.1 --presence-penalty 0.2 --frequency-penalty 0.3 "
        "--repetition-penalty 1.2 --seed 5 --stop '\\n\\n' --stop END --stop-token-ids 7,8 --include-stop-str-in-output --bad-words dog "
        "--logit-bias '{\"42\": -5}' --ignore-eos --no-skip-special-tokens --logprobs --prompt-logprobs 2 --out r\nHi"
    )
    names = ("n", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
             "repetition_penalty", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "bad_words", "logit_bias", "ignore_eos",
             "skip_special_tokens", "logprobs", "prompt_logprobs")  # fmt: skip
    given = kernel.value(f"[getattr(r.handles[0].params, name) for name in {names}]")
    assert given == [2, 7, 3, 0.5, 0.8, 9, 0.1, 0.2, 0.3, 1.2, 5, ["\n\n", "END"], [7, 8], True, ["dog"], {42: -5.0}, True, False, 5, 2]
    kernel.run("%%generate -m 4 --allowed-token-ids 100,101 --out r\nHi")
    assert set(kernel.value("r.token_ids")) <= {100, 101}
    kernel.run("%%generate -m all --out r --stop-token-ids 0 --no-chat -t 0 --seed 2 --bg\nHi")
    assert kernel.value("r.handles[0].params.max_tokens") is None
    kernel.run("r.cancel()")


def test_the_same_seed_gives_the_same_text(kernel):
    for name in "ab":
        kernel.run(f"%%generate -m 12 --seed 3 -t 1 --out {name}\nTell me about the sea")
    assert kernel.value("a.text == b.text")


def test_chat_is_the_default_for_a_model_tuned_for_it(kernel):
    kernel.run("%%generate -m 1 --out r\nHello")
    assert kernel.value("r.requests[0].prompt") == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    kernel.run("%%generate -m 1 --no-chat --out r\nHello")
    assert kernel.value("r.requests[0].prompt") == "Hello"
    kernel.run("%%generate -m 1 --system 'Be brief.' --out r\nHello")
    assert kernel.value("r.requests[0].prompt").startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello")


def test_each_makes_one_prompt_an_item_in_one_batch(kernel):
    kernel.run("words = ['fox', 'sea', 'king']")
    ran = kernel.run("%%generate --each words -m 4 --no-chat --ignore-eos --out r\nA {item} and {words}")
    assert kernel.value("[q.prompt for q in r.requests]") == ["A fox and fox", "A sea and sea", "A king and king"]
    assert kernel.value("len(r.to_frame())") == 3
    assert "3 prompts · 12 tokens" in ran.shown[1]["text/plain"]
    assert ran.shown[0]["text/html"].count("<tr>") == 4
    kernel.run("%generate --each words -m 1 --no-chat --out r")
    assert kernel.value("[q.prompt for q in r.requests]") == ["fox", "sea", "king"]


def test_each_takes_the_rows_of_a_frame(kernel):
    kernel.run("import pandas as pd\npeople = pd.DataFrame({'name': ['Ann', 'Bo'], 'age': [3, 4]})")
    kernel.run("%%generate --each people -m 1 --no-chat --out r\n{name} is {age}")
    assert kernel.value("[q.prompt for q in r.requests]") == ["Ann is 3", "Bo is 4"]


def test_many_prompts_show_a_progress_bar_while_they_run(kernel):
    kernel.run("many = [f'number {i}' for i in range(30)]")
    seen = []
    message = kernel.start("%%generate --each many -m 20 --ignore-eos\nTell me of {item}")
    kernel.finish(message, lambda msg, ran: seen.append(str(msg["content"].get("data", {}).get("text/html", ""))) and False)
    assert any("<progress" in html for html in seen)


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ("%%generate --bogus\nhi", "--bogus"),
        ("%%generate --max-token 5\nhi", "did you mean '--max-tokens'"),
        ("%%generate --temp 0\nhi", "did you mean '--temperature'"),
        ("%%generate -t hot\nhi", "invalid float value: 'hot'"),
        ("%%generate -t -1\nhi", "temperature must be"),
        ("%%generate --out 2x\nhi", "2x"),
        ("%%generate --each nothing\nhi", "nothing"),
        ("%%generate --engine elsewhere\nhi", "no engine is called 'elsewhere'"),
        ("%%generate --chat --no-chat\nhi", "not allowed with"),
        ("%%generate --no-chat --system x\nhi", "--system"),
        ("%%generate --stop 'unclosed\nhi", "No closing quotation"),
        ("%%generate -n 0\nhi", "n must be"),
        ("%generate -m 5", "no prompt"),
    ],
)
def test_a_mistake_is_one_clear_line_and_an_error(kernel, cell, says):
    ran = kernel.run(cell, check=False)
    assert (ran.status, ran.ename) == ("error", "UsageError")
    assert says in ran.evalue
    assert says in ran.err
    assert "Traceback" not in ran.err
    assert not ran.shown


@pytest.mark.parametrize("option", ["--json", "--best-of=3", "--json-schema x"])
def test_an_option_that_is_like_no_other_is_not_said_to_be_meant_as_one(kernel, option):
    ran = kernel.run(f"%%generate {option}\nhi", check=False)
    assert ran.evalue == f"%%generate: unrecognized arguments: {option}"


def test_a_failing_cell_leaves_nothing_bound(kernel):
    kernel.run("%reset_selective -f ^never$")
    kernel.run("%%generate --out never -t -1\nhi", check=False)
    assert not kernel.value("'never' in globals()")


def test_comments_and_blank_lines_may_stand_before_the_magic(kernel):
    kernel.run("# a comment\n\n%%generate -m 2 --out r\nHello")
    assert kernel.value("len(r.token_ids)") == 2


def test_markdown_and_json_are_shown_as_such(kernel):
    assert "text/markdown" in kernel.run("%%generate -m 3 --format markdown\nHello").shown[0]
    ran = kernel.run("%%generate -m 3 --ignore-eos --format json\nHello")
    assert "not valid JSON" in ran.shown[0]["text/plain"]


def test_text_is_escaped_in_html(kernel):
    kernel.run("tags = ['<script>alert(1)</script>', '<b>']")
    ran = kernel.run("%%generate --each tags -m 1\n{item}")
    assert "<script>" not in ran.shown[0]["text/html"]
    assert "&lt;script&gt;" in ran.shown[0]["text/html"]


def test_logprobs_colour_the_tokens(kernel):
    ran = kernel.run("%%generate -m 4 --ignore-eos --logprobs 3 --out r\nHello")
    assert "title=" in ran.shown[0]["text/html"]
    assert "title=" in kernel.run("r.tokens").result["text/html"]
    ran = kernel.run("%%generate -m 4 --out r\nHello")
    assert "title=" not in ran.shown[0]["text/html"]
    assert "--logprobs" in kernel.run("r.tokens", check=False).evalue


def test_a_reply_is_reused_from_the_prefix_cache_and_says_so(kernel):
    long = "word " * 60
    kernel.run(f"%%generate -m 1 --no-chat\n{long}")
    assert "prompt tokens cached" in kernel.run(f"%%generate -m 1 --no-chat\n{long}").shown[1]["text/plain"]


def test_help_lists_every_option(kernel):
    doc = kernel.inspect("%%generate")
    for option in (
        "--max-tokens",
        "--temperature",
        "--stop",
        "--ignore-eos",
        "--each",
        "--out",
        "--bg",
        "--format",
        "--logprobs",
        "--system",
    ):
        assert option in doc
    assert "--edit" in kernel.inspect("%%chat")
    for command in ("load", "unload", "step", "reset-cache", "plan"):
        assert f"%engine {command}" in kernel.inspect("%engine")
