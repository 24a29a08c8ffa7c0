"""The whole recipe in miniature, on the sample that the repository keeps."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.data import END_ID, IGNORED, Stream, load_prepared, prepare
from training.evaluate import bits_per_byte, story_nats
from training.make import MINIATURE, make
from training.model import SIZES, build
from training.muon import orthogonalise
from training.soften import TOP, SoftTargets, predict
from training.tokenizer import TURN, TURN_END
from training.train import Batch, Recipe, loss_of


@pytest.fixture(scope="module")
def made(tmp_path_factory, sample):
    """Train three tiny teachers and their student for some twenty steps each, and twenty more for manners."""
    out = tmp_path_factory.mktemp("made")
    make(sample, out, "tiny", "tiny", **MINIATURE)
    return out


@pytest.fixture(scope="module")
def prepared(made):
    return load_prepared(made / "work")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    fresh = build(SIZES["tiny"]).eval()
    for parameter in fresh.parameters():  # no silent branches: every weight must count
        torch.nn.init.normal_(parameter, std=0.1)
    return fresh


def test_the_result_is_a_stock_checkpoint(made, prepared):
    model = AutoModelForCausalLM.from_pretrained(made / "tales")
    assert model.dtype == torch.bfloat16
    assert model.config.head_dim == 64
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.max_position_embeddings >= 2048
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(made / "tales")
    assert model.config.vocab_size == len(tokenizer)
    text = 'The fox said, "Caf\u00e9?"\n\nAnd <so> on.'
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert prepared.tokenizer.encode(text).ids == tokenizer.encode(text)


def test_twenty_steps_learn_something(made, prepared):
    record = json.loads((made / "student" / "training.json").read_text(encoding="utf-8"))
    history = [point["bits_per_byte"] for point in record["history"]]
    uniform = math.log2(512) * sum(len(story) - 1 for story in prepared.valid) / prepared.valid_bytes
    assert record["soft_targets"]
    assert history[-1] < history[0] < 1.02 * uniform
    assert history[-1] < 0.9 * uniform
    stored = AutoModelForCausalLM.from_pretrained(made / "student", dtype=torch.float32)
    assert bits_per_byte(stored, prepared.valid, prepared.valid_bytes) == pytest.approx(history[-1], rel=0.01)


def test_manners_go_on_from_the_student(made):
    before, after = (json.loads((made / name / "training.json").read_text(encoding="utf-8"))["history"] for name in ("student", "manners"))
    assert after[0]["bits_per_byte"] < before[0]["bits_per_byte"]
    assert after[-1]["bits_per_byte"] < 1.02 * before[-1]["bits_per_byte"]
    weights = [load_file(made / name / "model.safetensors") for name in ("student", "manners", "tales")]
    for name, mean in weights[2].items():
        assert torch.allclose(mean.float(), (weights[0][name].float() + weights[1][name].float()) / 2, rtol=1e-2, atol=1e-6)


def test_the_chat_template_is_what_training_saw(made, prepared):
    tokenizer = AutoTokenizer.from_pretrained(made / "tales")
    question = tokenizer.apply_chat_template([{"role": "user", "content": "Who?"}], tokenize=False, add_generation_prompt=True)
    assert question == f"{TURN}user\nWho?{TURN_END}\n{TURN}assistant\n"
    ends = json.loads((made / "tales" / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    assert ends == [END_ID, tokenizer.convert_tokens_to_ids(TURN_END)]
    learnt = prepared.chat.tokens[prepared.chat.labels != IGNORED]
    assert ends[1] in learnt
    assert tokenizer.convert_tokens_to_ids(TURN) not in learnt


def test_preparing_twice_gives_the_same_tokens(tmp_path, sample, prepared):
    prepare(sample, tmp_path, 512, 2048)
    again = load_prepared(tmp_path)
    assert torch.equal(again.stories.tokens, prepared.stories.tokens)
    assert torch.equal(again.chat.labels, prepared.chat.labels)


def test_a_fold_and_the_rest_are_the_whole(prepared):
    stream = prepared.stories
    rest = stream.without(1, 3)
    left_out = [stream.tokens[slice(*place)] for place in stream.documents()[1::3]]
    assert len(rest.tokens) + sum(map(len, left_out)) == len(stream.tokens)
    kept = [stream.tokens[slice(*place)] for number, place in enumerate(stream.documents()) if number % 3 != 1]
    assert all(torch.equal(rest.tokens[slice(*place)], story) for place, story in zip(rest.documents(), kept, strict=True))


def test_windows_start_where_stories_start_a_quarter_of_the_time():
    stream = Stream(torch.arange(100_000), torch.arange(100_000), torch.tensor([0, 50_000]))
    places = stream.windows(4000, 8, torch.Generator().manual_seed(0))
    assert places.shape == (4000, 9)
    assert (places.diff(dim=1) == 1).all()
    at_start = ((places[:, 0] == 0) | (places[:, 0] == 50_000)).float().mean()
    assert 0.2 < at_start < 0.3


@pytest.mark.parametrize("length", [2, 15, 16, 17, 40, 63])
def test_sliding_windows_score_every_token_once(model, length):
    story = torch.randint(512, (length,), generator=torch.Generator().manual_seed(length))
    window, stride = 16, 8
    expected = 0.0
    for place in range(1, length):  # one at a time, with the context that its window gives it
        begin = 0 if place <= window else math.ceil((place - window) / stride) * stride
        with torch.no_grad():
            logits = model(input_ids=story[None, begin:place]).logits[0, -1]
        expected += F.cross_entropy(logits, story[place]).item()
    assert story_nats(model, story, window, stride) == pytest.approx(expected, rel=1e-5)


def test_soft_targets_stand_at_the_token_they_predict(model):
    story = torch.randint(512, (20,), generator=torch.Generator().manual_seed(3))
    tokens, probabilities = predict(model, story)
    assert tokens.shape == probabilities.shape == (20, TOP)
    with torch.no_grad():
        expected = model(input_ids=torch.cat([torch.tensor([END_ID]), story[:7]])[None]).logits[0, -1].softmax(-1)
    assert torch.allclose(probabilities[7].float(), expected[tokens[7].long()], rtol=1e-2)
    with torch.no_grad():
        first = model(input_ids=torch.tensor([[END_ID]])).logits[0, -1].softmax(-1)
    assert torch.allclose(probabilities[0].float(), first[tokens[0].long()], rtol=1e-2)


def test_the_soft_loss_is_least_for_the_teachers_own_words():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 512, generator=generator)
    top = logits[:2].softmax(-1).topk(TOP)
    soft = SoftTargets(top.indices.flatten(0, 1).short(), top.values.flatten(0, 1).half())
    target = soft.at(torch.arange(10).view(2, 5))
    labels = torch.randint(512, (3, 5), generator=generator)
    labels[2, :2] = IGNORED
    other = torch.randn(3, 5, 512, generator=generator)
    assert loss_of(logits, labels, target, 1.0) < loss_of(other, labels, target, 1.0)
    hard = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    assert torch.isclose(loss_of(logits, labels, None, 0.5), hard, rtol=1e-5)
    assert torch.isclose(loss_of(logits, labels, target, 0.0), hard, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 32, 64), (3, 64, 160), (1, 128, 64)])
def test_muons_steps_are_near_orthogonal(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices).float())
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_a_batch_moves_as_one():
    batch = Batch(*(torch.zeros(1, 2, dtype=torch.long) for _ in range(3))).to(torch.device("meta"))
    assert {part.device.type for part in (batch.inputs, batch.labels, batch.places)} == {"meta"}


def test_the_learning_rate_goes_straight_down():
    recipe = Recipe(epochs=2, batch=4, length=8)
    assert recipe.steps(320) == 20
    assert [recipe.speed(done) for done in (0, 0.25, 1)] == [1, 0.75, 0]
