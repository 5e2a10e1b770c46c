"""Sharded data sets, read from any row on: parquet and JSON, on the Hugging Face hub or on the disk.

Gives rows at a (shard, row) that the caller names; knows nothing of tokens, of order or of a run's place. Parquet is
entered at the row group that holds the row, because an iterator that has to replay the shard takes minutes to resume.
On the hub one request names the files and their revision, and a read is one range request, which is retried here and
nowhere else: the clients' own retries would multiply with ours, and an attempt that repeats more could never succeed
on a bad line.
"""

from __future__ import annotations

import functools
import gzip
import io
import itertools
import json
import logging
import random
import re
from collections.abc import Callable, Generator
from fnmatch import fnmatch
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import tenacity
from huggingface_hub import HfApi, close_session, constants, get_session, hf_hub_url
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from dsl.schema import DataConfig, suggest

log = logging.getLogger("dsl")
FORMATS = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz")
_PART = 8 << 20  # bytes that are asked for at a time
_FINAL = (RepositoryNotFoundError, RevisionNotFoundError)  # the hub's answer, not a fault
_ROWS = 256  # that are decoded at a time
_JITTER = random.Random()  # its own, so that a fault leaves a run's random state as it is


Retry = Callable[..., Any]  # calls a function with arguments, as often as it takes


class StreamError(RuntimeError):
    """A corpus cannot be read any further; the message says what to do."""


class File(NamedTuple):
    """A shard: its name, its size in bytes, what names its content, and how to open it for reading at random."""

    name: str
    size: int
    content: str
    open: Callable[[Retry], io.IOBase]


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
    own conversion to parquet. Raises ValueError for what it does not have.
    """
    found, configs = _listing(repository, None, data)
    if config and configs and config not in configs:
        raise ValueError(f"data set {repository} has no configuration {config!r}{suggest(config, configs)}")
    entry = configs.get(config or ("default" if "default" in configs else next(iter(configs), None)), {})
    listed = entry.get("data_files", [])
    if isinstance(listed, dict):
        listed = [{"split": split, "path": path} for split, path in listed.items()]
    patterns: list[str] = []
    for item in [listed] if isinstance(listed, str) else listed:
        paths = item["path"] if isinstance(item, dict) and item.get("split") == "train" else item
        patterns += [paths] if isinstance(paths, str) else paths if isinstance(paths, list) else []
    files = [file for file in found if any(fnmatch(file.name, p.replace("**/", "*")) for p in patterns)]
    if not any(file.name.endswith(FORMATS) for file in files):
        found, _ = _listing(repository, "refs/convert/parquet", data)
        train = re.compile((re.escape(config) if config else "[^/]+") + "/(partial-)?train/")
        files = [file for file in found if train.match(file.name)]
    if not (files := sorted(file for file in files if file.name.endswith(FORMATS))):
        raise ValueError(f"data set {repository} has no training files in parquet or JSON for configuration {config!r}")
    return files


def _listing(repository: str, revision: str | None, data: DataConfig) -> tuple[list[File], dict[str, dict]]:
    """Every file of a data set, and the configurations of its card."""
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
    for each in info.siblings:
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
        grown = data.retry_first_wait * 2 ** (state.attempt_number - 1) * _JITTER.uniform(1, 2)
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

    retry = tenacity.retry_if_exception_type((OSError, HTTPError)) & tenacity.retry_if_not_exception_type(_FINAL)
    return tenacity.Retrying(stop=last, wait=wait, retry=retry, before_sleep=tell, retry_error_callback=give_up)


def _rows(file: File, retry: Retry, column: str, row: int, share: float) -> Generator[list[Any], None, None]:
    """Values of a column from a row on, some at a time; of parquet only the first share of the rows."""
    with file.open(retry) as raw:
        if file.name.endswith(".parquet"):
            table = pq.ParquetFile(raw, buffer_size=_PART, pre_buffer=False)
            _check_column(column, table.schema_arrow.names, file)
            left = round(share * table.metadata.num_rows) - row
            for group in range(table.num_row_groups):
                if row < table.metadata.row_group(group).num_rows:
                    break
                row -= table.metadata.row_group(group).num_rows
            else:
                return
            # no threads: one that still reads when the interpreter ends would abort it
            rest = range(group, table.num_row_groups)
            for batch in table.iter_batches(_ROWS, row_groups=rest, columns=[column], use_threads=False):
                values = batch.column(0)[row : row + max(left, 0)].to_pylist()
                row, left = max(0, row - len(batch)), left - len(values)
                yield values
                if left <= 0:
                    return
            return
        lines = io.BufferedReader(gzip.GzipFile(fileobj=raw) if file.name.endswith(".gz") else raw, _PART)
        records = json.load(lines) if lines.peek(1)[:1] == b"[" else map(json.loads, lines)
        for record in itertools.islice(records, row, None):
            _check_column(column, record, file)
            yield [record[column]]


def _check_column(column: str, known: Any, file: File) -> None:
    if column not in known:
        raise ValueError(f"column must be one of those of {file.name}{suggest(column, known)}, got {column!r}")


class Tables:
    """The column of shards, a block of `data.block_size` rows at a time; the first `data.fraction` of the shards.

    Where that ends inside a shard, its first rows are meant (JSON shards are read whole).
    """

    wait: Callable[[float], Any] = staticmethod(tenacity.nap.sleep)  # between two attempts; may raise to end them

    def __init__(self, name: str, files: list[File], column: str, data: DataConfig):
        share = data.fraction * len(files)
        self.shares = [min(1.0, share - i) for i in range(len(files)) if share > i]
        self.files, self._name, self._column, self._data = files[: len(self.shares)], name, column, data
        self._at: tuple[int, int] | None = None  # where the open reader stands
        self._reader: Generator[list[Any], None, None] = (each for each in ())
        self._ahead: list[Any] = []

    def block(self, shard: int, row: int) -> list[Any]:
        """The rows that begin at a row of a shard; none at its end. Raises StreamError."""
        self._what = f"corpus {self._name}, shard {shard} ({self.files[shard].name}), row {row}"
        if self._at != (shard, row):
            self._reader.close()
            self._ahead = []
            self._reader = _rows(self.files[shard], self._retry, self._column, row, self.shares[shard])
        self._at = None  # an error leaves it so, and the next call opens the shard again
        while len(self._ahead) < self._data.block_size and (more := next(self._reader, None)) is not None:
            self._ahead += more
        rows, self._ahead = self._ahead[: self._data.block_size], self._ahead[self._data.block_size :]
        self._at = (shard, row + len(rows))
        return rows

    def _retry(self, function: Callable[..., Any], *given: Any) -> Any:
        return retrying(self._data, self._what).copy(sleep=self.wait)(function, *given)

    def close(self) -> None:
        """Leave no file and no connection open; the next block opens them again."""
        self._reader.close()
        self._at, self._ahead = None, []
        close_session()
