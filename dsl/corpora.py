"""Where documents come from, by name: pydocs, text files, tables on the hub or on the disk; and which are held out.

Gives text, never tokens; knows nothing of models or of a run's place in the data, which `dsl.data` keeps.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dsl import pydocs
from dsl.schema import CORPORA, DataConfig, suggest
from dsl.settings import cache_dir, smoke
from dsl.tables import FORMATS, File, StreamError, Tables, hub_files

__all__ = ["Corpus", "StreamError", "ngram_overlap", "open_corpus"]

log = logging.getLogger("dsl")
HUB = {  # name -> data set, configuration
    "cosmopedia": ("HuggingFaceTB/cosmopedia", "web_samples_v2"),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
}
PYDOCS_PROMPTS = (
    "Return a new array of given shape and type,",
    "def read_file(path, encoding='utf-8'):\n",
    "Parameters\n",
)
TEXT = (".txt", ".md", ".rst", ".py")
_END = 1 << 20  # bytes at either end of a file that name its content
_CUT = 8_000  # characters: a text file becomes documents of about this size
_ARTICLE = re.compile(r"(?m)^(?= = [^=\n]+ = $)")  # begins with a heading of the first level


class Corpus:
    """Documents in shards, held-out ones apart. `fingerprint` names the content and how it is split."""

    name: str
    fingerprint: str
    shards = 1
    prompts: tuple[str, ...] = ()  # that fit the corpus, beside those of the settings
    tokenizer = "bpe:4096"  # unless the settings name one
    overlap: float | None = None  # share of the held-out 13-word sequences that training holds too, where it is known

    def block(self, shard: int, row: int) -> tuple[list[str], int] | None:
        """The training documents that begin at a row, and the row of the next block; None at the shard's end."""
        raise NotImplementedError

    def held_out_documents(self) -> list[str]:
        """Documents that training never sees, at most `held_out_bytes` of them; the last one may be cut."""
        raise NotImplementedError

    def sample(self, characters: int) -> Iterator[str]:
        """Training documents in a fixed order, until they reach a size."""
        for shard in range(self.shards):
            row = 0
            while found := self.block(shard, row):
                texts, row = found
                for text in texts:
                    yield text
                    characters -= len(text)
                    if characters <= 0:
                        return

    def wait_by(self, wait: Callable[[float], Any]) -> None:
        """How to wait between two attempts at reading; it may raise, to end them. Only where attempts can fail."""

    def close(self) -> None:
        """Leave no file and no connection open; reading on opens them again."""


def open_corpus(data: DataConfig) -> Corpus:
    """The corpus that `data.corpus` names. Raises ValueError for what is not there, StreamError without a network."""
    kind, _, rest = data.corpus.partition(":")
    if data.corpus == "pydocs":
        return _open_pydocs(data)
    if data.corpus in HUB:
        return _open_hub(data, *HUB[data.corpus], data.column)
    if kind == "hf":
        if not re.fullmatch(r"[^/:]+/[^/:]+(:[^:]*){0,2}", rest):
            raise ValueError(f"corpus must be hf:owner/name:config:column, got {data.corpus!r}")
        repository, config, column = [*rest.split(":"), "", ""][:3]
        return _open_hub(data, repository, config or None, column or data.column)
    path = Path(rest if kind == "local" else data.corpus).expanduser()
    if path.exists():
        return _open_local(data, path)
    known = (*CORPORA, "hf:owner/name:config:column", "local:PATH")
    if kind == "local" or "/" in data.corpus:
        raise ValueError(f"corpus must name a file or folder that exists, got {str(path)!r}")
    raise ValueError(f"unknown corpus {data.corpus!r}{suggest(data.corpus, known)}")


