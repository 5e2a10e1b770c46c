"""Sharded data sets, read from any row on: parquet and JSON, on the Hugging Face hub or on the disk.

Gives rows at a (shard, row) that the caller names; knows nothing of tokens, of order or of a run's place. Parquet is
entered at the row group that holds the row, and .jsonl at the byte that is the row, because an iterator that has to
replay the shard takes minutes to resume.
On the hub one request names the files and their revision, and a read is one range request, which is retried here and
nowhere else: the clients' own retries would multiply with ours, and an attempt that repeats more could never succeed
on a bad line.
"""

import functools
import gzip
import io
import itertools
import json
import logging
import posixpath
import random
import re
import zlib
from collections.abc import Callable, Generator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import tenacity
from huggingface_hub import HfApi, close_session, constants, get_session, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from dsl.schema import DataConfig, suggest

log = logging.getLogger("dsl")
FORMATS = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz")
_PART = 8 << 20  # bytes that are asked for at a time
_FINAL = (RepositoryNotFoundError, RevisionNotFoundError)  # to a name's first use, the hub's answer and not a fault
_DAMAGED = (OSError, EOFError, zlib.error, pa.ArrowInvalid, json.JSONDecodeError, UnicodeDecodeError)
_ROWS = 256  # that are decoded at a time
_JITTER = random.Random()  # its own, so that a fault leaves a run's random state as it is
Retry = Callable[..., Any]  # calls a function with arguments, as often as it takes
Reader = Generator[list[tuple[int, Any]], None, None]


class StreamError(RuntimeError):
    """A corpus cannot be read any further; the message says what to do."""


class File(NamedTuple):
    """A shard: its name, its size in bytes, what names its content, and how to open it for reading at random."""

    name: str
    size: int
    content: str
    open: Callable[[Retry], io.IOBase]

    @property
    def unit(self) -> str:
        """What its rows are numbered by: lines that can be entered anywhere, by the byte where they begin."""
        return "byte" if self.name.endswith(".jsonl") else "row"


class HubFile(io.RawIOBase):
    """A file on the hub, read by range requests."""

    def __init__(self, url: str, size: int, retry: Retry):
        self._url, self._size, self._retry, self._at = url, size, retry, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        if count:
            buffer[:count] = self._retry(self._get, self._at, count)
            self._at += count
        return count

    def _get(self, first: int, count: int) -> bytes:
        headers = {"Range": f"bytes={first}-{first + count - 1}", "Accept-Encoding": "identity"}
        wait = constants.HF_HUB_DOWNLOAD_TIMEOUT
        reply = get_session().get(self._url, headers=build_hf_headers() | headers, timeout=wait)
        hf_raise_for_status(reply)
        if reply.status_code != 206 or len(reply.content) != count:
            raise OSError(f"asked for {count} bytes, got {len(reply.content)} with status {reply.status_code}")
        return reply.content


def hub_files(repository: str, config: str | None, data: DataConfig) -> list[File]:
    """The training shards of a hub data set at today's revision: those of a configuration in its card, else the hub's
    own conversion to parquet, else, without a card, those with "train" in their names. No `config` means "default", or
    the first. Raises ValueError for what it does not have.
    """
    found, configs = _listing(repository, None, data)
    if config and configs and config not in configs:
        raise ValueError(f"data set {repository} has no configuration {config!r}{suggest(config, configs)}")
    config = config or _first(configs)
    entry = configs.get(config, {})
    listed = entry.get("data_files", [])
    if isinstance(listed, dict):
        listed = [{"split": split, "path": path} for split, path in listed.items()]
    patterns: list[str] = []
    for item in [listed] if isinstance(listed, str) else listed:
        part = {"split": "train", "path": item} if isinstance(item, str) else item
        if part.get("split") == "train":
            patterns += [part["path"]] if isinstance(part["path"], str) else part["path"]
    folder = entry.get("data_dir") or ""
    patterns = [posixpath.normpath(posixpath.join(folder, pattern)).split("/") for pattern in patterns]
    files = [file for file in found if any(_matches(file.name.split("/"), pattern) for pattern in patterns)]
    if not files:
        converted: dict[str, list[File]] = {}
        for file in _listing(repository, "refs/convert/parquet", data)[0]:
            if at := re.match("([^/]+)/(partial-)?train/", file.name):
                converted.setdefault(at[1], []).append(file)
        named = [file for file in found if not config and re.search("(^|[^a-z])train([^a-z]|$)", file.name)]
        files = converted.get(config or _first(converted), named)
    if not files:
        raise ValueError(f"data set {repository} has no training files in parquet or JSON for configuration {config!r}")
    return files


