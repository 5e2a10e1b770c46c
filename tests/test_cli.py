"""The command line: what it refuses and how, its help, settings from files and flags, every command on a tiny run."""

import io
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dsl import evaluation, hub, report, schema, settings
from dsl.__main__ import main
from dsl.settings import Run, preset

ROOT = Path(__file__).resolve().parents[1]


def refused(capsys, *words: str) -> tuple[int, str]:
    """Exit code and the one line of an error."""
    try:
        code = main(list(words))
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dsl: error: ") and err.count("\n") == 1, (out, err)
    return code, err.removeprefix("dsl: error: ").strip()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "required: COMMAND"),
        ("--json runs", "unknown option '--json'"),
        ("train --config= tiny", "give a PRESET or --config, not both"),
        ("train --config=", "cannot read .: Is a directory"),
        ("generate --import ./mine.py", "--import ./mine.py failed: No module named './mine.py'"),
        ("trian", "unknown command 'trian', did you mean 'train'?"),
        ("train --max-stepz 5", "unknown option '--max-stepz', did you mean --max-steps?"),
        ("train --max-step 5", "unknown option '--max-step', did you mean --max-steps?"),
        ("train --max-steps", "--max-steps: expected one argument"),
        ("train tinny", "unknown preset 'tinny', did you mean 'tiny'?"),
        ("train tiny --max-steps ten", "max_steps must be a valid integer"),
        ("train tiny --max_steps=0 --fraction 2", "got 2"),
        ("train tiny --mixer elo", "unknown mixer 'elo', did you mean 'elu'?"),
        ("train tiny --num-key-value-heads 4", "num_key_value_heads must divide num_attention_heads=6, got 4"),
        ("train tiny --config my.yaml", "give a PRESET or --config, not both"),
        ("train --config missing.yaml", "cannot read missing.yaml: No such file"),
        (
            "generate --temperature hot",
            "temperature must be a valid number, unable to parse string as a number, got 'hot'",
        ),
        ("generate --samples 0", "samples must be at least 1, got 0"),
        ("generate --prompt a --file b", "not allowed with argument --prompt"),
        ("evaluate --learning-rate 1", "unknown option '--learning-rate'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(capsys, words, said):
    code, line = refused(capsys, *words.split())
    assert code == 2 and said in line


def test_a_mistyped_flag_loads_no_torch():
    code = (
        "import sys\nfrom dsl.__main__ import main\n"
        "for words in (['train', '--max-stepz', '5'], ['train', 'tinny'], ['train', 'tiny', '--max-steps', '0']):\n"
        "    try: print(main(words))\n    except SystemExit as end: print(end.code)\n"
        "main(['train', 'tiny', '--print-config'])\n"
        "print({'torch', 'transformers', 'numpy', 'pandas'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[:3] == ["2", "2", "2"] and lines[-1] == "set()", done


def test_python_m_dsl_ends_with_the_exit_code():
    done = subprocess.run([sys.executable, "-m", "dsl", "train", "tinny"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "dsl: error: unknown preset 'tinny', did you mean 'tiny'?\n"


def test_the_installed_command_finds_a_module_that_lies_where_one_stands(tmp_path):
    (tmp_path / "ours.py").touch()
    command = [Path(sys.executable).with_name("dsl"), "generate", "--import", "ours", "--temperature", "hot"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr.startswith("dsl: error: temperature must be"), done.stderr


def test_a_reader_that_leaves_is_no_error():
    pipe = subprocess.Popen(
        [sys.executable, "-m", "dsl", "train", "--print-config"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    pipe.stdout.close()
    assert (pipe.stderr.read(), pipe.wait()) == (b"", 141)
    pipe.stderr.close()


def test_of_many_processes_one_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "tinny"]) == 2
    assert capsys.readouterr().err == ""

    def fail(run):
        error = OSError("disk")
        error.add_note("process 1 of 2 failed first")
        raise error

    monkeypatch.setattr("dsl.training.train", fail)
    assert main(["train", "tiny"]) == 1
    assert capsys.readouterr().err == "dsl: error: disk; process 1 of 2 failed first\n"


@pytest.mark.parametrize("command", ["train", "generate", "test-checkpoint", "evaluate", "runs"])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "--json" in shown
    assert "examples:" in shown or command == "runs"
    if command == "train":
        for section in schema.SECTIONS.values():
            for name, field in section.model_fields.items():
                assert "--" + name.replace("_", "-") in shown
                assert " ".join(field.description.split()[:2]) in " ".join(shown.split()), name
        assert all(name in shown for name in settings.PRESETS)


def test_top_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("train", "generate", "test-checkpoint", "evaluate", "runs"))


def printed(capsys, *words: str) -> Run:
    assert main(["train", *words, "--print-config"]) == 0
    return Run.from_yaml(capsys.readouterr().out)


def test_flags_reach_every_section(capsys):
    words = "tiny --max_steps 1e1 --hidden-size=96 --moe-layers 1 --corpus wikitext --tie-word-embeddings false"
    run = printed(capsys, *words.split(), "--prompts", "a, b", "c", "--run-name", "mine", "--mixer", "delta")
    want = {"max_steps": 10, "hidden_size": 96, "moe_layers": [1], "corpus": "wikitext", "tie_word_embeddings": False}
    assert run == preset("tiny", prompts=("a, b", "c"), run_name="mine", mixer="delta", **want)
    assert printed(capsys, "tiny", "--moe-layers", "0,1").model.moe_layers == (0, 1)
    assert printed(capsys, "tiny", "--moe-layers", "0", "1").model.moe_layers == (0, 1)
    assert printed(capsys).name == "quickstart"


def test_flags_override_the_file(capsys, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("preset: tiny\ntrain: {learning_rate: 1e-2, max_steps: 10}\n")
    run = printed(capsys, "--config", str(path), "--max-steps", "5")
    assert run == preset("tiny", run_name="my", learning_rate=1e-2, max_steps=5, warmup_steps=0)
    assert main(["train", "--config", str(path), "--print-config", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["max_steps"] == 10


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a corpus, in which `dsl train` has made the run `small`."""
    folder, generator = tmp_path_factory.mktemp("home"), random.Random(0)
    words = ["state", "token", "expert", "router", "query", "value"]
    (folder / "texts").mkdir()
    for i in range(40):
        text = "\n\n".join(" ".join(generator.choices(words, k=30)) + "." for _ in range(20))
        (folder / "texts" / f"{i}.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSL_HOME", str(folder))
        options = (
            f"--corpus {folder}/texts --fraction 1 --held-out 0.1 --tokenizer bpe:300 --num-experts 2 --max-steps 8 "
        )
        options += "--save-steps 4 --eval-steps 8 --sample-steps 8 --logging-steps 4 --run-name small"
        assert main(["train", "tiny", *options.split()]) == 0
        yield folder


def result(capsys, *words: str):
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_train_prints_its_summary_and_the_record_repeats_the_run(home, capsys):
    capsys.readouterr()
    record = home / "logs/training/small/hparams.yaml"
    summary = result(capsys, "train", "--config", str(record))
    assert (summary["status"], summary["step"]) == ("complete", 8)


def test_a_record_made_with_other_threads_is_said_before_the_run_begins(home, tmp_path, capsys):
    record = (home / "logs/training/small/hparams.yaml").read_text()
    for threads, said in ((torch.get_num_threads(), False), (77, True)):
        again = tmp_path / "again.yaml"
        again.write_text(
            re.sub("threads: .*", f"threads: {threads}", record.replace("name: small", f"name: of-{threads}"))
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DSL_HOME", str(tmp_path))
            for first in (True, False):
                assert main(["train", "--config", str(again), "--stop-at-step", "1"]) == 0
                err = capsys.readouterr().err
                assert (
                    ("again.yaml was made with 77 threads, this process" in err) == ("OMP" in err) == (said and first)
                )


def test_generate_from_prompt_file_and_stdin(home, capsys, monkeypatch):
    sampling = ["--checkpoint", "small", "--seed", "3", "--max-new-tokens", "8"]
    assert main(["generate", "--prompt", "state é", *sampling]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("state é") and "8 tokens" in err
    (home / "prompt.txt").write_text("state é\n", "utf-8")
    assert main(["generate", "--file", str(home / "prompt.txt"), *sampling]) == 0
    assert capsys.readouterr().out == out
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO("state é\n".encode())))
    assert main(["generate", *sampling]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("prompt", ["--no_cache means that", "--top_k=5\nis", "--an_option", "--a_b=c d", "a --top_k"])
def test_a_prompt_stays_as_it_was_typed(home, capsys, prompt):
    words = ["generate", "--checkpoint", "small", "--max_new_tokens=1", f"--prompt={prompt}"]
    assert result(capsys, *words)["prompt"] == prompt
    if " " in prompt:  # argparse takes a word with a space for no option
        assert result(capsys, *words[:-1], "--prompt", prompt)["prompt"] == prompt


def test_generate_samples_count_their_seeds(home, capsys):
    words = ["generate", "--checkpoint", "small", "--prompt", "state", "--max-new-tokens", "12", "--temperature", "1"]
    given = result(capsys, *words, "--seed", "5", "--samples", "2")
    assert given["prompt"] == "state" and [s["seed"] for s in given["samples"]] == [5, 6]
    assert given["samples"][0]["text"] != given["samples"][1]["text"]
    assert result(capsys, *words, "--seed", "6")["samples"] == given["samples"][1:]
    last = result(capsys, *words, "--seed", str(2**63 - 1), "--samples", "2")["samples"]
    assert [s["seed"] for s in last] == [2**63 - 1, 0]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--prompt", "a", "--checkpoint", "smal"], 1, "did you mean 'small'?"),
        (["--prompt", "a", "--temperature", "-1"], 2, "temperature must be"),
        (["--prompt", "a", "--top-p", "2", "--top-k", "0"], 2, "got 0; top_p must be"),
        (["--prompt", "a " * 100], 1, "max_position_embeddings=64"),
        (["--prompt", "\udcff"], 1, "valid Unicode"),
        (["--file", "missing.txt"], 2, "cannot read missing.txt: No such file"),
        (["--file", "."], 2, "cannot read .: "),
    ],
)
def test_generate_refuses_in_one_line(home, capsys, words, code, said):
    words = words if "--checkpoint" in words else [*words, "--checkpoint", "small"]
    got, line = refused(capsys, "generate", *words)
    assert got == code and said in line


def test_a_prompt_that_is_no_text_or_missing(home, capsys, monkeypatch):
    (home / "latin.txt").write_bytes(b"caf\xe9")
    code, line = refused(capsys, "generate", "--file", str(home / "latin.txt"))
    assert code == 2 and "must hold UTF-8 text" in line
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    assert refused(capsys, "generate") == (2, "prompt is missing: give --prompt, --file, or text on stdin")


def test_a_mixer_of_ones_own_trains_goes_on_and_is_loaded_by_name(home, capsys, tmp_path, monkeypatch):
    """Each command in a process that has not seen the module: forgetting it is the same."""
    (tmp_path / "ours.py").write_text("from dsl.attention import LinearMixer\nclass Mine(LinearMixer): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DSL_HOME", str(tmp_path))
    words = f"--corpus {home}/texts --fraction 1 --held-out 0.1 --tokenizer bpe:300 --warmup-steps 1 --run-name ours"
    for steps in ("2", "4"):
        assert result(capsys, "train", "tiny", "--mixer", "ours:Mine", *words.split(), "--max-steps", steps)[
            "step"
        ] == int(steps)
        del sys.modules["ours"]
    words = ["generate", "--checkpoint", "ours", "--prompt", "state", "--max-new-tokens", "2"]
    code, line = refused(capsys, *words)
    assert code == 1 and "linear_attention_kind='ours:Mine' is code from elsewhere" in line and "--import" in line
    assert "ours" not in sys.modules
    assert result(capsys, *words, "--import", "ours")["samples"][0]["tokens"] == 2
    del sys.modules["ours"]
    assert refused(capsys, *words, "--import", "owrs") == (2, "--import owrs failed: No module named 'owrs'")


def test_evaluate(home, capsys):
    given = result(capsys, "evaluate", "--checkpoint", "checkpoints/small/step-000004")
    assert given["checkpoint"].endswith("step-000004") and 0 < given["bits_per_byte"] < 8
    assert [layer["layer"] for layer in given["layers"]] == [0, 1]
    short = result(capsys, "evaluate", "--checkpoint", "small", "--held-out-bytes", "1e3")
    assert short["held_out_bytes"] == 1000 < given["held_out_bytes"]
    assert refused(capsys, "evaluate", "--checkpoint", "small", "--corpus", "pydoc")[0] == 2


def test_test_checkpoint_says_good_or_bad(home, capsys, tmp_path, monkeypatch):
    assert main(["test-checkpoint", "--checkpoint", "small"]) == 0
    out = capsys.readouterr().out
    assert "verdict: good" in out and all(prompt in out for prompt in settings.TrainConfig().prompts)
    weights = home / "checkpoints/small/step-000008/model.safetensors"
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-100])
        assert main(["test-checkpoint", "--checkpoint", "small", "--json"]) == 1
        given = json.loads(capsys.readouterr().out)
        assert given["verdict"] == "bad" and given["checkpoint"].endswith("step-000004")
        assert "step-000008 is damaged: model.safetensors" in given["problems"][0]
        code, line = refused(capsys, "test-checkpoint", "--checkpoint", str(weights.parent))
        assert code == 1 and "is damaged" in line
        assert result(capsys, "runs")[0]["status"] == "can go on, 1 damaged"
    finally:
        weights.write_bytes(whole)
    model, tokenizer = hub.load("small")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    broken = tmp_path / "broken"
    model.save_pretrained(broken), tokenizer.save_pretrained(broken)
    given = report.examine(str(broken), corpus="pydocs", held_out_bytes=1000)
    assert (
        given["verdict"] == "bad" and "nothing follows" in given["problems"][0] and set(given["texts"].values()) == {""}
    )
    assert any("got nan" in problem for problem in given["problems"])
    model, tokenizer = hub.load("small")
    with torch.no_grad():
        model.model.moe_blocks[0].router.weight.fill_(torch.nan)
    model.save_pretrained(broken)
    problems = report.examine(str(broken), corpus="pydocs", held_out_bytes=1000)["problems"]
    assert any("held-out text cannot be measured: router scores must be finite" in problem for problem in problems)
    monkeypatch.setattr("dsl.evaluation.bits_per_byte", lambda *_: float("nan"))
    monkeypatch.setattr("dsl.generation.complete", lambda *_, **__: " ")
    starved = evaluation.load(torch.tensor([[5.0, 0.0], [3.0, 3.0]]))
    monkeypatch.setattr("dsl.evaluation.routing_load", lambda *_: starved)
    assert main(["test-checkpoint", "--checkpoint", "small"]) == 1
    out = capsys.readouterr().out
    assert "bits_per_byte must be below 8" in out and "nothing follows" in out
    assert "layer 0: experts without tokens, 1" in out and "layer 1: experts" not in out


def test_runs(home, capsys):
    (home / "checkpoints" / "empty").mkdir()
    given = {row["run"]: row for row in result(capsys, "runs")}
    assert given["empty"]["status"] == "no checkpoint" and given["small"]["status"] == "complete"
    assert given["small"]["step"] == given["small"]["max_steps"] == 8 and 0 < given["small"]["bits_per_byte"] < 8
    assert main(["runs"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == list(given["small"]) and len(rows) == 2
    os.environ["DSL_HOME"] += "/nowhere"
    try:
        assert main(["runs"]) == 0
    finally:
        os.environ["DSL_HOME"] = str(home)
    assert capsys.readouterr() == ("", f"no runs in {home}/nowhere/checkpoints: `dsl train` makes one\n")


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("stopped", 0), ("complete", 0), ("interrupted", 130)])
def test_exit_code_of_a_training(monkeypatch, capsys, status, code):
    from dsl import training

    summary = training.Summary(status, 3, 1.0, None, 9, 0, Path("a"), Path("b"))
    monkeypatch.setattr(training, "train", lambda run: summary)
    assert main(["train", "tiny"]) == code


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (OSError("disk"), 1), (ValueError("two\nlines"), 1)]
)
def test_exit_code_of_an_error(monkeypatch, capsys, error, code):
    def fail(run):
        raise error

    monkeypatch.setattr("dsl.training.train", fail)
    assert main(["train", "tiny"]) == code
    said = capsys.readouterr().err
    assert said == ("" if code == 130 else f"dsl: error: {str(error).replace(chr(10), '; ')}\n")


def test_a_bug_shows_where_it_is(monkeypatch):
    def fail(run):
        raise RuntimeError("shapes")

    monkeypatch.setattr("dsl.training.train", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        main(["train", "tiny"])