def digest(*parts: Any) -> str:
    """16 hexadecimal digits that name some plain values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def cached(
    name: str, load: Callable[[BinaryIO], Any], make: Callable[[], Any], save: Callable[[Any, BinaryIO], Any]
) -> Any:
    """What a cache file holds, else what is made now and kept there: written whole or not at all, by many at once."""
    path = cache_dir() / name
    if path.exists():
        with contextlib.suppress(ValueError, EOFError), path.open("rb") as file:  # one that a power cut has spoilt
            return load(file)
    value = make()
    temporary = path.with_name(f"{name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            save(value, file)
        os.replace(temporary, path)
    except OSError as error:
        log.warning("cannot keep %s for the next time: %s", path, error)
        with contextlib.suppress(OSError):
            temporary.unlink()
    return value


def cached_json(name: str, make: Callable[[], Any]) -> Any:
    """`cached`, of plain values."""
    return cached(name, json.load, make, lambda value, file: file.write(json.dumps(value).encode()))


def _place(key: str) -> float:
    """Where in [0, 1) the hash of a document falls; those below `held_out` are held out."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest(), "big") / 2**64


def _bounded(texts: Iterable[str], size: int) -> Iterator[str]:
    """The first texts, of so many bytes in UTF-8; the last one is cut."""
    for text in texts:
        raw = text.encode("utf-8", "replace")
        yield raw[:size].decode("utf-8", "ignore")
        if (size := size - len(raw)) <= 0:
            return


def ngram_overlap(held_out: Iterable[str], training: Iterable[str], n: int = 13) -> float:
    """Share of the held-out sequences of n words that occur in training as well."""

    def grams(texts: Iterable[str]) -> np.ndarray:
        found = [np.empty(0, np.uint64)]
        for text in texts:
            words = np.array([hash(word) for word in text.split()], np.int64).astype(np.uint64)
            rolled = np.zeros(max(0, len(words) - n + 1), np.uint64)
            for i in range(n):
                rolled = rolled * np.uint64(0x9E3779B97F4A7C15) + words[i : i + len(rolled)]
            found.append(rolled)
        return np.concatenate(found)

    kept = grams(held_out)
    return float(np.isin(kept, grams(training)).mean()) if len(kept) else 0.0


class MemoryCorpus(Corpus):
    """Documents of name -> text: one shard of one block, in the order of their hash; `texts` are those to train on."""

    def __init__(self, name: str, documents: dict[str, str], data: DataConfig):
        if len(documents) < 2:
            raise ValueError(f"corpus must hold 2 documents or more, got {len(documents)} in {name}")
        order = sorted(documents, key=_place)
        kept = min(max(1, sum(_place(key) < data.held_out for key in order)), len(order) - 1)
        used = max(1, round(data.fraction * (len(order) - kept)))
        self.name, self._bytes = name, data.held_out_bytes
        self._held_out = [documents[key] for key in order[:kept]]
        self.texts = [documents[key] for key in order[kept : kept + used]]
        self.fingerprint = digest(self._held_out, self.texts)

    def block(self, shard: int, row: int) -> tuple[list[str], int] | None:
        return (self.texts, len(self.texts)) if row == 0 else None

    def held_out_documents(self) -> list[str]:
        return list(_bounded(self._held_out, self._bytes))

    @functools.cached_property
    def overlap(self) -> float:
        return cached_json(f"overlap-{self.fingerprint}.json", lambda: ngram_overlap(self._held_out, self.texts))


