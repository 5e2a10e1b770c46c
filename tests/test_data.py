"""Tokenizers lose nothing, packing loses nothing, and the stream goes on exactly where it stood."""

import json
import math
import os
import random

import numpy as np
import pytest
import torch
from helpers import seeded
from transformers import AutoTokenizer

from dsl import data as data_module
from dsl.corpora import MemoryCorpus
from dsl.data import IGNORE, StreamError, TokenStream, held_out_rows, open_corpus, open_tokenizer
from dsl.settings import DataConfig, preset

END = "<|endoftext|>"
LENGTH = 32
DATA = DataConfig(held_out=0.1, tokenizer="bpe:300", shuffle_rows=1)  # rows as they stand in the text


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("DSL_SMOKE", "1")
    patch.setenv("DSL_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


def corpus(count: int = 60, data: DataConfig = DATA) -> MemoryCorpus:
    texts = {f"d{i}": f"Document {i} é: " + f"word{i} " * (i % 11) + END * (i == 5) for i in range(count)}
    return MemoryCorpus("test", texts, data)


@pytest.fixture(scope="module")
def tokenizer(cache):
    return open_tokenizer(DATA, corpus())


def stream(tokenizer, seed: int = 0, data: DataConfig = DATA, of: MemoryCorpus | None = None) -> TokenStream:
    return TokenStream(of or corpus(), tokenizer, data=data, seed=seed, length=LENGTH)


def flat(batches) -> list[int]:
    """The tokens of consecutive rows, the shared ones once."""
    rows = torch.cat(list(batches))
    assert torch.equal(rows[1:, 0], rows[:-1, -1])
    return rows[:, :-1].flatten().tolist()


def split(tokens: list[int], tokenizer) -> list[str]:
    """Whole documents in their order."""
    texts, start = [], 0
    for i, token in enumerate(tokens):
        if token == tokenizer.eos_token_id:
            texts.append(tokenizer.decode(tokens[start:i]))
            start = i + 1
    return texts


def test_gpt2_vocabulary_is_the_real_one():
    found = open_tokenizer(DataConfig(tokenizer="gpt2"), corpus())
    assert len(found) == 50_257 and found.encode("Hello world") == [15496, 995]
    assert found.eos_token_id == found.pad_token_id == 50_256


@pytest.fixture(scope="module", params=["bpe:300", "gpt2"])
def each_tokenizer(request, cache):
    return open_tokenizer(DataConfig(tokenizer=request.param), corpus())


def test_any_text_comes_back(each_tokenizer):
    generator = seeded()
    alphabets = ["".join(map(chr, range(1, 0xD800))), "".join(map(chr, range(0x1F300, 0x1F700))), " \t\r\n\u2028_1aé😀"]
    sizes = torch.randint(1, 40, (60,), generator=generator).tolist()
    texts = [f" {END}{END}x", ""]
    for alphabet in alphabets:
        picked = [torch.randint(len(alphabet), (size,), generator=generator).tolist() for size in sizes]
        texts += ["".join(alphabet[i] for i in some) for some in picked]
    end = each_tokenizer.eos_token_id
    for text, ids in zip(texts, data_module._encode(each_tokenizer, texts), strict=True):
        assert ids.tolist().index(end) == len(ids) - 1
        assert each_tokenizer.decode(ids[:-1]) == text


def test_bpe_is_trained_on_training_documents_once(monkeypatch):
    texts = {f"d{i}": f"common words {i} " + ("secretword " * 9 if i % 2 else "") for i in range(40)}
    some = MemoryCorpus("test", texts, DATA)
    some.texts = [text for text in texts.values() if "secretword" not in text]
    first = open_tokenizer(DataConfig(tokenizer="bpe:400"), some)
    assert len(first) <= 400 and len(first.encode("common")) == 1 < len(first.encode("secretword"))
    monkeypatch.setattr(data_module, "_train_bpe", None)
    assert open_tokenizer(DataConfig(tokenizer="bpe:400"), some).get_vocab() == first.get_vocab()


def test_a_saved_tokenizer_is_the_same_one(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    again(["a", "longer one"], padding=True, truncation=True, max_length=2)
    named = open_tokenizer(DataConfig(tokenizer=str(tmp_path)), corpus())
    for other in (again, named):
        assert torch.equal(stream(other).next(5), stream(tokenizer).next(5))
        assert data_module._backend(other).to_str() == data_module._backend(tokenizer).to_str()  # and so is its cache


def test_tokenizers_that_cannot_be_had_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="must be a folder that holds one, got"):
        open_tokenizer(DataConfig(tokenizer=str(tmp_path)), corpus())
    from hub_emulator import Hub

    quick = {"retry_first_wait": 0.001, "retry_longest_wait": 0.001}
    with Hub(tmp_path) as hub:
        hub.use(monkeypatch)
        with pytest.raises(ValueError, match="got 'no/body'"):
            open_tokenizer(DataConfig(tokenizer="no/body", **quick), corpus())
    with Hub(tmp_path) as hub:
        hub.use(monkeypatch)
    with pytest.raises(StreamError, match=r"cannot read tokenizer no/body.*tokenizer=gpt2 or bpe:SIZE"):
        open_tokenizer(DataConfig(tokenizer="no/body", **quick), corpus())


@pytest.mark.parametrize("cut", [0, 1, 9, 10, 11, 25])
def test_shuffled_rows_are_the_same_rows_and_resume_anywhere(tokenizer, cut):
    plain = stream(tokenizer).next(40)
    data = DATA.model_copy(update={"shuffle_rows": 10})

    whole = stream(tokenizer, data=data).next(40)
    for start in range(0, 40, 10):
        one, other = (sorted(map(tuple, rows[start : start + 10].tolist())) for rows in (plain, whole))
        assert one == other
    assert not torch.equal(plain, whole)
    first, second = stream(tokenizer, data=data), stream(tokenizer, data=data)
    begun = [first.next(1) for _ in range(cut)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert torch.equal(torch.cat([*begun, second.next(40 - cut)]), whole)


def test_each_epoch_has_every_document_once_in_a_new_order(tokenizer):
    some = corpus()
    source = stream(tokenizer, of=some)
    count = len(some.texts)
    batches = []
    while source.epoch < 3:
        batches.append(source.next(2))
    texts = split(flat(batches), tokenizer)
    epochs = [texts[i * count : (i + 1) * count] for i in range(3)]
    assert all(sorted(epoch) == sorted(some.texts) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] != some.texts


def test_rows_do_not_depend_on_how_many_are_asked_for(tokenizer):
    generator = seeded()
    one = stream(tokenizer)
    sizes = torch.randint(1, 9, (40,), generator=generator).tolist()
    assert torch.equal(torch.cat([one.next(n) for n in sizes]), stream(tokenizer).next(sum(sizes)))


def test_order_follows_from_the_seed_and_no_random_state_is_touched(tokenizer):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    same, other = stream(tokenizer, seed=5).next(9), stream(tokenizer, seed=6).next(9)
    assert torch.equal(stream(tokenizer, seed=5).next(9), same) and not torch.equal(same, other)
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("vocabulary", ["bpe:300", "gpt2"])
def test_encoded_tokens_are_kept_and_used_again(vocabulary, monkeypatch):
    tokenizer = open_tokenizer(DataConfig(tokenizer=vocabulary), corpus())
    first = stream(tokenizer).next(20)
    monkeypatch.setattr(data_module, "_encode", None)
    again = stream(tokenizer)
    assert torch.equal(again.next(20), first) and isinstance(again._source.tokens, np.memmap)
    assert again._source.tokens.dtype == np.uint16


@pytest.mark.parametrize("pool", [1, 7])
def test_a_stream_resumes_anywhere_again_and_again(tokenizer, pool):
    generator, data = seeded(), DATA.model_copy(update={"shuffle_rows": pool})
    unbroken = stream(tokenizer, seed=1, data=data).next(300)
    source, got = stream(tokenizer, seed=1, data=data), []
    while len(got) < 300:
        n = min(int(torch.randint(1, 60, (), generator=generator)), 300 - len(got))
        got += source.next(n)
        state = json.loads(json.dumps(source.state_dict()))
        assert len(json.dumps(state)) < 300
        source, before = stream(tokenizer, seed=99, data=data), source
        source.load_state_dict(state)
        assert source.state_dict() == state
        assert source.epoch == before.epoch
    assert torch.equal(torch.stack(got), unbroken)


def test_another_size_of_the_pool_begins_with_the_next_pool(tokenizer):
    sizes = [DATA.model_copy(update={"shuffle_rows": size}) for size in (10, 4)]
    first, second = (stream(tokenizer, data=data) for data in sizes)
    begun = first.next(13)
    second.load_state_dict(first.state_dict())
    rows, plain = torch.cat([begun, second.next(15)]), stream(tokenizer).next(28)
    assert sorted(rows.tolist()) == sorted(plain.tolist()) and torch.equal(
        rows[:20], stream(tokenizer, data=sizes[0]).next(20)
    )


def test_a_state_of_another_corpus_is_refused_unless_allowed(tokenizer, caplog):
    source = stream(tokenizer)
    source.next(7)
    state = source.state_dict()
    for other, data in (("other", DATA), ("fraction", DATA.model_copy(update={"fraction": 0.5}))):
        changed = corpus(59 if other == "other" else 60, data)
        with pytest.raises(ValueError, match=f"{state['fingerprint']}.*got test.*allow_other_corpus"):
            stream(tokenizer, data=data, of=changed).load_state_dict(state)
    allowed = DATA.model_copy(update={"allow_other_corpus": True})
    source = stream(tokenizer, data=allowed, of=corpus(59))
    source.load_state_dict(state)
    assert torch.equal(source.next(3), stream(tokenizer, of=corpus(59)).next(3)) and "from its start" in caplog.text


def test_held_out_rows_predict_every_byte_once(tokenizer):
    some = corpus()
    texts = some.held_out_documents()
    rows, n_bytes = held_out_rows(some, tokenizer, LENGTH)
    assert rows.dtype == torch.int64 and rows.shape[1] == LENGTH + 1
    assert torch.equal(rows[1:, 0], rows[:-1, -1])
    predicted = rows[:, 1:].flatten().tolist()
    real = [token for token in predicted if token != IGNORE]
    assert rows[0, 0] == tokenizer.eos_token_id and predicted[len(real) :] == [IGNORE] * (len(predicted) - len(real))
    assert len(predicted) - len(real) < LENGTH and split(real, tokenizer) == texts
    assert n_bytes == sum(len(text.encode()) for text in texts) > sum(map(len, texts))


def test_bits_per_byte_of_an_even_guess(tokenizer):
    from dsl.evaluation import bits_per_byte
    from dsl.model import LanguageModel

    rows, n_bytes = held_out_rows(corpus(), tokenizer, LENGTH)
    config = preset("tiny", tokenizer=DATA.tokenizer).model
    model = LanguageModel(config)
    for weight in model.parameters():
        torch.nn.init.zeros_(weight)
    scored = int((rows[:, 1:] != IGNORE).sum())
    expected = scored * math.log2(config.vocab_size) / n_bytes
    assert bits_per_byte(model, rows, n_bytes) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.skipif(not os.environ.get("DSL_SOAK"), reason="reads every installed package: make soak")
def test_the_whole_of_pydocs(tmp_path, monkeypatch):
    monkeypatch.setenv("DSL_SMOKE", "0")
    monkeypatch.setenv("DSL_CACHE", str(tmp_path))
    whole = open_corpus(DataConfig())
    assert sum(map(len, whole.texts)) > 15e6 and len(whole.texts) > 3000 and whole.overlap < 0.15
