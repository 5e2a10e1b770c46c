"""Plausible bugs, one at a time: does the suite see each of them?

`python tests/breaks.py` breaks a copy of the package in a temporary folder, runs a few tests of the repository against
it and says which breaks went unseen; names of files choose some (`python tests/breaks.py moe serving`). About ten
seconds a break.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Break:
    file: str  # of dsl, without .py
    bug: str
    old: str
    new: str
    tests: str  # what must go red: the name of a test file, and a -k expression

    def apply(self, package: Path) -> None:
        """Break a copy of the package; raises ValueError unless the text that changes stands there once."""
        path = package / f"{self.file}.py"
        text = path.read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.old!r} must stand once in {self.file}.py, found {count} times")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


BREAKS = [
    Break(
        "ops",
        "a token does not see itself within its chunk",
        "causal, chunks = q.new_ones(C, C).tril()",
        "causal, chunks = q.new_ones(C, C).tril(-1)",
        "test_ops every_form_of_linear_attention",
    ),
    Break(
        "ops",
        "the decay counts from the wrong end of a chunk",
        "k * pairwise[..., -1, :, None]",
        "k * seen",
        "test_ops every_form_of_the_delta_rule",
    ),
    Break(
        "ops",
        "rotary positions mirror instead of turning",
        "b * cos + a * sin",
        "b * cos - a * sin",
        "test_ops feature_maps_and_rotary",
    ),
    Break(
        "attention",
        "padding is remembered: a feature map of zero is not zero",
        "k = k * keep[..., None, None]",
        "k = k * 1",
        "test_model left_padding",
    ),
    Break(
        "attention",
        "scores are scaled by the width of the model",
        "_softmax(q, k, v, keep, c.head_dim**-0.5)",
        "_softmax(q, k, v, keep, c.hidden_size**-0.5)",
        "test_attention mixers_equal_the_formulas",
    ),
    Break(
        "moe",
        "the balancing bias weighs, and does not only choose",
        "weights = scores.gather(-1, experts)",
        "weights = choice.gather(-1, experts)",
        "test_moe choice_of_experts",
    ),
    Break(
        "moe",
        "the bias feeds the busy expert",
        "torch.sign(counts.mean(-1, keepdim=True) - counts)",
        "torch.sign(counts - counts.mean(-1, keepdim=True))",
        "test_moe loss_free_update",
    ),
    Break(
        "data",
        "characters are counted for bytes",
        "sum(len(text.encode()) for text in texts)",
        "sum(len(text) for text in texts)",
        "test_data held_out_rows",
    ),
    Break(
        "checkpoint",
        "a file of the right size is a good file",
        'elif sha256(place / name) != expected["sha256"]:',
        "elif False:",
        "test_checkpoint cut_or_changed_anywhere",
    ),
    Break(
        "checkpoint",
        "rotation deletes the best step",
        ', now["best"], *early[-1:]}',
        ", *early[-1:]}",
        "test_checkpoint rotation_keeps",
    ),
    Break(
        "gradients",
        "micro-batches weigh alike, however many labels they score",
        "share = (targets != IGNORE).sum().item() / scored",
        "share = 1 / len(parts) / processes.world",
        "test_gradients accumulation",
    ),
    Break(
        "training",
        "a run that goes on has forgotten its moments",
        "self.optimizer.load_state_dict(checkpoint.read_optimizer(start.path))",
        "checkpoint.read_optimizer(start.path)",
        "test_resume stopped_around",
    ),
    Break(
        "training",
        "what is not finite is trained on",
        "good = bool((self.norm + total[0]).isfinite())",
        "good = bool(total[0].isfinite())",
        "test_training batch_that_is_not_finite",
    ),
    Break(
        "evaluation",
        "padding counts as text",
        "* int((labels != IGNORE).sum())",
        "* labels.numel()",
        "test_lens losses_of_tokens",
    ),
    Break(
        "generation",
        "half a character is shown",
        r'whole = text.rstrip("\ufffd")',
        "whole = text",
        "test_generation whole_characters",
    ),
    Break(
        "generation",
        "ids that the tokenizer lacks are drawn",
        "reading.logits[:, : len(tokenizer)].float()",
        "reading.logits.float()",
        "test_generation tokenizer_lacks",
    ),
    Break(
        "batching",
        "all rows read at the position of the first",
        "torch.tensor(self.lengths, device=tokens.device)[:, None]",
        "torch.tensor(self.lengths[:1] * len(self.lengths), device=tokens.device)[:, None]",
        "test_batching together_as_alone",
    ),
    Break(
        "serving",
        "any key opens",
        "not hmac.compare_digest(given, self.wanted)",
        'not given.startswith(b"Bearer ")',
        "test_serving a_key",
    ),
    Break(
        "serving",
        "a body in pieces has no bound",
        'size += len(message.get("body", b""))',
        'size = len(message.get("body", b""))',
        "test_serving large_body",
    ),
    Break(
        "answers",
        "the model goes on for a client that has left",
        "            pass\n        self.job.stop.set()",
        "            pass",
        "test_serving client_that_leaves",
    ),
    Break(
        "engine",
        "a batch that breaks ends the thread",
        "*(job for job in self.batches.pop(batch) if job in asked)",
        "*self.batches[None]",
        "test_serving batch_that_breaks",
    ),
    Break(
        "hub",
        "a checkpoint may name code to run",
        "check_foreign(config_dict)",
        "pass",
        "test_hub runs_no_code",
    ),
]


def run(package: Path, selections: list[str]) -> tuple[int, str]:
    """pytest's exit code and output on the repository's tests with the `dsl` that lies in `package`."""
    files = {f"tests/{selection.split()[0]}.py" for selection in selections}
    names = " or ".join(selection.split(maxsplit=1)[1] for selection in selections)
    code = "import sys, pytest, dsl; sys.exit(pytest.main(sys.argv[1:]))"  # dsl first, before a conftest finds another
    command = [sys.executable, "-P", "-c", code, "-q", "-x", "-p", "no:cacheprovider", *sorted(files), "-k", names]
    environment = os.environ | {"PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def copy(folder: str) -> Path:
    return Path(shutil.copytree(ROOT / "dsl", Path(folder, "dsl"), ignore=shutil.ignore_patterns("__pycache__")))


def unseen(breaks: list[Break]) -> list[str]:
    """A line for each break that its tests do not see, by an assertion or an error of theirs."""
    with tempfile.TemporaryDirectory() as folder:
        code, output = run(copy(folder), [one.tests for one in breaks])
    if code != 0:
        return [f"the tests must pass before anything is broken:\n{output[-3000:]}"]
    found = []
    for one in breaks:
        with tempfile.TemporaryDirectory() as folder:
            package = copy(folder)
            one.apply(package)
            code, output = run(package, [one.tests])
        print(f"{'caught' if code == 1 else 'NOT CAUGHT'}  {one.file}: {one.bug}", flush=True)
        if code != 1:  # 0: all passed; 2 and more: there was nothing to run
            found.append(f"{one.file}: {one.bug} ({one.tests}: exit code {code})\n{output[-1000:] if code else ''}")
    return found


if __name__ == "__main__":
    problems = unseen([one for one in BREAKS if one.file in sys.argv[1:] or not sys.argv[1:]])
    print(*problems, sep="\n")
    sys.exit(bool(problems))
