"""The loop that turns a prompt into text: what it says of each token, its limits, and what it refuses."""

import threading

import pytest
import torch
from helpers import assert_close, seeded
from tiny import STACKS, bytes_tokenizer, shell
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dsl.generation import RUNNERS_UP, _Text, complete, generate

TOKENIZER, ENDING = bytes_tokenizer(ends=False), bytes_tokenizer()
PROMPT = "def f(x):"


@pytest.fixture(autouse=True)
def _seed():
    seeded()


@pytest.fixture(params=STACKS, ids=list(STACKS))
def model(request, _seed):
    return shell(**STACKS[request.param])


def ids_of(model, prompt=PROMPT, **how):
    return [token.id for token in generate(model, TOKENIZER, prompt, **how)]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_what_generate_gives(model, penalty):
    inputs = TOKENIZER(PROMPT, return_tensors="pt")
    want = model.generate(**inputs, max_new_tokens=12, do_sample=False, repetition_penalty=penalty)[0, 9:].tolist()
    assert ids_of(model, max_new_tokens=12, temperature=0, repetition_penalty=penalty) == want


@torch.no_grad()
def test_what_is_said_of_a_token_is_what_one_call_over_all_says(model):
    model.double()  # so that rounding flips no router's choice
    said = list(generate(model, TOKENIZER, PROMPT, max_new_tokens=20, seed=1, temperature=2.0))
    ids = torch.tensor([TOKENIZER(PROMPT)["input_ids"] + [token.id for token in said]])
    hidden, state, stats = model.model(ids)
    probabilities = model.model.logits(hidden)[0].softmax(-1)
    for token in said:
        row = probabilities[token.position - 1]
        assert abs(token.probability - row[token.id].item()) < 1e-6
        others, texts, shares = zip(*token.runners_up, strict=True)
        best = torch.cat([row[: token.id], row[token.id + 1 :]]).topk(RUNNERS_UP).values
        assert token.id not in others and len(set(others)) == RUNNERS_UP
        assert texts == tuple(TOKENIZER.decode([i]) for i in others)
        assert_close("shares of the runners-up", torch.tensor(shares).double(), best, 1e-5)
        assert_close("shares of their ids", row[[*others]], best, 1e-5)  # two may trade places by rounding
        assert token.experts.shape == (len(stats), 2 if stats else 0) and token.experts.dtype is torch.int64
        for layer, experts in zip(stats, token.experts, strict=True):
            assert set(layer.experts[0, token.position].tolist()) == set(experts.tolist())
    assert [token.position for token in said] == list(range(9, 29))
    assert said[-1].state_bytes == sum(layer.num_bytes for layer in state)
    grows = "full_attention" in model.config.layer_types
    assert (said[-1].state_bytes > said[0].state_bytes) == grows


def test_a_seed_repeats_a_text_and_leaves_other_draws_alone():
    model = shell()
    torch.manual_seed(5)
    first = ids_of(model, seed=7, max_new_tokens=12)
    assert first == ids_of(model, seed=7, max_new_tokens=12) != ids_of(model, seed=8, max_new_tokens=12)
    assert ids_of(model, max_new_tokens=12) != ids_of(model, max_new_tokens=12)
    assert torch.randn(1).item() == torch.randn(1, generator=torch.Generator().manual_seed(5)).item()


def assert_greedy(model, **how):
    """Each token is the likeliest, or was as likely but for rounding: sampling may break a tie as it likes."""
    for token in generate(model, TOKENIZER, PROMPT, max_new_tokens=20, **how):
        assert token.probability > (1 - 1e-4) * token.runners_up[0][2]


def test_filters_narrow_the_choice():
    model = shell()
    for how in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-7}):
        assert_greedy(model, **how)
    for token in generate(model, TOKENIZER, PROMPT, top_k=3, temperature=5.0, max_new_tokens=40):
        better = [p for _, _, p in token.runners_up if p > token.probability]
        assert len(better) < 3
    assert len(ids_of(model, top_k=10**6, max_new_tokens=3)) == 3
    assert len(set(ids_of(model, temperature=0, max_new_tokens=20, repetition_penalty=50.0))) == 20


