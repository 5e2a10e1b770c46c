"""Checkpoints on disk: one atomic folder a step, verified, listed, read and rotated; and the lock of a run.

Knows nothing of training: it is given a transformers model, a tokenizer and plain data. A folder is written under
another name, synced and renamed, so it exists whole or not at all. Nothing that is read here can run code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path

import filelock
import torch

logger = logging.getLogger(__name__)
VERSION = 1
REQUIRED = {"config.json", "trainer.json"}
FULL = {errno.ENOSPC, errno.EDQUOT}
_hashed: dict[tuple[int, ...], str] = {}  # by device, inode, size and time of change


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read, or a run cannot be entered; the message says what and where."""


class DiskFullError(CheckpointError):
    """The volume of the checkpoints is full; what was saved before is still there."""


def _do(call, *args, **options):
    """Every change to the disk passes here, so that a test can stop the world at each of them."""
    return call(*args, **options)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows has no sync of a folder
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_once(path: Path) -> str:
    """The hash that this process knows for a file that was not touched since: rotation would read gigabytes."""
    stat = path.stat()
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return _hashed.get(key) or _hashed.setdefault(key, _sha256(path))


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _json_text(value: dict) -> str:
    return json.dumps(value, indent=1, allow_nan=False)  # ends with "}", so that no cut is still whole


