"""Our tokenizer gives what transformers gives, without importing it."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

import nbengine
from nbengine.errors import CheckpointError, ModelNotFoundError
from nbengine.tokenizer import Tokenizer

CORPUS = [
    "Once upon a time there was a little fox, and the fox said: hello world! 12345",
    "naïve café — 你好世界, привет мир",
    "  def f(x):\n\treturn x\n\n",
]
TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces \n\n and lines\t",
    "naïve café 你好 🙂👩‍👩‍👧 \U0001f1e9\U0001f1ea",
    "<|im_start|>user\nhi<|im_end|>",
    "</s><s> x</s>y",
    "e\u0301 \ufffd \x00 \u200b",
]

CHATML = """{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('Unknown role: ' ~ message.role) }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}{{ message.content }}{%- else %}
        {%- for part in message.content if part.type == 'text' %}{{ part.text }}{%- endfor %}
    {%- endif %}
    {%- if message.role == 'assistant' and message.reasoning_content is defined %}<think>{{ message.reasoning_content }}</think>{% endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
HEADERS = """{{- bos_token }}{% set ns = namespace(first=true) %}
{% for message in messages %}
{%- if message.role == 'system' and not ns.first %}{% continue %}{% endif %}
<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{{ message['content'] | trim }}{{ eos_token }}
{%- set ns.first = false %}
{% endfor %}
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
TOOLS = """{% if tools %}Tools:
{% for tool in tools %}
{{ tool | tojson(indent=2) }}
{% endfor %}
{% endif %}
{% for message in messages %}
[{{ message.role }}]{% generation %}{{ message.content or '' }}{% endgeneration %}
{% if message.tool_calls is defined %}{% for call in message.tool_calls %}{{ call.function | tojson }}{% endfor %}{% endif %}

{% endfor %}
{{ documents is none }}{{ strftime_now('%Y') | length }}"""
CHAT = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": " Why is <b>the</b> sky 'blue'? é\n"}]
REPLY = [*CHAT, {"role": "assistant", "content": " Because of ", "reasoning_content": "hmm"}]


def byte_level(folder: Path, *, bos: bool = False, nfc: bool = True, template: str = CHATML, **extra) -> Path:
    """The GPT-2, Qwen or Llama 3 way."""
    backend = Backend(models.BPE())
    if nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<\uff5cend▁of▁text\uff5c>"]
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=specials)
    )
    backend.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False), AddedToken("  pad  ", special=False)])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B", special_tokens=[("<|begin|>", backend.token_to_id("<|begin|>"))]
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|im_end|>",
        "chat_template": template,
        **extra,
    }
    return save(folder, backend, config)


def sentencepiece_like(folder: Path, *, style: str = "metaspace", tokenizer_class: str = "PreTrainedTokenizerFast", **extra) -> Path:
    """The Llama 2 way: ▁ for a space, <0xE4> for a byte that has no token."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    backend.train_from_iterator([text for text in CORPUS if text.isascii()], trainers.BpeTrainer(vocab_size=400, special_tokens=specials))
    described = json.loads(backend.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < 3]  # byte tokens are ordinary ones
    described["model"]["byte_fallback"] = True
    steps = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if style != "gemma":
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    described["decoder"] = {"type": "Sequence", "decoders": steps}
    if style == "legacy":
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        described["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
        described["pre_tokenizer"] = None
    elif style == "gemma":
        described["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        described["pre_tokenizer"] = None
    backend = Backend.from_str(json.dumps(described))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    config = {
        "tokenizer_class": tokenizer_class,
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "unk_token": "<unk>",
    }
    return save(folder, backend, {**config, "legacy": False, **extra})


def save(folder: Path, backend: Backend, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


STYLES = {
    "qwen": byte_level,
    "llama3": lambda folder: byte_level(folder, bos=True, template=HEADERS),
    "tools": lambda folder: byte_level(folder, template=TOOLS),
    "gpt2 class": lambda folder: byte_level(folder, nfc=False, tokenizer_class="GPT2Tokenizer"),
    "added in config": lambda folder: byte_level(
        folder,
        additional_special_tokens=["<|im_start|>", "<|new|>"],
        pad_token="<|pad|>",
        added_tokens_decoder={"600": {"content": "<|late|>", "special": True}, "0": {"content": "<|endoftext|>", "special": True}},
    ),
    "add_bos_token": lambda folder: byte_level(folder, add_bos_token=True),
    "no add_bos_token": lambda folder: byte_level(folder, bos=True, add_bos_token=False),
    "llama2": sentencepiece_like,
    "llama2 class": lambda folder: sentencepiece_like(folder, tokenizer_class="LlamaTokenizerFast"),
    "llama2 legacy": lambda folder: sentencepiece_like(folder, style="legacy"),
    "gemma": lambda folder: sentencepiece_like(folder, style="gemma"),
}


@pytest.fixture(scope="module", params=STYLES, ids=str)
def pair(request, tmp_path_factory):
    """Ours and transformers' own, from the same folder."""
    from transformers import AutoTokenizer

    folder = STYLES[request.param](tmp_path_factory.mktemp("tokenizer"))
    return Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("special", [True, False])
def test_encoding_equals_transformers(pair, special):
    ours, theirs = pair
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=special) == theirs.encode(text, add_special_tokens=special), text
    assert ours.encode_batch(TEXTS, add_special_tokens=special) == [theirs.encode(text, add_special_tokens=special) for text in TEXTS]


@pytest.mark.parametrize("skip", [True, False])
def test_decoding_equals_transformers(pair, skip):
    ours, theirs = pair
    everything = [*range(ours.vocab_size), ours.vocab_size + 5]
    for ids in (everything, everything[::-1], *([one] for one in everything), *(ours.encode(text) for text in TEXTS)):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert [ours.token_text(one) for one in everything] == [theirs.decode([one]) for one in everything]


def test_facts_equal_transformers(pair):
    ours, theirs = pair
    assert ours.vocab_size == len(theirs) == len(ours)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.special_ids >= {one for one in theirs.all_special_ids if one is not None}
    assert ours.special_ids == {number for number, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.special_tokens.items() <= theirs.special_tokens_map.items()  # theirs may add a class's default unk_token
    assert ours.chat_template == theirs.chat_template


def test_the_transformers_object_agrees_with_the_engine(pair):
    ours, _ = pair
    for text in TEXTS:
        assert ours.hf.encode(text) == ours.encode(text)
    assert ours.hf is ours.hf


@pytest.mark.parametrize("template", [CHATML, HEADERS, TOOLS], ids=["chatml", "headers", "tools"])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"add_generation_prompt": False},
        {"enable_thinking": False},
        {"bos_token": "<other>"},
        {"tools": [{"type": "function", "function": {"name": "f", "description": "<é> & more", "parameters": {}}}]},
    ],
    ids=str,
)
def test_rendered_chats_equal_transformers(tmp_path, template, case):
    from transformers import AutoTokenizer

    if any(name not in template and name != "add_generation_prompt" for name in case):
        with pytest.raises(ValueError, match=f"this chat template never reads '{next(iter(case))}'"):
            Tokenizer.from_folder(byte_level(tmp_path, template=template)).apply_chat_template(CHAT, **case)
        return
    folder = byte_level(tmp_path)
    (folder / "chat_template.jinja").write_text(template)  # wins over the one in tokenizer_config.json
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, "ü"]}}}]}
    chats = [CHAT, REPLY] if template == CHATML else [CHAT, REPLY, [*CHAT, call | ({} if template == TOOLS else {"content": "x"})]]
    for chat in chats:
        expected = theirs.apply_chat_template(chat, tokenize=False, **{"add_generation_prompt": True, **case})
        assert ours.apply_chat_template(chat, **case) == expected


