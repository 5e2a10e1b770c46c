"""Checkpoints: whole or not at all, whatever happens at whatever moment; damage is refused by name."""

import errno
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import seeded
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from dsl import checkpoint
from dsl.checkpoint import CheckpointError, DiskFullError, Lock, newest, save, steps, verify

logging.disable_progress_bar()
FILES = {
    "README.md", "config.json", "generation_config.json", "manifest.json", "model.safetensors",
    "optimizer.pt", "tokenizer.json", "tokenizer_config.json", "trainer.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def parts():
    """A tied two-tensor model of another library, a tokenizer, and an optimizer's state."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, tie_word_embeddings=True, **sizes))
    words = Tokenizer(models.WordLevel({"a": 0, "<e>": 1}, "a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>")
    optimizer = {"adamw": {"w": {"step": torch.tensor(3.0), "exp_avg": torch.randn(4, 4)}}, "list": [1, "a", None]}
    return {"model": model, "tokenizer": tokenizer, "optimizer": optimizer, "card": "# a card\n"}


def write(run, step, parts, bits=None, **options):
    return save(run, step, trainer={"step": step, "bits_per_byte": bits, "note": "é"}, **parts, **options)


def names(run):
    return sorted(path.name for path in run.iterdir())


def test_a_step_is_a_model_folder_and_more(tmp_path, parts):
    place = write(tmp_path / "runs" / "mine", 500, parts, 2.5)
    assert place == tmp_path / "runs" / "mine" / "step-000500" and verify(place) == []
    assert {path.name for path in place.iterdir()} == FILES
    again = LlamaForCausalLM.from_pretrained(place)
    for name, tensor in parts["model"].state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert PreTrainedTokenizerFast.from_pretrained(place).eos_token == "<e>"
    assert checkpoint.read_trainer(place) == {"step": 500, "bits_per_byte": 2.5, "note": "é"}
    optimizer = checkpoint.read_optimizer(place)
    assert torch.equal(optimizer["adamw"]["w"]["exp_avg"], parts["optimizer"]["adamw"]["w"]["exp_avg"])
    assert optimizer["list"] == [1, "a", None]
    assert "a card" in (place / "README.md").read_text()
    manifest = json.loads((place / "manifest.json").read_text())
    assert set(manifest["files"]) == FILES - {"manifest.json"}
    assert names(place.parent) == ["index.json", "step-000500"]


def test_what_could_not_be_read_back_is_not_saved(tmp_path, parts):
    numpy = pytest.importorskip("numpy")
    for bad in (numpy.zeros(2), numpy.float64(1.0), object(), {1, 2}):
        with pytest.raises(TypeError, match=f"optimizer must hold .* got {type(bad).__name__}"):
            save(tmp_path, 1, **{**parts, "optimizer": {"a": [bad]}}, trainer={})
    with pytest.raises(ValueError, match="JSON"):
        save(tmp_path, 1, **parts, trainer={"loss": float("nan")})
    assert names(tmp_path) == []


def test_newest_takes_the_newest_good_one_and_names_what_it_skipped(tmp_path, parts):
    assert newest(tmp_path / "none") == (None, []) and newest(tmp_path) == (None, [])
    for step in (5, 10, 1_000_000, 20):
        write(tmp_path, step, parts)
    assert steps(tmp_path) == [5, 10, 20, 1_000_000]
    assert newest(tmp_path) == (tmp_path / "step-1000000", [])
    (tmp_path / "step-1000000" / "config.json").unlink()
    (tmp_path / "step-000020" / "trainer.json").write_text("{}")
    (tmp_path / "step-000030").mkdir()
    (tmp_path / "step-000040").write_text("a file")
    best, skipped = newest(tmp_path)
    assert best == tmp_path / "step-000010"
    assert [(path.name, problem) for path, problem in skipped] == [
        ("step-1000000", "config.json: No such file or directory"),
        ("step-000040", "manifest.json: Not a directory"),
        ("step-000030", "manifest.json: No such file or directory"),
        ("step-000020", f"trainer.json: 2 bytes instead of {manifest_size(tmp_path / 'step-000010') + 1}"),
    ]


def test_newest_until_looks_at_no_later_step(tmp_path, parts, monkeypatch):
    for step in (5, 10, 15, 20):
        write(tmp_path, step, parts)
    (tmp_path / "step-000010" / "trainer.json").unlink()
    looked, real = [], verify
    monkeypatch.setattr(checkpoint, "verify", lambda place: looked.append(place.name) or real(place))
    for until, found, seen in ((14, 5, (10, 5)), (15, 15, (15,)), (99, 20, (20,)), (4, None, ())):
        looked.clear()
        assert newest(tmp_path, until)[0] == (found and tmp_path / f"step-{found:06d}")
        assert looked == [f"step-{step:06d}" for step in seen]


def manifest_size(place):
    return json.loads((place / "manifest.json").read_text())["files"]["trainer.json"]["size"] - 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m.update(version=2), "manifest.json: version 2 is unknown, this program knows 1"),
        (lambda m: m["files"].pop("optimizer.pt"), "manifest.json: does not match its own checksum"),
        (lambda m: m.pop("files"), "manifest.json: not a manifest in JSON"),
        (lambda m: reseal(m, "config.json"), "config.json: not in the manifest"),
    ],
)
def test_a_manifest_that_is_not_ours(tmp_path, parts, change, problem):
    path = write(tmp_path, 1, parts) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    assert verify(path.parent) == [problem]


def reseal(manifest, name):
    del manifest["files"][name]
    manifest["sha256"] = checkpoint._seal(manifest["files"])


@pytest.mark.soak
def test_every_file_cut_or_changed_anywhere_is_refused_by_name(tmp_path, parts):
    """At 20 offsets (of a shorter file all) and 20 bits of each file; the step before it is taken."""
    good, place, rng = write(tmp_path, 1, parts), write(tmp_path, 2, parts), random.Random(seeded().initial_seed())
    files = sorted(place.iterdir())
    for path in files:
        whole = path.read_bytes()
        cuts = [0, len(whole) - 1, *rng.sample(range(1, len(whole) - 1), min(18, len(whole) - 2))]
        flips = [rng.randrange(8 * len(whole)) for _ in range(20)]
        damaged = [whole[:cut] for cut in cuts]
        damaged += [whole[: f // 8] + bytes([whole[f // 8] ^ 1 << f % 8]) + whole[f // 8 + 1 :] for f in flips]
        damaged += [whole + b"\0", bytes(len(whole))]
        for data in damaged:
            path.write_bytes(data)
            problems = verify(place)
            assert len(problems) == 1 and problems[0].startswith(f"{path.name}: "), (path.name, problems)
            assert newest(tmp_path) == (good, [(place, problems[0])])
        path.write_bytes(whole)
        assert verify(place) == []
    print(f"{len(files)} files, each cut at {len(cuts)} offsets and with {len(flips)} bits turned over, one at a time")


def test_no_pickle_runs_code(tmp_path, parts):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    place = write(tmp_path, 1, parts)
    path = place / "optimizer.pt"
    for dump in (lambda: torch.save({"a": Evil()}, path), lambda: path.write_bytes(pickle.dumps(Evil(), protocol=2))):
        dump()
        with pytest.raises(CheckpointError, match=r"optimizer\.pt is refused: it holds more than tensors"):
            checkpoint.read_optimizer(place)
    for data in (b"", path.read_bytes()[:50]):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
            checkpoint.read_optimizer(place)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.pt cannot be read"):
        checkpoint.read_optimizer(place)
    (place / "trainer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"trainer\.json cannot be read"):
        checkpoint.read_trainer(place)
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_of_a_gpu_opens_on_a_cpu(tmp_path, parts, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        place = write(tmp_path, 1, parts)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(place / "optimizer.pt", weights_only=True)
    assert checkpoint.read_optimizer(place)["adamw"]["w"]["exp_avg"].device.type == "cpu"


def test_the_package_never_opens_a_pickle_with_code():
    for path in Path(checkpoint.__file__).parent.glob("*.py"):
        text = path.read_text(encoding="utf-8").replace(" ", "")
        assert "weights_only=False" not in text and "pickle.load" not in text, path
        assert text.count("torch.load(") == text.count("weights_only=True"), path


def test_a_bad_folder_in_the_way_is_set_aside(tmp_path, parts):
    for number in (1, 2):
        (write(tmp_path, 7, parts) / "config.json").write_text("damage")
        write(tmp_path, 7, parts)
        assert verify(tmp_path / "step-000007") == [] and steps(tmp_path) == [7]
        assert (tmp_path / f"step-000007.bad-{number}" / "config.json").read_text() == "damage"
    (tmp_path / "step-000008").write_text("a file")
    assert verify(write(tmp_path, 8, parts)) == [] and (tmp_path / "step-000008.bad-1").read_text() == "a file"
    assert checkpoint.set_aside(tmp_path, 8) == tmp_path / "step-000008.old-1"
    assert steps(tmp_path) == [7]


def test_a_good_folder_in_the_way_is_replaced(tmp_path, parts):
    write(tmp_path, 7, parts, 3.0)
    write(tmp_path, 7, parts, 2.0)
    assert checkpoint.read_trainer(tmp_path / "step-000007")["bits_per_byte"] == 2.0
    assert names(tmp_path) == ["index.json", "step-000007"]


def test_rotation_keeps_the_newest_the_best_and_the_last_before_a_decay(tmp_path, parts):
    scores = {1: 3.0, 2: None, 3: 1.5, 4: 2.0, 5: 2.5, 6: None, 7: 2.2}
    for step, bits in scores.items():
        write(tmp_path, step, parts, bits, keep=2, until=2)
    assert steps(tmp_path) == [2, 3, 6, 7]
    index = json.loads((tmp_path / "index.json").read_text())
    assert index == checkpoint.index(tmp_path) == {
        "newest": "step-000007",
        "best": "step-000003",
        "steps": {"step-000002": None, "step-000003": 1.5, "step-000006": None, "step-000007": 2.2},
    }  # fmt: skip
    (tmp_path / "index.json").write_text("nonsense")
    write(tmp_path, 8, parts, keep=1)
    assert steps(tmp_path) == [3, 8]
    write(tmp_path, 9, parts)
    assert steps(tmp_path) == [3, 8, 9]


def test_the_best_is_the_best_of_those_measured_on_the_last_ones_text(tmp_path, parts):
    """Bits per byte of different texts say nothing together; a step that notes no text may be of any."""
    scores, texts = (0.5, 2.0, 1.0, 1.5, 3.0, None), ("a", "b", None, "b", "b", "c")
    for step, (bits, text) in enumerate(zip(scores, texts, strict=True), 1):
        trainer = {"bits_per_byte": bits} | ({"measured_on": [text, 9]} if text else {})
        save(tmp_path, step, trainer=trainer, **parts, keep=3)
    assert checkpoint.index(tmp_path)["best"] == "step-000003" and steps(tmp_path) == [3, 4, 5, 6]
    shutil.rmtree(tmp_path / "step-000003")
    assert checkpoint.index(tmp_path)["best"] == "step-000004"


@pytest.mark.parametrize("refused", ["rename", "rmtree"])
def test_an_old_step_that_cannot_be_deleted_is_a_warning(tmp_path, parts, monkeypatch, caplog, refused):
    for step in (1, 2, 3):
        write(tmp_path, step, parts)

    def do(call, *args, **options):
        if call.__name__ == refused and "step-000002" in f"{getattr(call, '__self__', '')}{args}":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return call(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_do", do)
        place = write(tmp_path, 4, parts, keep=1)
    assert newest(tmp_path) == (place, []) and steps(tmp_path) == ([2, 4] if refused == "rename" else [4])
    assert caplog.messages == [f"{tmp_path / 'step-000002'} cannot be deleted: {os.strerror(errno.EACCES)}"]
    assert json.loads((tmp_path / "index.json").read_text()) == checkpoint.index(tmp_path)
    write(tmp_path, 5, parts, keep=1)
    assert names(tmp_path) == ["index.json", "step-000005"]


def test_the_step_kept_for_a_longer_schedule_is_a_good_one(tmp_path, parts):
    for step in (1, 2, 3):
        write(tmp_path, step, parts)
    (tmp_path / "step-000003" / "config.json").write_text("damage")
    for step in (4, 5):
        write(tmp_path, step, parts, keep=1, until=3)
    assert steps(tmp_path) == [2, 3, 5]


def test_rotation_counts_good_steps_only_and_never_deletes_the_one_just_saved(tmp_path, parts):
    for step in (1, 2, 3):
        write(tmp_path, step, parts)
    (tmp_path / "step-000002" / "config.json").write_text("damage")
    write(tmp_path, 4, parts, keep=3)
    assert steps(tmp_path) == [1, 2, 3, 4]
    write(tmp_path, 5, parts, keep=2)
    assert steps(tmp_path) == [2, 4, 5]
    write(tmp_path, 3, parts, keep=1)  # a run that went back
    assert steps(tmp_path) == [2, 3, 5]


def test_a_step_that_is_a_link_to_another_place_is_rotated_like_others(tmp_path, parts):
    write(tmp_path / "run", 1, parts).rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "step-000001").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "run", 2, parts, keep=2)
    assert steps(tmp_path / "run") == [1, 2]
    write(tmp_path / "run", 3, parts, keep=1)
    assert names(tmp_path / "run") == ["index.json", "step-000003"] and verify(tmp_path / "elsewhere") == []


def test_a_change_after_saving_is_seen_by_rotation_in_the_same_process(tmp_path, parts):
    place = write(tmp_path, 1, parts)
    weights = bytearray((place / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    os.utime(place / "model.safetensors", ns=(0, 0))
    (place / "model.safetensors").write_bytes(weights)
    write(tmp_path, 2, parts, keep=1)
    assert steps(tmp_path) == [1, 2] and checkpoint.index(tmp_path)["steps"] == {"step-000002": None}


def test_too_little_space_is_said_before_anything_is_written(tmp_path, parts, monkeypatch):
    write(tmp_path, 1, parts)
    before = names(tmp_path)
    usage = type("usage", (), {"free": 2_000_000})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", lambda *_: pytest.fail("wrote"))
    with pytest.raises(DiskFullError, match=r"^disk full: need 8\.4 MB, have 2\.0 MB for "):
        write(tmp_path, 2, parts)
    assert names(tmp_path) == before and newest(tmp_path)[0].name == "step-000001"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", sorted(FILES))
def test_a_disk_that_fills_up_while_a_file_is_written(tmp_path, parts, monkeypatch, name):
    """The real libraries write this one file to /dev/full."""
    write(tmp_path, 1, parts)
    before, done = names(tmp_path), []

    def do(call, *args, **options):
        for folder in tmp_path.glob(".step-000002.tmp-*"):
            written = getattr(getattr(call, "__self__", None), "name", None)
            if folder not in done and (name != "manifest.json" or written == name):  # that one is made last
                (folder / name).symlink_to("/dev/full")
                done.append(folder)
        return call(*args, **options)

    monkeypatch.setattr(checkpoint, "_do", do)
    if name == "model.safetensors":  # safetensors replaces a link instead of writing through it
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full_safetensors)
    with pytest.raises(DiskFullError, match=r"^disk full: need "):
        write(tmp_path, 2, parts)
    assert done and names(tmp_path) == before and newest(tmp_path)[0].name == "step-000001"
    monkeypatch.undo()
    write(tmp_path, 2, parts)
    assert newest(tmp_path)[0].name == "step-000002"


def test_a_disk_that_fills_up_under_torch(tmp_path, parts, monkeypatch):
    """torch hides what the file said behind words of its own."""

    class Small(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 700:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr(checkpoint, "open", lambda path, mode: Small(path, mode), raising=False)
    with pytest.raises(DiskFullError, match=r"^disk full: need ") as caught:
        write(tmp_path, 1, parts)
    assert isinstance(caught.value.__cause__, RuntimeError) and names(tmp_path) == []


def full_safetensors(*args, **options):
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO])
def test_what_cannot_be_written_is_one_clear_error(tmp_path, parts, monkeypatch, number):
    write(tmp_path, 1, parts)
    before = names(tmp_path)

    def refuse(self, *_, **__):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(CheckpointError, match=f"^cannot write in {tmp_path}: {os.strerror(number)}$"):
        write(tmp_path, 2, parts)
    assert names(tmp_path) == before


def test_a_file_where_the_run_should_be(tmp_path, parts):
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write in .*run: File exists"):
        write(tmp_path / "run", 1, parts)
    with pytest.raises(CheckpointError, match=r"cannot write in .*run: File exists"), Lock(tmp_path / "run"):
        pass


class Crash(BaseException):
    """The process is gone: nothing that it does afterwards reaches the disk."""


class World:
    """Counts what a save does to the disk, and ends at operation `end`: before it, half-way through it or after it."""

    def __init__(self, end=None, moment="before"):
        self.end, self.moment, self.log, self.synced, self.busy, self.dead = end, moment, [], {}, 0, False

    def __call__(self, call, *args, **options):
        if self.dead:
            raise Crash
        self.log.append(call.__name__)
        self.dead = len(self.log) - 1 == self.end
        if self.dead and self.moment != "after":
            if self.moment == "half":
                self.half(call, args, options)
            raise Crash
        self.busy += 1
        result = call(*args, **options)
        self.busy -= 1
        if call.__name__ == "_sync" and args[0].is_file():
            self.synced[args[0].stat().st_ino] = args[0].read_bytes()
        if self.dead:
            raise Crash
        return result

    @staticmethod
    def half(call, args, options):
        """A write leaves half of what it writes, a removal half of what it removes; nothing else has a half."""
        folder = {"write_text": lambda: call.__self__.parent, "save_pretrained": lambda: args[0]}
        folder = folder.get(call.__name__, lambda: args[0].parent if call.__name__ == "_write_tensors" else None)()
        if call.__name__ == "rmtree":
            for path in sorted(args[0].iterdir())[::2]:
                path.unlink()
        elif folder is not None:
            before = set(folder.iterdir())
            call(*args, **options)
            for path in set(folder.iterdir()) - before:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def cut_power(self, run, old):
        """What was written and not synced is lost: such files are there and empty."""
        for path in run.rglob("*"):
            inode = path.stat().st_ino
            if path.is_file() and inode not in old and self.synced.get(inode) != path.read_bytes():
                path.write_bytes(b"")


def first(run, parts):
    """The first save of a run."""
    return 1


def rotated(run, parts):
    """A save that deletes an older step, neither the newest nor the best."""
    write(run, 1, parts, 1.0)
    write(run, 2, parts, 2.0)
    write(run, 3, parts, 3.0)
    return 4


def in_the_way(run, parts):
    """A bad folder in the way."""
    write(run, 3, parts, 1.0)
    (write(run, 4, parts, 1.0) / "config.json").write_text("{}")
    return 4


def again(run, parts):
    """The only step of the run, a good one, is saved again."""
    write(run, 4, parts, 1.0)
    return 4


def enter(run):
    """What a new process does first."""
    with Lock(run):
        return newest(run)[0]


def damaged(run):
    return {step for step in steps(run) if verify(checkpoint.step_dir(run, step))}


@pytest.fixture
def record(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # whether it was asked for is what counts here

    def use(world):
        monkeypatch.setattr(checkpoint, "_do", world)
        return world

    return use


def test_every_change_to_the_disk_passes_the_one_door(tmp_path, parts, record):
    """Python's own audit events, against what the crash tests below can see."""
    world, seen, rogue = record(World()), [], []

    def hook(event, args):
        changes = event in {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
        if event == "open" and isinstance(args[2], int):
            changes = args[2] & (os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        if changes and seen is not None and str(args[0]).startswith(str(tmp_path)):
            (seen if world.busy else rogue).append((event, args[0]))

    sys.addaudithook(hook)  # stays for ever, so it is told below to look away
    try:
        run = tmp_path / "run"
        in_the_way(run, parts)
        seen.clear()
        rogue.clear()
        write(run, 4, parts, 2.5, keep=1)
        write(run, 4, parts, 2.5, keep=1)
        write(run, 5, parts, 2.0, keep=1)
        assert rogue == [] and len(seen) > 30
    finally:
        seen = None
    assert {"mkdir", "save_pretrained", "write_text", "_write_tensors", "_sync", "rename", "rmtree", "replace"} == {
        *world.log
    }


SLOW = [(scene, moment) for scene in (first, in_the_way, rotated, again) for moment in ("before", "after")]


@pytest.mark.soak
@pytest.mark.parametrize(
    ("scene", "moment"),
    [(rotated, "half"), (again, "half")]
    + [pytest.param(*one, marks=pytest.mark.slow) for one in [(first, "half"), (in_the_way, "half"), *SLOW]],
)
def test_a_crash_at_every_operation_leaves_a_good_step_and_the_next_save_works(tmp_path, parts, record, scene, moment):
    start, run = tmp_path / "start", tmp_path / "run"
    start.mkdir()
    step = scene(start, parts)
    before = newest(start)[0]
    shutil.copytree(start, run)
    whole = record(World())
    write(run, step, parts, 2.5, keep=1)
    for end in range(len(whole.log)):
        shutil.rmtree(run)
        shutil.copytree(start, run)
        old = {path.stat().st_ino for path in run.rglob("*")}
        world = record(World(end, moment))
        with pytest.raises(Crash):
            write(run, step, parts, 2.5, keep=1)
        world.cut_power(run, old)
        record(World())
        found = enter(run)
        assert found or not before, world.log
        assert not before or found.name >= before.name, world.log
        assert not [*run.glob(".step-*")] and damaged(run) <= damaged(start), world.log
        place = write(run, step, parts, 2.5, keep=1)
        assert newest(run) == (place, []) and not [*run.glob(".step-*")], world.log
    print(f"{scene.__name__}, {moment}: {len(whole.log)} crashes")
    assert len(whole.log) >= 20


@pytest.mark.parametrize("scene", [rotated, again])
def test_a_step_has_its_name_for_good_before_an_older_one_goes(tmp_path, parts, monkeypatch, scene):
    step, calls = scene(tmp_path, parts), []

    def do(call, *args, **options):
        calls.append((call.__name__, getattr(call, "__self__", None), *args))
        return call(*args, **options)

    monkeypatch.setattr(checkpoint, "_do", do)
    place = write(tmp_path, step, parts, keep=1)
    calls = [one for one in calls if one[0] in ("rename", "rmtree") or one == ("_sync", None, tmp_path)]
    named = [i for i, one in enumerate(calls) if one[0] == "rename" and one[2] == place]
    gone = [i for i, one in enumerate(calls) if one[0] == "rmtree"]
    assert len(named) == 1 and gone and calls[named[0] + 1] == ("_sync", None, tmp_path)
    assert min(gone) > named[0] + 1


def test_a_leftover_of_a_dead_process_goes_and_of_a_living_one_stays(tmp_path, parts):
    write(tmp_path, 1, parts)
    (tmp_path / ".step-000002.tmp-999999999").mkdir()
    write(tmp_path, 2, parts)
    assert (tmp_path / ".step-000002.tmp-999999999").exists()  # perhaps alive: only who holds the lock knows
    with Lock(tmp_path):
        assert not (tmp_path / ".step-000002.tmp-999999999").exists()
    assert steps(tmp_path) == [1, 2]


CHILD = """
import sys, time
from dsl.checkpoint import Lock
with Lock(sys.argv[1]):
    print("in", flush=True)
    time.sleep(600)
"""


def test_the_lock_names_the_other_process_and_is_free_when_that_is_killed(tmp_path):
    run = tmp_path / "run"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "in\n"
        for _ in range(2):
            with pytest.raises(CheckpointError, match=rf"run is in use by process {child.pid} on \S+ since 20"):
                Lock(run).__enter__()
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        (run / ".step-000001.tmp-1").mkdir()
        with Lock(run):
            assert names(run) == [".lock", ".lock.json"]
            with pytest.raises(CheckpointError, match=rf"in use by process {os.getpid()} on "):
                Lock(run).__enter__()
        with Lock(run):  # free again
            pass
        assert names(run) == [".lock"]
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_an_unreadable_owner_does_not_matter(tmp_path):
    with Lock(tmp_path):
        (tmp_path / ".lock.json").write_text("nonsense")
        with pytest.raises(CheckpointError, match="in use by another process"):
            Lock(tmp_path).__enter__()


SAVER = """
import os, sys
DEPTH = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from dsl import checkpoint
torch.set_num_threads(1)
run, sizes = sys.argv[1], dict(intermediate_size=64, num_hidden_layers=1, num_attention_heads=1)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, **sizes))
words = Tokenizer(models.WordLevel({"a": 0, "<e>": 1}, "a"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>")
def write(step):
    checkpoint.save(run, step, model=model, tokenizer=tokenizer, trainer={"step": step}, optimizer={}, keep=2)
for end in range(1000):  # each child lives one operation longer
    child = os.fork()
    if not child:
        count = 0
        def one_more():
            global count
            count += 1
            if count > end:
                os._exit(9)
        def do(call, *args, **options):
            one_more()
            return call(*args, **options)
        def hook(event, args):
            writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            if (writes or event in DEPTH) and str(args[0]).startswith(run):
                one_more()
        with checkpoint.Lock(run):
            newest, skipped = checkpoint.newest(run)
            assert not skipped, skipped
            step = checkpoint.read_trainer(newest)["step"] + 1 if newest else 1
            checkpoint._do = do
            if sys.argv[2] == "event":
                sys.addaudithook(hook)
            write(step)
            write(step)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(end, code, flush=True)
    if code == 0:
        break
"""


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("what", ["operation", "event"])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_dies_at_every_operation_of_two_saves(tmp_path, what):
    """os._exit in a process of its own each time, all on one run, so that leftovers could add up.

    An event is each file that Python opens to write, each rename, removal and folder, also those inside libraries.
    """
    command = [sys.executable, "-c", SAVER, str(tmp_path), what]
    out = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert out.returncode == 0, out.stderr
    lines = [line.split() for line in out.stdout.splitlines()]
    print(f"{len(lines) - 1} deaths, one at each {what}")
    assert len(lines) > 40 and [code for _, code in lines] == ["9"] * (len(lines) - 1) + ["0"]
    good, skipped = newest(tmp_path)
    assert good and not skipped and not [*tmp_path.glob(".step-*")]
    assert len(steps(tmp_path)) == 2
