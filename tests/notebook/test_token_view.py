"""A text's tokens with their probabilities, in HTML that needs nothing but itself."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest

from nbengine import Engine, SamplingParams
from nbengine.notebook.token_view import ALTERNATIVES, LISTED, MOST_ALPHA, SHOWN, TokenView
from nbengine.outputs import CompletionOutput, Logprob

HALF = "\ufffd"


class Page(HTMLParser):
    """What a browser would make of it: the text of <pre>, its spans' attributes, and every tag and attribute that occurs."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.after, self.spans, self.tags, self.attributes, self.open = "", "", [], set(), set(), []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag == "span" and "pre" in self.open:
            self.spans.append({**dict(attrs), "text": ""})

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "pre" in self.open:
            self.text += data
            self.spans[-1]["text"] += data
        else:
            self.after += data


def output(*tokens, text=None):
    """An output from tokens of (text, probability, *alternatives)."""
    logprobs = []
    for number, (piece, probability, *others) in enumerate(tokens):
        entry = {number: Logprob(math.log(probability) if probability else -math.inf, 1, piece)}
        entry.update({1000 + rank: Logprob(math.log(p), rank, other) for rank, (other, p) in enumerate(others, 2)})
        logprobs.append(entry)
    text = "".join(piece for piece, *_ in tokens) if text is None else text
    return CompletionOutput(0, text, list(range(len(tokens))), logprobs=logprobs)


def page(*tokens, text=None):
    return Page(TokenView(output(*tokens, text=text))._repr_html_())


@pytest.fixture(scope="module")
def engine():
    with Engine("tales", max_model_len=256, num_gpu_blocks_override=32) as engine:
        yield engine


def test_an_engines_output_is_shown_whole(engine):
    params = SamplingParams(max_tokens=60, temperature=1.5, seed=4, logprobs=3, ignore_eos=True)
    [result] = engine.generate("Once upon", params)
    made = result.outputs[0]
    shown = Page(TokenView(made)._repr_html_())
    assert shown.text.replace("\u23ce", "").startswith(made.text[:40])
    assert len(shown.spans) == 60
    for span, (token, logprobs) in zip(shown.spans, zip(made.token_ids, made.logprobs, strict=True), strict=True):
        assert f"rank {logprobs[token].rank}" in span["title"]
        assert len(span["title"].splitlines()) == len(logprobs)


def test_without_probabilities_it_says_how_to_get_them(engine):
    [result] = engine.generate("Once", SamplingParams(max_tokens=2))
    with pytest.raises(ValueError, match="run with --logprobs"):
        TokenView(result.outputs[0])


def test_the_tooltip_shows_probability_rank_and_alternatives():
    [span] = page((" fox", 0.25, (" wolf", 0.5), ("\n", 0.125))).spans
    assert span["title"].splitlines() == ["␣fox  25 %  rank 1", "      50 %  ␣wolf", "    12.5 %  ⏎"]
    assert page(("a", 0.0)).spans[0]["title"].startswith("a  < 0.01 %")


def test_many_alternatives_are_cut():
    [span] = page(("a", 0.5, *[(f"b{i}", 0.01) for i in range(20)])).spans
    lines = span["title"].splitlines()
    assert len(lines) == 1 + ALTERNATIVES + 1
    assert lines[-1].strip() == f"and {20 - ALTERNATIVES} more"


def test_text_is_escaped_everywhere():
    evil = "<script>alert('&\"')</script>"
    html = TokenView(output((evil, 0.5, ('"><img src=x>', 0.1))))._repr_html_()
    assert "<script" not in html
    assert "<img" not in html
    shown = Page(html)
    assert shown.text == evil
    assert '"><img' in shown.spans[0]["title"]


def test_it_needs_no_script_style_sheet_or_class():
    shown = page(("a", 0.5), ("\n", 0.001))
    assert shown.tags == {"pre", "span", "div"}
    assert shown.attributes == {"style", "title"}


def test_its_styles_are_values_that_jupyterlab_lets_through_in_an_untrusted_notebook():
    html = TokenView(output(("a", 1.0), ("b", 0.05), ("c", 0.0)))._repr_html_()
    number = r"(1(\.0+)?|0?(\.\d+)?)"
    let_through = {
        "white-space": "normal|pre|nowrap|pre-wrap|pre-line",
        "overflow-wrap": "normal|break-word",
        "word-break": "normal",  # this and the next two a trusted notebook keeps; where they go, the text still reads
        "margin": "0 0 8px",
        "font-family": "inherit",
        "line-height": r"\d*(\.\d+)?",
        "background-color": rf"rgba\(\d+,\d+,\d+,{number}\)",
        "border-bottom": r"\dpx (solid|dashed) #[0-9a-f]+",
        "opacity": number,
        "font-size": r"\d+%",
    }
    styles = [style.split(":") for attribute in re.findall(r'style="([^"]*)"', html) for style in attribute.split(";")]
    assert {name for name, _ in styles} == set(let_through)
    assert [style for style in styles if not re.fullmatch(let_through[style[0]], style[1])] == []