def _first(names: dict[str, Any]) -> str | None:
    return "default" if "default" in names else next(iter(names), None)


def _matches(name: list[str], pattern: list[str]) -> bool:
    """Whether a card's pattern means a file, part by part: of its stars only `**` stands for any number of parts."""
    if not name or not pattern:
        return not name and set(pattern) <= {"**"}
    if pattern[0] == "**":
        return _matches(name, pattern[1:]) or _matches(name[1:], pattern)
    return fnmatchcase(name[0], pattern[0]) and _matches(name[1:], pattern[1:])


def _listing(repository: str, revision: str | None, data: DataConfig) -> tuple[list[File], dict[str, dict]]:
    """Every table of a data set, sorted by name, and the configurations of its card."""
    ask = functools.partial(HfApi().dataset_info, revision=revision, files_metadata=True, timeout=10)
    try:
        info = retrying(data, f"the list of files of {repository}", opening=True)(ask, repository)
    except RevisionNotFoundError:
        return [], {}
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"corpus must name a data set on the hub, got {repository!r}: not there, or `hf auth login` is needed"
        ) from error
    files = []
    for each in sorted(info.siblings, key=lambda each: each.rfilename):
        if not each.rfilename.endswith(FORMATS):
            continue
        url = hf_hub_url(repository, each.rfilename, repo_type="dataset", revision=info.sha)
        # a large file's blob is the pointer to it, which holds its sha256
        files.append(File(each.rfilename, each.size, each.blob_id, functools.partial(HubFile, url, each.size)))
    card = info.card_data.to_dict() if info.card_data else {}
    return files, {entry.get("config_name", "default"): entry for entry in card.get("configs") or []}


def retrying(data: DataConfig, what: str, *, opening: bool = False) -> tenacity.Retrying:
    """Calls a function until it has read: waits that grow, with jitter, a log line for each failure, then StreamError.

    When a data set is opened and nobody answers at all there is no network, and the second attempt is the last.
    """

    def last(state: tenacity.RetryCallState) -> bool:
        error = state.outcome.exception()
        silent = isinstance(error, ConnectionError) or type(error).__name__ in ("ConnectError", "ConnectTimeout")
        return state.attempt_number >= min(data.retry_attempts, 2 if opening and silent else data.retry_attempts)

    def wait(state: tenacity.RetryCallState) -> float:
        response = getattr(state.outcome.exception(), "response", None)
        asked = response.headers.get("Retry-After", "") if response is not None else ""
        grown = data.retry_first_wait * 2.0 ** min(state.attempt_number - 1, 99) * _JITTER.uniform(1, 2)
        return min(max(grown, float(asked) if asked.isdigit() else 0.0), data.retry_longest_wait)

    def reason(state: tenacity.RetryCallState) -> str:
        error = state.outcome.exception()
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def tell(state: tenacity.RetryCallState) -> None:
        number, wait = state.attempt_number + 1, state.next_action.sleep
        log.warning("%s: %s; attempt %d of %d in %.1f s", what, reason(state), number, data.retry_attempts, wait)

    def give_up(state: tenacity.RetryCallState) -> None:
        raise StreamError(
            f"cannot read {what} ({reason(state)}; attempts made: {state.attempt_number}). With a network again, the "
            "same command goes on from the last checkpoint. What needs none: corpus=pydocs or local:FOLDER, "
            "tokenizer=gpt2 or bpe:SIZE"
        ) from state.outcome.exception()

    final = tenacity.retry_if_not_exception_type(_FINAL if opening else GatedRepoError)
    retry = tenacity.retry_if_exception_type((OSError, HTTPError)) & final
    return tenacity.Retrying(stop=last, wait=wait, retry=retry, before_sleep=tell, retry_error_callback=give_up)