class TableCorpus(Corpus):
    """Rows of tables, a document each; which are held out follows from the hash of their text.

    With `join` rows are lines, as wikitext's are, and documents its articles.
    """

    tokenizer = "gpt2"

    def __init__(self, name: str, files: list[File], column: str, data: DataConfig, join: bool = False):
        self.name, self._data, self._column, self._join = name, data, column, join
        self._tables = Tables(name, files, column, data, (lambda row: _ARTICLE.match(row or "")) if join else None)
        self.shards = len(self._tables.files)
        shards = [(file.name, file.size, file.content) for file in files]
        how = ["whole articles"] if join else []
        how += ["rows are bytes"] if any(file.unit == "byte" for file in self._tables.files) else []
        self.fingerprint = digest(name, shards, column, data.held_out, data.fraction, data.block_size, *how)

    def _documents(self, shard: int, row: int) -> tuple[list[tuple[str, bool]], int] | None:
        rows, following = self._tables.block(shard, row)
        texts = [text for text in rows if isinstance(text, str)]
        other = {type(value).__name__ for value in rows if value is not None}
        if row == 0 and other and not texts:
            raise ValueError(f"column must hold text, got {', '.join(other)} in {self._column!r} of {self.name}")
        if self._join:
            texts = _ARTICLE.split("".join(texts))
        marked = [(text, _place(text) < self._data.held_out) for text in texts if text.strip()]
        return (marked, following) if rows else None

    def block(self, shard: int, row: int) -> tuple[list[str], int] | None:
        found = self._documents(shard, row)
        return found and ([text for text, held_out in found[0] if not held_out], found[1])

    def held_out_documents(self) -> list[str]:
        size = self._data.held_out_bytes

        def read() -> list[str]:
            """From the first shards on, as far as twice the text in which they should be found."""
            kept, left, shard, row = [], 2 * size / self._data.held_out, 0, 0
            while left > 0 and shard < self.shards and sum(map(len, kept)) < size:
                if (found := self._documents(shard, row)) is None:
                    shard, row = shard + 1, 0
                    continue
                kept += [text for text, held_out in found[0] if held_out]
                left, row = left - sum(len(text) for text, _ in found[0]), found[1]
            return list(_bounded(kept, size))

        kept = cached_json(f"held-out-{digest(self.fingerprint, size)}.json", read)
        if not kept:
            rule = f"hold more text, or held_out be larger than {self._data.held_out}, to hold out a document"
            raise ValueError(f"corpus must {rule}, got {self.name}")
        return kept

    def wait_by(self, wait: Callable[[float], Any]) -> None:
        self._tables.wait = wait

    def close(self) -> None:
        self._tables.close()


def _open_hub(data: DataConfig, repository: str, config: str | None, column: str) -> TableCorpus:
    files = hub_files(repository, config, data)
    name = data.corpus if data.corpus in HUB else f"{repository}:{config or ''}"
    return TableCorpus(name, files, column, data, join=data.corpus == "wikitext")


def _open_local(data: DataConfig, path: Path) -> Corpus:
    found = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if tables := [p for p in found if p.name.endswith(FORMATS)]:
        files = [File(p.name, p.stat().st_size, _ends(p), lambda retry, p=p: p.open("rb")) for p in tables]
        return TableCorpus(path.name, files, data.column, data)
    documents = {}
    for file in (p for p in found if p.suffix in TEXT or p == path):
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"corpus must be text in UTF-8, got {file}: {error}") from None
        end = r"\n\s*\n" if re.search(r"\n\s*\n", text) else r"\n"  # cut at empty lines, where there are any
        pieces = re.findall(rf"(?s)(?=.).{{0,{_CUT}}}.*?(?:{end}|\Z)", text)
        documents.update((piece, piece) for piece in pieces if piece.strip())
    if not documents:
        raise ValueError(f"corpus must hold files {', '.join(TEXT + FORMATS)}, got none in {path}")
    return MemoryCorpus(path.name, documents, data)


def _ends(path: Path) -> str:
    """What names the content of a file of any size at once: the hash of its first and last MiB, parquet's index in it.

    A change between them that leaves the size as it was goes unseen.
    """
    with path.open("rb") as file:
        first = file.read(_END)
        file.seek(max(0, path.stat().st_size - _END))
        return hashlib.sha256(first + file.read()).hexdigest()


def _open_pydocs(data: DataConfig) -> MemoryCorpus:
    small = smoke()  # a part of the standard library, so that tests take a second
    name = "pydocs-smoke" if small else "pydocs"

    def read() -> dict[str, str]:
        log.info("reading the documentation of Python and of the installed packages: half a minute, once")
        return pydocs.documents(small=small)

    corpus = MemoryCorpus(name, cached_json(f"{name}-{pydocs.key(small=small)}.json", read), data)
    corpus.prompts = PYDOCS_PROMPTS
    return corpus
