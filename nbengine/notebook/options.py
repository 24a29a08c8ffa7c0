"""The options of the magics: one parser each, made from the names that SamplingParams and EngineConfig have."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from dataclasses import fields
from typing import Any, NoReturn

from IPython.core.error import UsageError

from nbengine.config import EngineConfig
from nbengine.errors import closest
from nbengine.sampling_params import SamplingParams

STYLES = ("text", "markdown", "json")
WORD = re.compile(r"""\s*((?:"(?:\\.|[^"\\])*"|'[^']*'|\\.|[^\s"'\\])+)""")
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


class CommandParser(argparse.ArgumentParser):
    """Names the nearest option to one that it does not have."""

    def error(self, message: str) -> NoReturn:
        super().error(f"{message}{self.hint(message)}")

    def hint(self, message: str) -> str:
        """What an error of an unknown option should add; the dashes that all options share do not count."""
        unknown = re.match(r"unrecognized arguments: -+([^\s=]+)", message)
        names = {name.lstrip("-"): name for name in self.names()}
        if unknown is None:
            return ""
        near = min((name for name in names if name.startswith(unknown[1])), key=len, default=None) or closest(unknown[1], names)
        return f"; did you mean {names[near]!r}?" if near is not None else ""

    def names(self) -> list[str]:
        """Every option, long and short."""
        return sorted(name for action in self._actions for name in action.option_strings)


class Parser(CommandParser):
    """A magic's: raises UsageError, in one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(add_help=False, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}{self.hint(message)}")

    def parse_line(self, line: str) -> argparse.Namespace:
        """Options and arguments, quoted as in a shell."""
        return self.parse_args(words(line))

    def parse_head(self, line: str) -> tuple[argparse.Namespace, str]:
        """The options that a line begins with, and the rest of it to the letter; `--` ends the options."""
        argv: list[str] = []
        end = 0
        while (word := WORD.match(line, end)) is not None and word[1].startswith("-") and len(word[1]) > 1:
            if word[1] == "--":
                end = word.end()
                break
            taken, end = self._option(line, word)
            argv += taken
        return self.parse_args(argv), line[end:].strip()

    def _option(self, line: str, word: re.Match[str]) -> tuple[list[str], int]:
        """One option with the values that it takes, and where it ends."""
        taken, end = words(word[1]), word.end()
        action = self._option_string_actions.get(taken[0])
        if action is None or action.nargs == 0:
            return taken, end
        value = WORD.match(line, end)
        optional = action.nargs == "?"
        if value is None or (optional and not re.fullmatch(r"-?\d+", value[1])):
            return taken, end
        return [*taken, *words(value[1])], value.end()


def words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise UsageError(f"{error} in: {line.strip()}") from None


# ── what a person types for sampling ────────────────────────────────────────────────────────────────────────────────────


def generate_parser() -> Parser:
    """`%%generate` and `%generate`."""
    parser = Parser(prog="%%generate", description="The cell's text is the prompt, to the letter but for {name} of a variable of yours.")
    _add_prompt_options(parser)
    parser.add_argument("--each", metavar="NAME", help="one prompt for each item of this list, or row of this DataFrame; {item}, {COLUMN}")
    chat = parser.add_mutually_exclusive_group()
    chat.add_argument(
        "--chat",
        action="store_true",
        default=None,
        help="write the prompt with the chat template (default where the model is tuned for it)",
    )
    chat.add_argument("--no-chat", action="store_false", dest="chat", help="the prompt as it is, without a chat template")
    _add_sampling_options(parser)
    return parser


def chat_parser() -> Parser:
    """`%%chat`: a message; `%chat` has commands instead."""
    parser = Parser(prog="%%chat", description="The cell's text is your next message in a conversation that keeps its history.")
    parser.add_argument("name", nargs="?", default=None, help="which conversation; the last one used, or 'chat'")
    parser.add_argument("--edit", type=int, metavar="N", help="put the cell's text in place of message N, and answer anew from there")
    _add_prompt_options(parser)
    _add_sampling_options(parser)
    return parser


def _add_prompt_options(parser: Parser) -> None:
    parser.add_argument("-e", "--engine", metavar="NAME", help="an engine by name, or a variable that holds one (default: the current one)")
    parser.add_argument("-o", "--out", metavar="NAME", help="bind the result to this variable, already while it runs")
    parser.add_argument("--bg", action="store_true", help="return at once; the output goes on under this cell")
    parser.add_argument("--raw", action="store_true", help="fill no {name}")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    parser.add_argument("--format", choices=STYLES, default=None, help="how the text is shown")
    parser.add_argument("--priority", type=int, default=0, help="the smallest goes first, under a priority policy")


def _add_sampling_options(parser: Parser) -> None:
    """SamplingParams, by its own names; what is not given is the model's default."""
    add = parser.add_argument
    add("-n", type=int, metavar="N", help="outputs for each prompt")
    add("-m", "--max-tokens", type=_count, metavar="N", help="most tokens of an output; `all` for as many as there is room for")
    add("--min-tokens", type=int, metavar="N")
    add("-t", "--temperature", type=float, metavar="X", help="0 is greedy")
    add("--top-p", type=float, metavar="X")
    add("--top-k", type=int, metavar="N")
    add("--min-p", type=float, metavar="X")
    add("--presence-penalty", type=float, metavar="X")
    add("--frequency-penalty", type=float, metavar="X")
    add("--repetition-penalty", type=float, metavar="X")
    add("--seed", type=int, metavar="N", help="the same seed and prompt give the same output; with --each, prompt i has seed N + i")
    add("--stop", action="append", type=_unescaped, metavar="TEXT", help=r"end at this text (\n is a new line); may be given several times")
    add("--stop-token-ids", type=_ids, metavar="IDS", help="end at these tokens: 1,2,3")
    add("--include-stop-str-in-output", action="store_true", default=None)
    add("--bad-words", action="append", metavar="WORD", help="a word that never comes; may be given several times")
    add("--allowed-token-ids", type=_ids, metavar="IDS", help="no other token ever comes: 1,2,3")
    add("--logit-bias", type=_bias, metavar="JSON", help="""added to tokens' logits: '{"42": -5}'""")
    add("--ignore-eos", action="store_true", default=None, help="go on after the model's end tokens")
    add("--no-skip-special-tokens", action="store_false", dest="skip_special_tokens", default=None, help="show special tokens in the text")
    add("--logprobs", type=int, nargs="?", const=5, metavar="N", help="colour each token by its probability, and keep the N likeliest")
    add("--prompt-logprobs", type=int, nargs="?", const=5, metavar="N", help="the same for the prompt's tokens, in the result")