def _rows(file: File, retry: Retry, column: str, row: int, share: float) -> Reader:
    """Values of a column from a row on, each behind the next one's row; of parquet only the first share of all rows."""
    with file.open(retry) as raw:
        if file.name.endswith(".parquet"):
            table = pq.ParquetFile(raw, buffer_size=_PART, pre_buffer=False)
            _check_column(column, table.schema_arrow.names, file)
            at, end = row, round(share * table.metadata.num_rows)
            for group in range(table.num_row_groups):
                if row < table.metadata.row_group(group).num_rows:
                    break
                row -= table.metadata.row_group(group).num_rows
            else:
                return
            # no threads: one that still reads when the interpreter ends would abort it
            rest = range(group, table.num_row_groups)
            for batch in table.iter_batches(_ROWS, row_groups=rest, columns=[column], use_threads=False):
                values = batch.column(0)[row : row + max(end - at, 0)].to_pylist()
                yield list(enumerate(values, at + 1))
                row, at = max(0, row - len(batch)), at + len(values)
                if at >= end:
                    return
            return
        lines = io.BufferedReader(gzip.GzipFile(fileobj=raw) if file.name.endswith(".gz") else raw, _PART)
        if lines.peek(1).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"["):
            records = enumerate(json.load(lines)[row:], row + 1)
        elif file.unit == "byte":
            lines.seek(row)
            records = ((lines.tell(), json.loads(line)) for line in filter(bytes.strip, lines))
        else:  # what comes before the row is read, and not parsed
            records = enumerate(map(json.loads, itertools.islice(filter(bytes.strip, lines), row, None)), row + 1)
        for following, record in records:
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise ValueError(f"{file.name} must hold JSON objects, got {kind} in {file.unit} {row}")
            if row == 0:
                _check_column(column, record, file)
            value = record.get(column)
            # half of a surrogate pair is JSON, and no Unicode
            yield [(following, value.encode("utf-8", "replace").decode() if isinstance(value, str) else value)]
            row = following


def _check_column(column: str, known: Any, file: File) -> None:
    if column not in known:
        raise ValueError(f"column must be one of those of {file.name}{suggest(column, known)}, got {column!r}")


class Tables:
    """The column of shards, a block of `data.block_size` rows at a time; the first `data.fraction` of the shards.

    Where that ends inside a shard, its first rows are meant (JSON shards are read whole). Where documents are of many
    rows, `begins` knows the first of one by its value, and a block ends before one.
    """

    wait: Callable[[float], Any] = staticmethod(tenacity.nap.sleep)  # between two attempts; may raise to end them

    def __init__(
        self, name: str, files: list[File], column: str, data: DataConfig, begins: Callable[[Any], Any] | None = None
    ):
        self._begins = begins
        share = float(f"{data.fraction * len(files):.12g}")  # 0.07 of 100 files is 7.000000000000001, and they are 7
        self.shares = [min(1.0, share - i) for i in range(len(files)) if share > i]
        self.files, self._name, self._column, self._data = files[: len(self.shares)], name, column, data
        self._at: tuple[int, int] | None = None  # where the open reader stands
        self._reader: Reader = (each for each in ())
        self._ahead: list[tuple[int, Any]] = []

    def block(self, shard: int, row: int) -> tuple[list[Any], int]:
        """The rows that begin at a row of a shard, none at its end, and the row of the next block.

        Raises StreamError, and ValueError for a column or a row of another kind.
        """
        self._what = f"corpus {self._name}, shard {shard} ({self.files[shard].name}), {self.files[shard].unit} {row}"
        if self._at != (shard, row):
            self._reader.close()
            self._ahead = []
            self._reader = _rows(self.files[shard], self._retry, self._column, row, self.shares[shard])
        self._at, end = None, self._data.block_size  # an error leaves it so, and the next call opens the shard again
        try:
            self._read(end)
            while self._begins and self._read(end + 1) and not self._begins(self._ahead[end][1]):
                end += 1
        except _DAMAGED as error:
            reason = f"{type(error).__name__}: {error}"
            raise StreamError(f"cannot read {self._what}: {reason}. Mend it, or take it away") from error
        rows, self._ahead = self._ahead[:end], self._ahead[end:]
        self._at = (shard, rows[-1][0] if rows else row)
        return [value for _, value in rows], self._at[1]

    def _read(self, count: int) -> bool:
        """Until so many rows are ahead; whether the shard has them."""
        while len(self._ahead) < count and (more := next(self._reader, None)) is not None:
            self._ahead += more
        return len(self._ahead) >= count

    def _retry(self, function: Callable[..., Any], *given: Any) -> Any:
        return retrying(self._data, self._what).copy(sleep=self.wait)(function, *given)

    def close(self) -> None:
        """Leave no file and no connection open; the next block opens them again."""
        self._reader.close()
        self._at, self._ahead = None, []
        close_session()