def steps(run_dir: str | Path) -> list[int]:
    """The steps that have a folder, good or not, oldest first."""
    names = (re.fullmatch(r"step-(\d{6}|[1-9]\d{6,})", path.name) for path in Path(run_dir).glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def step_dir(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / f"step-{step:06d}"


def verify(folder: str | Path, sha256=_sha256) -> list[str]:
    """What is wrong with a step folder, a line for each file; empty where it is as it was saved."""
    place = Path(folder)
    try:
        manifest = _read_json(place / "manifest.json")
        if manifest["version"] != VERSION:
            return [f"manifest.json: version {manifest['version']!r} is unknown, this program knows {VERSION}"]
        files = manifest["files"]
        if manifest["sha256"] != _seal(files):
            return ["manifest.json: does not match its own checksum"]
    except OSError as error:
        return [f"manifest.json: {error.strerror}"]
    except (ValueError, KeyError, TypeError):
        return ["manifest.json: not a manifest in JSON"]
    problems = [f"{name}: not in the manifest" for name in sorted(REQUIRED.difference(files))]
    for name, expected in files.items():
        try:
            if (size := (place / name).stat().st_size) != expected["size"]:
                problems.append(f"{name}: {size} bytes instead of {expected['size']}")
            elif sha256(place / name) != expected["sha256"]:
                problems.append(f"{name}: changed since it was saved (sha256)")
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
    return problems


def _seal(files: dict) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def newest(run_dir: str | Path, until: int | None = None) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest step (up to `until`) that verifies (None: no such), those newer that do not, with their problems."""
    skipped = []
    for step in reversed([step for step in steps(run_dir) if until is None or step <= until]):
        place = step_dir(run_dir, step)
        if not (problems := verify(place)):
            return place, skipped
        skipped.append((place, "; ".join(problems)))
    return None, skipped


def index(run_dir: str | Path) -> dict:
    """Good steps with their held-out bits per byte (None: not measured), the newest, and the best of those that were
    measured on the same text as the last one (`measured_on` of the trainer).
    """
    places = (step_dir(run_dir, step) for step in steps(run_dir))
    states = {place.name: read_trainer(place) for place in places if not verify(place, _sha256_once)}
    scores = {name: state.get("bits_per_byte") for name, state in states.items()}
    texts = {name: states[name].get("measured_on") for name in scores if scores[name] is not None}
    alike = (None, *[*texts.values()][-1:])  # once nothing was noted
    best = min((name for name in texts if texts[name] in alike), key=scores.__getitem__, default=None)
    return {"newest": next(reversed(states), None), "best": best, "steps": scores}


def read_trainer(folder: str | Path) -> dict:
    """What the trainer saved of itself; raises CheckpointError."""
    try:
        return _read_json(Path(folder, "trainer.json"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{Path(folder, 'trainer.json')} cannot be read: {error}") from error


def read_optimizer(folder: str | Path) -> dict:
    """The saved tensors and numbers, on the CPU; raises CheckpointError, also for a pickle that holds code."""
    path = Path(folder, "optimizer.pt")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is refused: it holds more than tensors and numbers, or is damaged") from error
    except (OSError, EOFError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error).partition(chr(10))[0] or 'it is empty'}") from error


def save(
    run_dir: str | Path,
    step: int,
    *,
    model,
    tokenizer,
    trainer: dict,
    optimizer: dict,
    card: str | None = None,
    keep: int | None = None,
    until: int | None = None,
) -> Path:
    """Writes `step-NNNNNN`, whole or not at all, then deletes what `rotate` may; returns the folder.

    `trainer` is JSON (its bits_per_byte, where measured, ranks the steps), `optimizer` tensors, numbers and lists.
    Raises DiskFullError, or CheckpointError for what cannot be written; older steps are then as they were.
    """
    run_dir, place = Path(run_dir), step_dir(run_dir, step)
    temporary, old = (run_dir / f".{place.name}.{kind}-{os.getpid()}" for kind in ("tmp", "old"))
    weights = {weight.data_ptr(): weight.nbytes for weight in model.state_dict().values()}  # a tied one is saved once
    need = sum(weights.values()) + _nbytes(optimizer) + 2**23
    texts = {"trainer.json": _json_text(trainer)} | ({"README.md": card} if card else {})
    try:
        _do(run_dir.mkdir, parents=True, exist_ok=True)
        _clean(run_dir, os.getpid())
        if shutil.disk_usage(run_dir).free < need:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _do(temporary.mkdir)
        _do(model.save_pretrained, temporary)
        _do(tokenizer.save_pretrained, temporary)
        for name, text in texts.items():
            _do((temporary / name).write_text, text, encoding="utf-8")
        _do(_write_tensors, temporary / "optimizer.pt", optimizer)
        _seal_folder(temporary)
        if os.path.lexists(place):
            if verify(place):
                set_aside(run_dir, step, "bad")
            else:
                _do(place.rename, old)
        _do(temporary.rename, place)
        _do(_sync, run_dir)
        _clean(run_dir, os.getpid())
        rotate(run_dir, keep, until, step)
    except BaseException as error:
        with suppress(OSError):
            _clean(run_dir, os.getpid())
        if problem := _explained(error, run_dir, need):
            raise problem from error
        raise
    return place


def _seal_folder(folder: Path) -> None:
    """Syncs every file and writes the manifest, the last of them."""
    files = {}
    for path in sorted(folder.rglob("*")):
        _do(_sync, path)
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256_once(path)}
    text = _json_text({"version": VERSION, "sha256": _seal(files), "files": files})
    _do((folder / "manifest.json").write_text, text, encoding="utf-8")
    _do(_sync, folder / "manifest.json")
    _do(_sync, folder)


def _write_tensors(path: Path, value: dict) -> None:
    with open(path, "wb") as file:  # with a path, torch hides the reason of a failure
        torch.save(value, file)


def _nbytes(value) -> int:
    """Bytes of the tensors in nested plain data; raises TypeError for what could not be read back."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict | list | tuple):
        return sum(map(_nbytes, value.values() if isinstance(value, dict) else value))
    if value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(f"optimizer must hold tensors, numbers, text, lists and dicts, got {type(value).__name__}")
    return 0


def _explained(error: BaseException, run_dir: Path, need: int) -> CheckpointError | None:
    """A failed save as the user should see it; each library has its own words for a full disk."""
    free, cause = shutil.disk_usage(run_dir).free if run_dir.exists() else need, error
    while cause is not None and getattr(cause, "errno", None) not in FULL and "(os error 28)" not in str(cause):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return DiskFullError(f"disk full: need {need / 1e6:,.1f} MB, have {free / 1e6:,.1f} MB for {run_dir}")
    if isinstance(error, OSError):
        return CheckpointError(f"cannot write in {run_dir}: {error.strerror or error}")
    return None


def rotate(run_dir: Path, keep: int | None, until: int | None = None, saved: int | None = None) -> None:
    """Deletes good steps but the newest `keep` (None: all), the best, the one just saved, and the newest up to `until`,
    which a longer schedule goes back to; renews index.json. Bad steps are neither counted nor touched.
    """
    now = index(run_dir)
    early = [name for name in now["steps"] if until is not None and int(name.removeprefix("step-")) <= until]
    kept = {*list(now["steps"])[-(keep or 0) :], now["best"], *early[-1:]}
    kept |= {step_dir(run_dir, saved).name} if saved is not None else set()
    for name in set(now["steps"]) - kept:
        grave = run_dir / f".{name}.tmp-{os.getpid()}"
        try:
            _do((run_dir / name).rename, grave)
            del now["steps"][name]
            _do(os.unlink if grave.is_symlink() else shutil.rmtree, grave)  # a link: to a step that is kept elsewhere
        except OSError as error:  # the new step is in its place: no reason to end a run
            logger.warning("%s cannot be deleted: %s", run_dir / name, error.strerror or error)
    with suppress(OSError):  # only a hint
        hint = run_dir / ".index.json.tmp"
        _do(hint.write_text, _json_text(now), encoding="utf-8")
        _do(hint.replace, run_dir / "index.json")


def set_aside(run_dir: str | Path, step: int, why: str = "old") -> Path:
    """Renames a step, or whatever has its name, to `step-NNNNNN.WHY-1` (or the next free number), which is no step."""
    place, number = step_dir(run_dir, step), 1
    while os.path.lexists(target := place.with_name(f"{place.name}.{why}-{number}")):
        number += 1
    return _do(place.rename, target)


def _clean(run_dir: Path, pid: int | None = None) -> None:
    """Removes what an interrupted save (of `pid`, else of anybody) left; a step moved aside goes back to its place."""
    for path in run_dir.glob(".step-*"):
        name, _, kind = path.name[1:].partition(".")
        kind, _, owner = kind.partition("-")
        if pid is not None and owner != str(pid):
            continue
        if kind == "old" and not (run_dir / name).exists():
            _do(path.rename, run_dir / name)
        else:
            _do(os.unlink if path.is_symlink() else shutil.rmtree, path)


class Lock:
    """Keeps a second process off a run, and cleans up behind a dead one.

    The operating system holds the lock, so that of a dead process is free at once: no process number that another
    process, or another container, may have by now has to be trusted. Raises CheckpointError.
    """

    def __init__(self, run_dir: str | Path):
        self.run_dir = Path(run_dir)
        self.owner = self.run_dir / ".lock.json"
        self.lock = filelock.FileLock(self.run_dir / ".lock", timeout=0, thread_local=False)

    def __enter__(self) -> Lock:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
            with suppress(OSError):  # only for the message of the next one
                self.owner.write_text(json.dumps(owner), encoding="utf-8")
            _clean(self.run_dir)
        except filelock.Timeout:
            problem = f"{self.run_dir} is in use by {self._other()}: end that, or take another run_name"
            raise CheckpointError(problem) from None
        except OSError as error:
            self.lock.release()
            raise CheckpointError(f"cannot write in {self.run_dir}: {error.strerror or error}") from error
        return self

    def __exit__(self, *_) -> None:
        self.owner.unlink(missing_ok=True)
        self.lock.release()

    def _other(self) -> str:
        try:
            return "process {pid} on {host} since {since}".format(**_read_json(self.owner))
        except (OSError, ValueError, KeyError):
            return "another process"