ALL = -1  # as many tokens as there is room for


def sampling_values(given: argparse.Namespace) -> dict[str, Any]:
    """What was given of SamplingParams, by its names."""
    values = {f.name: value for f in fields(SamplingParams) if (value := getattr(given, f.name, None)) is not None}
    if values.get("max_tokens") == ALL:
        values["max_tokens"] = None
    return values


# ── what a person types for an engine ───────────────────────────────────────────────────────────────────────────────────

NOT_TYPED = ("model", "ops")  # the one is the argument, the other takes functions
CONFIG_HELP = {
    "tokenizer": "a folder or hub id, when not the model's own",
    "skip_tokenizer_init": "token ids in and out only",
    "chat_template": "in place of the model's own",
    "trust_remote_code": "run code that the model brings along",
    "revision": "a branch, tag or commit on the hub",
    "download_dir": "where downloads go",
    "hf_token": "for gated models; better set HF_TOKEN",
    "load_format": "auto, safetensors, or dummy for random weights",
    "model_impl": "auto, nbengine, or transformers for its own code",
    "dtype": "auto, float32, bfloat16, float16",
    "device": "auto, cpu, cuda or cuda:N",
    "generation_config": "vllm: ignore the model's own sampling defaults",
    "max_model_len": "most tokens of a sequence, prompt and output",
    "seed": "for requests without a seed of their own",
    "max_logprobs": "most log-probabilities that a request may ask for",
    "block_size": "tokens of a KV block",
    "enable_prefix_caching": "reuse the KV of prompts that begin alike",
    "gpu_memory_utilization": "share of the card's memory to use",
    "kv_cache_memory_bytes": "bytes of the KV cache",
    "num_gpu_blocks_override": "blocks of the KV cache",
    "max_num_batched_tokens": "most tokens of a step",
    "max_num_seqs": "most sequences at once",
    "enable_chunked_prefill": "cut long prompts into several steps",
    "long_prefill_token_threshold": "while others decode, longer prompts take so many tokens a step",
    "scheduling_policy": "fcfs, priority, static, reserve, static-reserve",
    "trace_steps": "steps that the trace keeps; 0: none",
    "overlap": "on a GPU, plan a step while the one before it is computed",
    "run_ahead_ms": "on a GPU, launch as many steps ahead as take this long; 0: none",
    "cuda_graphs": "on a GPU, replay recorded steps",
    "deterministic": "on a GPU, the same tokens to the bit whatever shares the batch",
}


def add_config_options(parser: Parser) -> None:
    """EngineConfig, by its own names."""
    for field in fields(EngineConfig):
        kind, option = str(field.type), "--" + field.name.replace("_", "-")
        if field.name in NOT_TYPED:
            continue
        if kind == "bool":
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=CONFIG_HELP[field.name])
        else:
            read = int if kind.startswith("int") else float if kind.startswith("float") else str
            parser.add_argument(option, type=read, default=None, metavar="TEXT" if read is str else "N", help=CONFIG_HELP[field.name])
    parser.add_argument("--enforce-eager", action=argparse.BooleanOptionalAction, default=None, help="vLLM's word for --no-cuda-graphs")
    parser.add_argument("--tensor-parallel-size", type=int, default=None, metavar="N", help="1: more is not built yet")
    parser.add_argument("--quantization", default=None, metavar="TEXT", help="none is built yet")


def config_values(given: argparse.Namespace) -> dict[str, Any]:
    """What was given of EngineConfig, by its names."""
    names = [field.name for field in fields(EngineConfig) if field.name not in NOT_TYPED]
    names += ["enforce_eager", "tensor_parallel_size", "quantization"]
    return {name: value for name in names if (value := getattr(given, name)) is not None}


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, at least 1")
    return int(text)


def _count(text: str) -> int:
    if text == "all":
        return ALL
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, nor `all`") from None


def _unescaped(text: str) -> str:
    return re.sub(r"\\([ntr\\])", lambda found: ESCAPES[found[1]], text)


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in re.split(r"[,\s]+", text.strip("[] "))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids, such as 1,2,3") from None


def _bias(text: str) -> dict[int, float]:
    try:
        return {int(token): float(value) for token, value in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        raise argparse.ArgumentTypeError(f"""{text!r} is not a JSON object from token ids to numbers, such as '{{"42": -5}}'""") from None