def test_sampling_follows_the_distribution():
    """Over many seeds the first token is drawn as often as softmax says (chi-square of two degrees, p = 3e-7)."""
    model, seeds = shell(num_hidden_layers=1), 200
    with torch.no_grad():
        logits = model.model.logits(model.model(torch.tensor([TOKENIZER("a")["input_ids"]]))[0])[0, -1]
    best = logits.topk(3)
    cold = (best.values[0] - best.values[2]).item() / 2  # so that each of the three is expected a dozen times
    first = [next(generate(model, TOKENIZER, "a", top_k=3, temperature=cold, seed=s)) for s in range(seeds)]
    expected = (best.values / cold).softmax(-1) * seeds
    counts = torch.tensor([sum(token.id == i for token in first) for i in best.indices.tolist()])
    assert counts.sum() == seeds
    assert ((counts - expected) ** 2 / expected).sum() < 30


def test_ids_that_the_tokenizer_lacks_are_never_chosen():
    model = shell(vocab_size=300, tie_word_embeddings=False)
    with torch.no_grad():
        model.model.lm_head.weight[257:] *= 50
        model.model.lm_head.weight[257:280] *= -1
    for how in ({"temperature": 0}, {"temperature": 3.0}, {"temperature": 1e300}):
        said = list(generate(model, TOKENIZER, PROMPT, max_new_tokens=40, **how))
        assert max(token.id for token in said) < 257
        assert max(i for token in said for i, _, _ in token.runners_up) < 257
        assert all(0 < token.probability <= 1 for token in said)


def test_a_text_ends_at_eos_which_is_its_last_token():
    model = shell()
    greedy = ids_of(model, temperature=0, max_new_tokens=20)
    model.generation_config.eos_token_id = [greedy[7], 300]
    assert ids_of(model, temperature=0) == greedy[: greedy.index(greedy[7]) + 1]
    want = model.generate(**TOKENIZER(PROMPT, return_tensors="pt"), max_new_tokens=50, do_sample=False)[0, 9:]
    assert ids_of(model, temperature=0) == want.tolist()
    with torch.no_grad():  # all logits are zero, so that the first token, the tokenizer's own eos, is the likeliest
        model.model.norm.weight.zero_()
    assert [token.id for token in generate(model, ENDING, PROMPT, temperature=0)] == [0]
    model.generation_config.eos_token_id = 0
    assert ids_of(model, temperature=0) == [0]
    assert complete(model, ENDING, PROMPT, temperature=0) == ""


def test_stop_ends_a_text_within_one_token():
    model, event, said = shell(), threading.Event(), []
    for token in generate(model, TOKENIZER, PROMPT, stop=event):
        said.append(token)
        if len(said) == 4:
            event.set()
    assert len(said) == 4
    assert ids_of(model, stop=lambda: True) == []


def test_the_window_ends_a_text_and_refuses_a_longer_prompt():
    softmax, linear = shell(layer_types=["full_attention"]), shell()
    said = list(generate(softmax, TOKENIZER, "a" * 90, max_new_tokens=50))
    assert [token.position for token in said] == [*range(90, 96)]
    for length in (96, 97, 200):
        with pytest.raises(ValueError, match=f"prompt must be shorter than max_position_embeddings=96 .*got {length}"):
            generate(softmax, TOKENIZER, "a" * length)
    assert len(ids_of(linear, "a" * 200, max_new_tokens=5)) == 5