def test_lines_and_spaces_are_kept_and_line_ends_shown():
    shown = page(("a\n", 0.5), ("\n   b", 0.5), ("\tc", 0.5))
    assert shown.text == "a⏎\n⏎\n   b\tc"
    assert [span["title"].split("  ")[0] for span in shown.spans] == ["a⏎", "⏎␣␣␣b", "⇥c"]


def test_control_characters_show_as_signs():
    assert page(("\x00\x1b\r\x7f", 0.5)).text == "␀␛␍␡"


def alpha(span):
    return float(re.search(r"rgba\(213,94,0,([\d.]+)\)", span["style"])[1])


def test_colour_grows_with_surprise_and_is_not_the_only_sign():
    spans = page(*[(str(p), p) for p in (1.0, 0.9, 0.5, 0.2, 0.05, 0.02, 0.005, 0.0)]).spans
    alphas = [alpha(span) for span in spans]
    assert alphas == sorted(alphas)
    assert (alphas[0], alphas[-1]) == (0, MOST_ALPHA)
    assert ["solid" if "solid" in s["style"] else "dashed" if "dashed" in s["style"] else "" for s in spans] == [""] * 4 + [
        "dashed"
    ] * 2 + ["solid"] * 2


def test_text_is_readable_on_the_strongest_colour_in_light_and_dark_themes():
    def luminance(rgb):
        linear = [c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for page_colour, ink in ((255, 33), (17, 222)):
        ground = [MOST_ALPHA * c + (1 - MOST_ALPHA) * page_colour for c in (213, 94, 0)]
        low, high = sorted((luminance(ground), luminance([ink] * 3)))
        assert (high + 0.05) / (low + 0.05) > 4.5  # what WCAG asks of text


def test_a_long_output_is_cut_and_says_so():
    tokens = [("word ", 0.5, *[("<" * 60, 0.01)] * 20)] * (SHOWN + 321)
    view = TokenView(output(*tokens))
    html = view._repr_html_()
    assert len(Page(html).spans) == SHOWN
    assert f"the first 2,000 of {SHOWN + 321:,} tokens are shown" in Page(html).after
    assert len(html) < 2_500_000
    assert "first" not in page(*tokens[:SHOWN]).after


def test_a_character_of_several_tokens_is_shown_as_one():
    shown = page(("a", 0.5), (HALF, 0.5), (HALF, 0.001), (HALF, 0.5), (" b", 0.5), text="a🙂 b")
    assert [span["text"] for span in shown.spans] == ["a", "🙂", " b"]
    title = shown.spans[1]["title"].splitlines()
    assert title[0] == "3 tokens make this character"
    assert len(title) == 4
    assert "part of a character (#2)" in title[2]
    assert "solid" in shown.spans[1]["style"]  # the least likely part


def test_half_a_character_at_the_end_is_shown_as_in_the_text():
    assert [s["text"] for s in page(("a", 0.5), (HALF, 0.5), text="a🙂").spans] == ["a", "🙂"]
    assert [s["text"] for s in page(("a", 0.5), (HALF, 0.5), text="a").spans] == ["a", HALF]


def test_spaces_that_a_token_alone_does_not_show_come_from_the_text():
    assert page(("the", 0.5), ("fox", 0.5), (",", 0.5), text="the fox,").text == "the fox,"


def test_an_end_token_is_shown_though_it_is_no_part_of_the_text():
    assert [s["text"] for s in page(("a", 0.5), ("<|end|>", 0.5), ("b", 0.5), text="ab").spans] == ["a", "<|end|>", "b"]


def test_tokens_without_text_go_by_their_numbers():
    bare = CompletionOutput(0, "", [7, 9], logprobs=[{7: Logprob(-1.0)}, {9: Logprob(-2.0)}])
    assert Page(TokenView(bare)._repr_html_()).text == "#7 #9 "


def test_plain_text_lists_few_tokens_and_is_the_text_of_many():
    assert repr(TokenView(output((" fox", 0.25), ("\n", 0.5)))).splitlines() == ["    25 %  ␣fox", "    50 %  ⏎"]
    many = output(*[("a ", 0.5)] * (LISTED + 1))
    assert repr(TokenView(many)) == many.text
    bundle = TokenView(many)._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"}
    assert bundle["text/plain"] == many.text


def test_an_output_of_no_tokens_is_empty():
    assert page().text == ""