@pytest.mark.parametrize("template", [CHATML, HEADERS], ids=["keeps spaces", "trims"])
@pytest.mark.parametrize("content", [" Because of ", "Because", [{"type": "text", "text": "The "}]], ids=repr)
def test_continuing_the_final_message_equals_transformers(tmp_path, template, content):
    from transformers import AutoTokenizer

    if template == HEADERS and isinstance(content, list):
        pytest.skip("this template takes strings only")
    folder = byte_level(tmp_path, template=template)
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    chat = [*CHAT, {"role": "assistant", "content": content}]
    expected = theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert ours.apply_chat_template(chat, add_generation_prompt=False, continue_final_message=True) == expected
    assert "cut-here" not in expected
    assert chat[-1]["content"] == content
    with pytest.raises(ValueError, match="add_generation_prompt=False"):
        ours.apply_chat_template(chat, continue_final_message=True)


def test_a_function_is_accepted_as_a_tool(tmp_path):
    def weather(city: str) -> str:
        """Tells the weather.

        Args:
            city: where
        """

    text = Tokenizer.from_folder(byte_level(tmp_path, template=TOOLS)).apply_chat_template(CHAT, tools=[weather])
    assert '"name": "weather"' in text
    assert '"description": "where"' in text


def test_templates_are_found_by_name(tmp_path):
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | length }} tool"},
        {"name": "rag", "template": "rag"},
    ]
    tokenizer = Tokenizer.from_folder(byte_level(tmp_path, template=named))
    assert tokenizer.chat_template == "plain"
    assert tokenizer.apply_chat_template(CHAT) == "plain"
    assert tokenizer.apply_chat_template(CHAT, tools=[{"a": 1}]) == "1 tool"
    assert tokenizer.apply_chat_template(CHAT, chat_template="rag") == "rag"
    assert tokenizer.apply_chat_template(CHAT, chat_template="{{ messages | length }}") == "2"


