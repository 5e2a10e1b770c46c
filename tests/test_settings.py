"""Settings: presets, conversions, refusals, files both ways, where things live, notebooks' parameters, lazy import."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nbformat
import papermill.cli
import pytest

import dsl
from dsl import schema, settings
from dsl.config import ModelConfig
from dsl.settings import ParameterError, Run, SettingsError, preset

ROOT = Path(__file__).resolve().parents[1]


def problems(name="tiny", **flat) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        preset(name, **flat)
    return caught.value.problems


def test_published_presets_have_their_sizes():
    run = preset("linear_moe")
    m, t = run.model, run.train
    assert (m.hidden_size, m.intermediate_size, m.num_hidden_layers, m.max_position_embeddings) == (384, 1024, 12, 512)
    assert (m.num_attention_heads, m.num_key_value_heads, m.head_dim, m.vocab_size) == (6, 2, 64, 50_257)
    assert (m.num_experts, m.num_experts_per_tok, m.capacity_factor, m.balance) == (8, 2, 1.25, "loss_free")
    assert m.moe_layers == tuple(range(12)) and {m.kind(i) for i in range(12)} == {"elu"}
    assert (t.per_device_train_batch_size, t.gradient_accumulation_steps, t.learning_rate) == (16, 4, 1e-4)
    assert (t.weight_decay, t.max_steps, t.warmup_steps, t.lr_scheduler_type) == (0.01, 10_000, 500, "cosine")
    assert (t.save_steps, t.sample_steps, t.logging_steps, t.precision) == (500, 500, 100, "auto")
    assert (run.data.corpus, run.data.tokenizer) == ("cosmopedia", "gpt2")
    run = preset("gqa_moe")
    m, t = run.model, run.train
    assert (m.hidden_size, m.intermediate_size, m.num_hidden_layers, m.max_position_embeddings) == (512, 2048, 8, 512)
    assert (m.num_attention_heads, m.num_key_value_heads, m.vocab_size) == (8, 2, 50_257)
    assert (m.num_experts, m.num_experts_per_tok, m.capacity_factor, m.moe_layers) == (4, 2, 2.0, (2, 4, 6))
    assert {m.kind(i) for i in range(8)} == {"softmax"}
    assert (t.lr_scheduler_type, t.gradient_accumulation_steps) == ("one_cycle", 2)
    assert (run.data.corpus, run.data.fraction) == ("wikitext", 0.01)


def test_own_presets_keep_what_they_are_about():
    hybrid = preset("hybrid").model
    assert [hybrid.kind(i) for i in range(4)] == ["delta", "delta", "delta", "latent"]
    assert (hybrid.num_shared_experts, hybrid.router_score) == (1, "sigmoid")
    assert hybrid.moe_intermediate_size < hybrid.intermediate_size
    quick = preset("quickstart")
    assert quick.model.moe_layers and "linear_attention" in quick.model.layer_types
    assert (quick.data.corpus, quick.train.save_steps) == ("pydocs", 100)


@pytest.mark.parametrize("name", settings.PRESETS)
def test_every_preset_runs_offline_and_survives_yaml_and_json(name):
    run = preset(name, corpus="pydocs")
    assert (run.name, run.data.tokenizer) == (name, preset(name).data.tokenizer)
    assert Run.from_yaml(run.to_yaml()) == Run.from_yaml(run.to_json()) == Run.from_dict(run.to_dict()) == run
    assert settings.PRESETS[name]["about"]


def test_names_are_unique_over_the_sections():
    names = Counter(f for section in schema.SECTIONS.values() for f in section.model_fields)
    assert max(names.values()) == 1
    assert not {"preset", "run_name", "mixer", "name", "config"} & set(names)
    assert all(f.description for section in schema.SECTIONS.values() for f in section.model_fields.values())


@pytest.mark.parametrize(
    ("field", "given", "want"),
    [
        ("max_steps", "1e4", 10_000),
        ("max_steps", 1e4, 10_000),
        ("seed", str(2**53 + 1), 2**53 + 1),
        ("learning_rate", "3e-4", 3e-4),
        ("learning_rate", 1, 1.0),
        ("tie_word_embeddings", "false", False),
        ("qk_norm", "True", True),
        ("stop_at_step", "none", None),
        ("capacity_factor", "None", None),
        ("capacity_factor", None, None),
        ("moe_layers", "0, 1", (0, 1)),
        ("moe_layers", "[1]", (1,)),
        ("moe_layers", ["1"], (1,)),
        ("moe_layers", "all", (0, 1)),
        ("layer_types", "full_attention", ("full_attention",) * 2),
        ("prompts", "one, with a comma", ("one, with a comma",)),
        ("prompts", '["a, b", "c"]', ("a, b", "c")),
    ],
)
def test_text_becomes_what_it_means(field, given, want):
    run = preset("tiny", **{field: given})
    got = getattr(getattr(run, schema.FIELDS[field]), field)
    assert got == want and type(got) is type(want)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_steps", 0),
        ("max_steps", "ten"),
        ("max_steps", 2.5),
        ("max_steps", True),
        ("max_steps", None),
        ("learning_rate", "nan"),
        ("learning_rate", float("inf")),
        ("learning_rate", -1e-3),
        ("learning_rate", False),
        ("decay_share", 1.5),
        ("fraction", 0),
        ("held_out", 1.0),
        ("momentum", 1.0),
        ("seed", -1),
        ("precision", "fp8"),
        ("lr_scheduler_type", "linear"),
        ("tie_word_embeddings", "maybe"),
        ("tokenizer", "bpe:many"),
        ("tokenizer", "bpe:100"),
        ("moe_layers", "0,x"),
        ("moe_layers", [5]),
        ("layer_types", "[full_attention"),
        ("layer_types", "soft"),
        ("num_attention_heads", 5),
        ("num_hidden_layers", 10**10),
        ("num_key_value_heads", 4),
        ("vocab_size", 300),
        ("hidden_size", "wide"),
        ("num_experts_per_tok", 9),
        ("capacity_factor", 0),
        ("column", 3),
    ],
)
def test_refusal_names_field_and_value(field, value):
    lines = problems(**{field: value})
    shown = value if not isinstance(value, list) else tuple(value)
    said = str(shown).strip("()[],") if field in ("moe_layers", "layer_types") else str(shown)
    assert any(field in line and (said.split(",")[-1] in line or value is None) for line in lines), lines


def test_exact_message_says_field_rule_value():
    assert problems(num_key_value_heads=4) == ["num_key_value_heads must divide num_attention_heads=6, got 4"]
    rule = "must be a valid integer, unable to parse string as an integer"
    assert problems(moe_layers="0,x") == [f"moe_layers {rule}, got 'x'"]
    assert problems(warmup_steps=20) == ["warmup_steps must be less than max_steps=20, got 20"]
    assert problems(decay_share=0.5, lr_scheduler_type="wsd", warmup_steps=11) == [
        "warmup_steps must end before the decay, the last 50% of max_steps=20, got 11"
    ]


def test_all_problems_are_told_at_once():
    lines = problems(max_steps=0, learning_rate="x", num_attention_heads=0, fraction=2)
    assert {line.split()[0] for line in lines} >= {"max_steps", "learning_rate", "num_attention_heads", "fraction"}


@pytest.mark.parametrize(
    ("flat", "near"),
    [
        ({"max_stepz": 1}, "max_steps"),
        ({"hiden_size": 1}, "hidden_size"),
        ({"corpus": "pydoc"}, "pydocs"),
        ({"mixer": "elo"}, "elu"),
        ({"linear_attention_kind": "detla"}, "delta"),
        ({"router": "topk"}, "top_k"),
        ({"name": "tinny"}, "tiny"),
    ],
)
def test_unknown_names_get_the_nearest_known_one(flat, near):
    (line,) = problems(**flat)
    assert line.startswith("unknown ") and f"did you mean {near!r}?" in line


def test_a_setting_in_the_wrong_section_and_a_wrong_section_are_refused():
    with pytest.raises(SettingsError, match="unknown setting 'max_steps'"):
        Run.from_dict({"name": "a", "model": {"max_steps": 3}})
    with pytest.raises(SettingsError, match="unknown section 'trian', did you mean 'train'"):
        Run.from_dict({"name": "a", "trian": {}})
    with pytest.raises(SettingsError, match="'train' must hold settings, got 3"):
        Run.from_dict({"name": "a", "train": 3})


def test_one_kind_of_full_attention_is_not_a_linear_one_even_when_mixers_are_loaded():
    assert dsl.attention.MIXERS  # loaded: its registry knows softmax too
    assert problems(linear_attention_kind="softmax")[0].startswith("unknown linear_attention_kind 'softmax'")


@pytest.mark.parametrize("name", ["../up", "", "a/b", ".hidden", "x" * 101, "nul\n", ["a"]])
def test_run_names_are_plain_folder_names(name):
    (line,) = problems(run_name=name)
    assert line.startswith("run_name must be")


def test_a_shorter_run_warms_up_for_the_same_share_and_a_longer_one_as_before():
    assert preset("linear_moe", max_steps=100).train.warmup_steps == 5
    assert preset("linear_moe", max_steps="1e2").train.warmup_steps == 5
    assert preset("linear_moe", max_steps=20_000).train.warmup_steps == 500
    assert preset("quickstart", max_steps=1).train.warmup_steps == 0
    assert preset("linear_moe", max_steps=100, warmup_steps=7).train.warmup_steps == 7
    assert problems("linear_moe", max_steps=100, warmup_steps=500)[0].startswith("warmup_steps must be less")


def test_vocabulary_follows_the_tokenizer_unless_it_is_given():
    assert preset("tiny", tokenizer="gpt2").model.vocab_size == 50_257
    assert preset("tiny", tokenizer="bpe:300").model.vocab_size == 300
    assert preset("tiny", tokenizer="bpe:300", vocab_size=400).model.vocab_size == 400
    assert preset("tiny", tokenizer="some/folder").model.vocab_size == 512


def test_what_is_derived_is_derived_again_when_its_source_changes():
    run = Run.from_yaml(preset("tiny", num_hidden_layers=4).to_yaml()).override(hidden_size=96, num_hidden_layers=6)
    assert run.model.head_dim == 16 and run.model.layer_types[4:] == ("linear_attention", "full_attention")
    assert run.model.moe_layers == tuple(range(6))
    assert preset("tiny", head_dim=32).override(hidden_size=96).model.head_dim == 32


@pytest.mark.parametrize("mixer", ["elu", "delta", "softmax", "latent", "mine.py:Mine"])
def test_mixer_sets_every_layer(mixer):
    model = preset("tiny", mixer=mixer).model
    assert {model.kind(i) for i in range(2)} == {mixer}


def test_a_registered_mixer_and_router_are_known_by_name(monkeypatch):
    monkeypatch.setitem(dsl.attention.MIXERS, "mine", object)
    monkeypatch.setitem(dsl.moe.ROUTERS, "mine", object)
    assert preset("tiny", mixer="mine", router="mine").model.kind(0) == "mine"


def test_a_file_may_start_from_a_preset_and_takes_its_name_from_itself(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("\ufeffpreset: tiny\ntrain:\n  max_steps: 10\n  learning_rate: 3e-4\n", "utf-8")
    run = Run.from_yaml(path)
    assert (run.name, run.train.max_steps, run.train.warmup_steps, run.train.learning_rate) == ("mine", 10, 1, 3e-4)
    assert run.model == preset("tiny").model


def test_the_record_that_training_adds_is_skipped(tmp_path):
    path = tmp_path / "hparams.yaml"
    path.write_text(preset("tiny").to_yaml() + "record:\n  versions: {torch: '2'}\n")
    assert Run.from_yaml(path) == preset("tiny")


def test_sections_may_be_merged_as_yaml_merges_them():
    text = "name: {a: &a {x: 1, y: 1}, b: &b {<<: *a, x: 2}, c: {<<: *b}}"
    assert schema.read_yaml(text)["name"]["c"] == {"x": 2, "y": 1}


BAD = ["a: [1", "- 1", "3", "", "train: {max_steps: 0}", "preset: tinny", "\tx: 1", "name: a\0"]
BAD += ["name: 2026-99-99", "name: !!int x", "[" * 2000, "preset: tiny\npreset: hybrid", "train: {seed: 1, seed: 2}"]


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_a_bad_file_is_named(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        Run.from_yaml(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_file_of_any_name_gives_a_name(tmp_path):
    (tmp_path / "my file.yaml").write_text("preset: tiny")
    assert Run.from_yaml(tmp_path / "my file.yaml").name == "my-file"


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(SettingsError, match="cannot read"):
            Run.from_yaml(path)


def test_home_and_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("DSL_HOME", raising=False)
    monkeypatch.delenv("DSL_CACHE", raising=False)
    assert settings.home() == ROOT
    monkeypatch.setenv("DSL_HOME", str(tmp_path))
    run = preset("tiny", run_name="r")
    assert run.run_dir == tmp_path / "checkpoints" / "r"
    assert run.log_dir == tmp_path / "logs" / "training" / "r"
    assert settings.cache_dir() == tmp_path / ".cache" / "dsl"
    monkeypatch.setenv("DSL_CACHE", str(tmp_path / "c"))
    assert settings.cache_dir() == tmp_path / "c"


def test_find_run(monkeypatch, tmp_path):
    repository, home, cwd = tmp_path / "repo", tmp_path / "home", tmp_path / "cwd"
    for folder in (repository / "checkpoints/demo/step-000300", home / "checkpoints/a/step-000001", cwd / "a"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(settings, "_repository", lambda: repository)
    monkeypatch.setenv("DSL_HOME", str(home))
    monkeypatch.chdir(cwd)
    assert settings.find_run("a") == home / "checkpoints/a"  # a name means a run before a folder that stands here
    assert settings.find_run(cwd / "a") == cwd / "a"
    assert settings.find_run("") is None
    assert settings.find_run("a/step-000001") == home / "checkpoints/a/step-000001"
    assert settings.find_run("demo") == settings.find_run("checkpoints/demo") == repository / "checkpoints/demo"
    assert settings.find_run("nowhere") is None and settings.find_run("owner/name") is None


@pytest.mark.parametrize(("value", "want"), [(None, False), ("", False), ("0", False), ("1", True), ("true", True)])
def test_smoke(monkeypatch, value, want):
    monkeypatch.delenv("DSL_SMOKE", raising=False)
    if value is not None:
        monkeypatch.setenv("DSL_SMOKE", value)
    assert settings.smoke() is want


CELL = "preset = 'tiny'\nrun_name = None\nmixer = None\nmax_steps = None\n"


@pytest.fixture
def notebook(monkeypatch):
    """Runs cells as a kernel would, and then the call."""
    monkeypatch.delenv("DSL_SMOKE", raising=False)
    namespace = {"In": [""]}

    def run(*cells, call=settings.notebook_run, **schema):
        for cell in cells:
            namespace["In"].append(cell)
            exec(cell, namespace)
        return call(namespace, **schema)

    return run


def test_notebook_defaults_are_the_presets(notebook):
    assert notebook(CELL) == preset("tiny")


def test_papermill_may_pass_any_setting(notebook):
    run = notebook(CELL, "# Parameters\nmax_steps = 10\nhidden_size = '96'\nmixer = 'delta'\nrun_name = 2026\n")
    assert run == preset("tiny", max_steps=10, hidden_size=96, mixer="delta", run_name="2026")


def test_papermills_none_means_none_where_a_setting_may_be_none(notebook):
    run = notebook(CELL, "# Parameters\npreset = 'linear_moe'\ncapacity_factor = None\nmax_steps = None\n")
    assert preset("linear_moe").model.capacity_factor == 1.25
    assert run == preset("linear_moe", capacity_factor=None)


def test_a_setting_added_by_hand_counts_and_a_wrong_one_is_refused(notebook):
    assert notebook(CELL + "hidden_size = 96\n").model.hidden_size == 96
    with pytest.raises(ParameterError, match="unknown setting 'max_stepz', did you mean 'max_steps'"):
        notebook(CELL + "max_stepz = 3\n")


def test_a_mistake_that_was_mended_is_forgotten(notebook):
    bad = "# Parameters\nmax_stepz = 5\n"
    for _ in range(2):
        with pytest.raises(ParameterError):
            notebook(CELL, bad)
    assert notebook("# Parameters\nmax_steps = 5\n").train.max_steps == 5


def test_other_cells_are_no_parameters(notebook):
    assert notebook(CELL, "my_guess = 64\n", "x = [i for i in range(3)]\n")


def test_a_cell_that_also_computes_is_a_parameters_cell(notebook):
    cell = CELL.replace("max_steps = None", "max_steps, seed = 2 * 3, len('ab')\nprint('hi')")
    assert notebook(cell) == preset("tiny", max_steps=6, seed=2)


def test_parameter_errors_are_one_line(notebook):
    with pytest.raises(ParameterError) as caught:
        notebook(CELL, "# Parameters\nmax_steps = 0\nlearning_rate = 'x'\npreset = 'tiny'\n")
    assert "max_steps must" in str(caught.value) and "learning_rate must" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value._render_traceback_() == [f"ParameterError: {caught.value}"]


def test_smoke_takes_the_tiny_preset_but_not_from_papermill(notebook, monkeypatch):
    monkeypatch.setenv("DSL_SMOKE", "1")
    assert notebook(CELL.replace("tiny", "quickstart")).name == "tiny"
    assert notebook("# Parameters\npreset = 'hybrid'\n").name == "hybrid"


def test_a_notebooks_own_parameter_is_checked_beside_the_runs(notebook):
    for value in ("None", "'other'", "2026"):
        assert notebook(CELL + f"beside = {value}\n", beside=str | int | None) == preset("tiny")
    with pytest.raises(ParameterError, match=r"beside must be a valid string, got \['a'\]"):
        notebook(CELL + "beside = ['a']\n", beside=str | int | None)


@pytest.mark.parametrize("value", [["a"], 3, {}])
def test_a_preset_that_is_no_name_is_refused_like_an_unknown_one(notebook, value):
    with pytest.raises(ParameterError, match=f"^unknown preset {re.escape(repr(value))}"):
        notebook(CELL, f"# Parameters\npreset = {value!r}\n")


INJECTED = {
    **{"preset": "linear_moe", "run_name": "mine", "mixer": "delta", "corpus": "local:/a folder's/$HOME"},
    **{"capacity_factor": None, "norm_topk_prob": False, "learning_rate": 3e-4, "moe_layers": (0, 2)},
    **{"prompts": ["It's", 'a "b", c'], "hidden_size": "96", "num_attention_heads": 3, "num_key_value_heads": 1},
}


def test_the_papermill_command_gives_the_same_run_when_it_is_typed(notebook):
    """Through the shell's words and papermill's own reading of them."""
    cell = CELL + "beside = None\n"
    run = notebook(cell, "# Parameters\n" + "".join(f"{n} = {v!r}\n" for n, v in INJECTED.items()), beside=str | None)
    text = notebook(call=lambda names: settings.papermill_command(names, "03.ipynb", max_steps=20_000))
    words = shlex.split(text)
    assert words[:3] == ["papermill", "03.ipynb", "out.ipynb"] and set(words[3::3]) == {"-p"}
    typed = {name: papermill.cli._resolve_type(value) for name, value in zip(words[4::3], words[5::3], strict=True)}
    again = notebook(cell, "# Parameters\n" + "".join(f"{n} = {v!r}\n" for n, v in typed.items()), beside=str | None)
    assert again == run.override(max_steps=20_000) and again.name == "mine" and "beside" not in typed


def test_plain_parameters(notebook):
    schema = {"my_guess": int, "full": bool, "lr": float, "run": str | None}
    cell = "my_guess = 64\nfull = False\nlr = 1\nrun = None\n"

    def call(*cells):
        return notebook(cell, *cells, call=settings.parameters, **schema)

    given = call()
    assert (given.my_guess, given.full, given.lr, given.run) == (64, False, 1.0, None)
    given = call("# Parameters\nfull = 'true'\nmy_guess = 1e2\nrun = 'demo'\n")
    assert (given.my_guess, given.full, given.run) == (100, True, "demo")
    for line, said in {
        "my_gues = 1": "unknown setting 'my_gues', did you mean 'my_guess'",
        "my_guess = 'many'": "my_guess must be a valid integer",
        "my_guess = True": "my_guess must be a number, got True",
        "run = 3": "run must be a valid string, got 3",
    }.items():
        with pytest.raises(ParameterError, match=said):
            call(f"# Parameters\n{line}\n")
    with pytest.raises(ParameterError, match="seed is missing"):
        notebook(call=settings.parameters, my_guess=int, seed=int)


@pytest.mark.slow
def test_papermill_refuses_in_one_last_line_before_torch(tmp_path):
    check = (
        "import sys, pathlib, dsl\ntry:\n    run = dsl.settings.notebook_run(globals())\n"
        f"finally:\n    pathlib.Path({str(tmp_path / 'torch')!r}).write_text(str('torch' in sys.modules))\n"
    )
    cells = [nbformat.v4.new_code_cell(CELL, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(check)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL}), tmp_path / "in.ipynb")
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "in.ipynb", "out.ipynb", "-p"]
    how = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True}
    done = subprocess.run([*command, "max_stepz", "5"], **how)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and last == "ParameterError: unknown setting 'max_stepz', did you mean 'max_steps'?"
    assert (tmp_path / "torch").read_text() == "False"


KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_dsl_and_its_settings_load_neither_torch_nor_transformers():
    code = """
import sys, dsl
assert "pydantic" not in sys.modules
assert dsl.preset("tiny").name == "tiny" and dsl.ModelConfig and dsl.settings.home()
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
assert {"preset", "train", "settings"} <= set(dir(dsl))
try: dsl.nothing
except AttributeError as error: print(error)
"""
    assert python(code) == "module 'dsl' has no attribute 'nothing'\n"


def test_every_lazy_name_resolves():
    for name in dsl._HOME:
        assert getattr(dsl, name) is getattr(sys.modules[f"dsl.{dsl._HOME[name]}"], name)


def test_model_config_defaults_agree_with_its_checks():
    assert schema.model_config() == ModelConfig()
    assert set(schema.ModelFields.model_fields) == {f.name for f in dataclasses.fields(ModelConfig)}