def test_an_empty_prompt_starts_from_the_end_of_text():
    model, start = shell(), torch.tensor([[0]])
    said = list(generate(model, ENDING, "", temperature=0, max_new_tokens=10))
    want = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=10, do_sample=False)[0, 1:]
    assert [token.id for token in said] == want[: len(said)].tolist() and said[0].position == 1
    with pytest.raises(ValueError, match="prompt must not be empty: the tokenizer has no bos or eos"):
        generate(model, TOKENIZER, "")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be greater than or equal to 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a valid integer, .* got 2.5"),
        ({"temperature": -0.1}, "temperature must be greater than or equal to 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature must .* got nan"),
        ({"temperature": float("inf")}, "temperature must .* got inf"),
        ({"top_k": 0}, "top_k must be greater than or equal to 1, got 0"),
        ({"top_k": True}, "top_k must be a number, got True"),
        ({"top_p": 0.0}, "top_p must be greater than 0, got 0.0"),
        ({"top_p": 1.5}, "top_p must be less than or equal to 1, got 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be greater than 0, got 0"),
        ({"seed": -1}, "seed must be greater than or equal to 0, got -1"),
        ({"seed": "one", "top_k": [2]}, r"top_k must .* got \[2\]\nseed must .* got 'one'"),
        ({"temprature": 1}, "unknown setting 'temprature', did you mean 'temperature'"),
        ({"prompt": b"text"}, "prompt must be text in valid Unicode, got b'text'"),
        ({"prompt": "\udcff"}, "prompt must be text in valid Unicode"),
    ],
)
def test_parameters_are_checked_before_the_first_token(wrong, message):
    with pytest.raises(ValueError, match=message):
        generate(shell(), TOKENIZER, **{"prompt": PROMPT, **wrong})


def test_models_that_cannot_generate_are_refused():
    with pytest.raises(ValueError, match="model must be in eval mode"):
        generate(shell().train(), TOKENIZER, PROMPT)
    with pytest.raises(ValueError, match="vocab_size=64 must cover the tokenizer, got token"):
        generate(shell(vocab_size=64), TOKENIZER, PROMPT)
    broken = shell()
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits must be finite"):
        complete(broken, TOKENIZER, PROMPT)


def test_pieces_of_text_hold_whole_characters():
    words = "né 😀👩‍👩‍👧 日本\ufffd語 \x00 fin"
    text = _Text(TOKENIZER, TOKENIZER("a")["input_ids"][0])
    pieces = [text.add(token) for token in TOKENIZER(words)["input_ids"]]
    assert "".join(pieces) == words and "\ufffd" not in "".join(pieces).replace("\ufffd語", "")
    assert pieces[1:3] == ["", "é"]
    cut = TOKENIZER("ok 😀")["input_ids"][:-1]
    text = _Text(TOKENIZER, cut[0])
    assert "".join(map(text.add, cut[1:])) == "k "
    lone = TOKENIZER("é")["input_ids"][1:] + TOKENIZER("b")["input_ids"]  # a byte that can start nothing
    assert "".join(map(_Text(TOKENIZER, cut[0]).add, lone)) == "\ufffdb"


def test_pieces_keep_the_spaces_of_word_tokenizers():
    engine = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "s": 2, "?": 3}, unk_token="?"))
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=engine)
    text = _Text(tokenizer, 0)
    assert [text.add(token) for token in (1, 2, 0)] == [" two", "s", " one"]


def test_complete_joins_the_pieces():
    model, how = shell(), {"seed": 2, "max_new_tokens": 20}
    assert complete(model, TOKENIZER, PROMPT, **how) == "".join(
        t.text for t in generate(model, TOKENIZER, PROMPT, **how)
    )


@pytest.mark.parametrize("how", [{"temperature": 5e-324}, {"temperature": 1e-38}, {"temperature": 1, "top_p": 5e-324}])
def test_absurdly_cold_sampling_is_greedy(how):
    model = shell()
    assert_greedy(model, **how)
    assert complete(model, TOKENIZER, PROMPT, max_new_tokens=8, repetition_penalty=1e-320) is not None