def test_what_a_template_raises_reaches_the_user(tmp_path):
    tokenizer = Tokenizer.from_folder(byte_level(tmp_path))
    with pytest.raises(ValueError, match="Unknown role: wizard"):
        tokenizer.apply_chat_template([*CHAT, {"role": "wizard", "content": "x"}])
    with pytest.raises(ValueError, match="empty"):
        tokenizer.apply_chat_template([])
    with pytest.raises(TypeError, match="a message is a dict"):
        tokenizer.apply_chat_template(["hello"])


MALFORMED = {
    "text": ("hello", TypeError, "messages must be a list of .* dicts, not str"),
    "one message": ({"role": "user", "content": "x"}, TypeError, "messages must be a list of .* dicts, not dict"),
    "a number": (5, TypeError, "messages must be a list"),
    "no role": ([{"content": "x"}], ValueError, r"message 0 has no role: write it as \{'role': 'user', 'content': 'Hello'\}"),
    "a role of None": ([{"role": None, "content": "x"}], ValueError, "message 0 has no role"),
    "a role that is no string": ([{"role": 5, "content": "x"}], TypeError, "has role 5, which is no string"),
    "no content": ([{"role": "user", "content": "x"}, {"role": "user"}], ValueError, r"message 1 \(of the user\) has no content"),
    "content of None": ([{"role": "user", "content": None}], ValueError, "has no content"),
    "content that is a number": ([{"role": "user", "content": 5}], TypeError, "has a content of type int: pass a string"),
    "content that is a dict": ([{"role": "tool", "content": {"a": 1}}], TypeError, r"of type dict: pass a string \(json\.dumps"),
    "a picture": (
        [{"role": "user", "content": [{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": "x"}}]}],
        ValueError,
        "has a part of type 'image_url', and this engine takes text only",
    ),
    "a part without text": ([{"role": "user", "content": [{"type": "text"}]}], TypeError, "a text part whose text is None"),
    "a part that is a number": ([{"role": "user", "content": [5]}], TypeError, "has a part that is 5"),
}


@pytest.mark.parametrize("template", [CHATML, HEADERS], ids=["takes parts", "takes strings"])
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_messages_are_refused(tmp_path, template, case):
    messages, error, message = MALFORMED[case]
    with pytest.raises(error, match=message):
        Tokenizer.from_folder(byte_level(tmp_path, template=template)).apply_chat_template(messages)


LOOPS = [
    "{% for m in messages %}{% for part in m.content %}{{ part.text }};{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for part in m['content'] | list %}{{ part.text }};{% endfor %}{% endfor %}",
    "{% macro show(content) %}{% for p in content %}{{ p.text }};{% endfor %}{% endmacro %}{{ show(messages[0].content) }}",
]


@pytest.mark.parametrize("template", LOOPS)
def test_a_template_that_goes_through_parts_gets_them(tmp_path, template):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    tokenizer = Tokenizer.from_folder(byte_level(tmp_path, template=template))
    assert tokenizer.apply_chat_template([{"role": "user", "content": parts}]) == "one;two;"


def test_parts_are_joined_for_a_template_that_takes_strings(tmp_path):
    tokenizer = Tokenizer.from_folder(byte_level(tmp_path, template="{% for m in messages %}[{{ m.content }}]{% endfor %}"))
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert tokenizer.apply_chat_template([{"role": "user", "content": parts}, {"role": "user", "content": ()}]) == "[one\ntwo][]"
    assert parts == [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]


def test_what_a_template_never_reads_is_refused_with_what_it_does_read(tmp_path):
    tokenizer = Tokenizer.from_folder(byte_level(tmp_path, template=CHATML))
    with pytest.raises(
        ValueError, match=r"never reads 'enable_thinkin'.*did you mean 'enable_thinking'.*it reads enable_thinking: leave it out"
    ):
        tokenizer.apply_chat_template(CHAT, enable_thinkin=False)
    with pytest.raises(ValueError, match="never reads 'tools', so the model would not see it"):
        tokenizer.apply_chat_template(CHAT, tools=[{"a": 1}])
    assert tokenizer.apply_chat_template(CHAT, tools=[]) == tokenizer.apply_chat_template(CHAT)
    with pytest.raises(ValueError, match="the chat template is no valid Jinja"):
        tokenizer.apply_chat_template(CHAT, chat_template="{% for %}")


@pytest.mark.parametrize(
    ("template", "unread"),
    [
        (CHATML, ["name"]),
        ("{% for m in messages %}{{ m.role }}{{ m['content'] }}{{ m.get('name') }}{% endfor %}", []),
        ("{% for m in messages[1:] %}{{ m | tojson }}{% endfor %}", []),
        ("{% for m in messages %}{% for key, value in m.items() %}{{ value }}{% endfor %}{% endfor %}", []),
        ("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}{% for t in tools %}{{ t | tojson }}{% endfor %}", ["name"]),
    ],
)
def test_what_a_template_never_reads_of_a_message_is_told(tmp_path, template, unread):
    tokenizer = Tokenizer.from_folder(byte_level(tmp_path, template=CHATML))
    message = {"role": "user", "content": "Hi", "name": "Ada", "audio": None, "annotations": []}
    assert tokenizer.unread_fields(message, template) == unread


def test_a_missing_template_says_what_to_do(tmp_path):
    tokenizer = Tokenizer.from_folder(sentencepiece_like(tmp_path))
    assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match="pass chat_template="):
        tokenizer.apply_chat_template(CHAT)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ strange.secret() }}",
        "{{ dict.mro() }}",
    ],
)
def test_a_template_cannot_reach_python(tmp_path, attack):
    class Strange:
        def secret(self):
            return "secret"

    with pytest.raises(ValueError, match="chat template"):
        Tokenizer.from_folder(byte_level(tmp_path, template=attack)).apply_chat_template(CHAT, strange=Strange())


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(ModelNotFoundError, match="skip_tokenizer_init=True"):
        Tokenizer.from_folder(tmp_path)


def test_damaged_files_are_named(tmp_path):
    folder = byte_level(tmp_path)
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").write_bytes(whole)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.from_folder(folder)


def test_a_prompt_that_is_no_string_is_refused(tmp_path):
    with pytest.raises(TypeError, match="prompt_token_ids"):
        Tokenizer.from_folder(byte_level(tmp_path)).encode([1, 2])


def test_a_long_text_leaves_the_interpreter_to_others_meanwhile():
    tokenizer = Tokenizer.from_folder(Path(nbengine.__file__).parent / "tales")
    text = " ".join(f"The fox and the {number} crows." for number in range(60_000))
    gaps, ended = [0.0], threading.Event()

    def watch():
        last = time.perf_counter()
        while not ended.is_set():
            time.sleep(0.001)
            gaps.append(time.perf_counter() - last)
            last += gaps[-1]

    watching = threading.Thread(target=watch)
    watching.start()
    began = time.perf_counter()
    ids = tokenizer.encode(text)
    took = time.perf_counter() - began
    assert tokenizer.decode(ids) == text
    ended.set()
    watching.join()
    assert max(gaps) < took / 2  # two hundredths on an idle machine
    assert ids == tokenizer.backend.encode(text).ids


def test_padding_and_truncation_stored_with_the_tokenizer_are_ignored(tmp_path):
    folder = byte_level(tmp_path)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(folder)
    text = "a long enough text"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_vocab_and_merges_alone_go_through_transformers(tmp_path):
    from transformers import AutoTokenizer

    folder = byte_level(tmp_path, tokenizer_class="Qwen2Tokenizer")
    described = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(described["vocab"]))
    (folder / "merges.txt").write_text("#version\n" + "\n".join(" ".join(merge) for merge in described["merges"]))
    (folder / "tokenizer.json").unlink()
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.backend is not None
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.apply_chat_template(CHAT) == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)


def test_reading_and_encoding_import_neither_transformers_nor_torch(tmp_path):
    folder = byte_level(tmp_path)
    code = (
        f"import sys; from nbengine.tokenizer import Tokenizer; t = Tokenizer.from_folder({str(folder)!r}); t.encode('hi');"
        "t.apply_chat_template([{'role': 'user', 'content': 'x'}]); sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=False).returncode == 0


def test_what_tokenizer_json_says_wins_over_a_class_that_would_rebuild_it(tmp_path):
    """transformers 5 rebuilds GPT2Tokenizer from the vocabulary and loses the rest: not what the model was trained with."""
    folder = byte_level(tmp_path, nfc=True, tokenizer_class="GPT2Tokenizer")
    tokenizer = Tokenizer.from_folder(folder)
    text = "e\u0301"  # two characters that NFC makes one
    assert tokenizer.encode(text) == tokenizer.encode("\xe9") == Backend.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert tokenizer.hf.encode(text) == tokenizer.encode(text)
