"""The Hugging Face shell: its numbers are the core's, and everybody else's tools run on it unchanged."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, seeded
from safetensors import safe_open
from tiny import SIZES, STACKS, bytes_tokenizer, shell, tokens
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, TextIteratorStreamer, pipeline

from dsl import checkpoint
from dsl.checkpoint import CheckpointError
from dsl.config import ModelConfig
from dsl.hub import DslConfig, DslForCausalLM, StateCache, load
from dsl.model import LanguageModel


@pytest.fixture(params=STACKS, ids=list(STACKS))
def model(request):
    seeded()
    return shell(**STACKS[request.param])


@pytest.fixture(params=["elu", "softmax", "elu and softmax", "delta and latent"])
def exact(request):
    """Every kind of state in fp64, where rounding flips neither a router's choice nor a greedy one."""
    seeded()
    return shell(**STACKS[request.param]).double()


def test_config_is_the_core_config_and_survives_its_file(tmp_path):
    config = DslConfig(**SIZES | {"layer_types": ["linear_attention", "full_attention"], "moe_layers": [1]})
    assert config.layer_types == ["linear_attention", "full_attention", "linear_attention"]
    assert config.core() == ModelConfig(
        **{name: value for name, value in SIZES.items() if name != "pad_token_id"},
        layer_types=("linear_attention", "full_attention"),
        moe_layers=(1,),
    )
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert type(read) is DslConfig and read.core() == config.core() and read.to_diff_dict() == config.to_diff_dict()
    assert DslConfig().core() == ModelConfig()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"num_expert": 4}, r"unknown setting 'num_expert', did you mean 'num_experts'\?"),
        ({"hiden_size": 4}, r"unknown setting 'hiden_size', did you mean 'hidden_size'\?"),
        ({"temperature": 0.5}, "unknown setting 'temperature'"),
        ({"num_key_value_heads": 4}, "num_key_value_heads must divide num_attention_heads=6, got 4"),
        ({"layer_types": ["sliding_attention"]}, "layer_types must .*linear_attention"),
        ({"hidden_size": "wide"}, "hidden_size must be .*integer.*got 'wide'"),
        ({"normalize": 7}, "normalize must be .*boolean.* got 7"),
        ({"linear_attention_kind": "delt"}, r"unknown linear_attention_kind 'delt', did you mean 'delta'\?"),
    ],
)
def test_config_is_checked_when_it_is_made(wrong, message):
    with pytest.raises(ValueError, match=message):
        DslConfig(**{**SIZES, **wrong})


def test_config_takes_what_transformers_adds():
    config = DslConfig(
        num_labels=3, dtype="bfloat16", name_or_path="there", attn_implementation="sdpa", _commit_hash="1"
    )
    assert config.dtype is torch.bfloat16 and config.name_or_path == "there"


def test_a_config_changed_afterwards_is_checked_before_it_builds_a_model():
    config = DslConfig(**SIZES)
    config.num_key_value_heads = 4
    with pytest.raises(ValueError, match="num_key_value_heads must divide"):
        AutoModelForCausalLM.from_config(config)


@torch.no_grad()
def test_shell_is_the_core_bit_for_bit(model):
    ids = tokens(2, 33)
    want = model.model.logits(model.model(ids)[0])
    assert torch.equal(model(ids).logits, want)
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits, want)
    for keep, rows in ((3, [30, 31, 32]), (torch.tensor([4, 8]), [4, 8])):  # fewer rows may be added in another order
        torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, want[:, rows], atol=1e-5, rtol=1e-5)


def test_fresh_weights_are_the_core_s():
    for tied in (True, False):
        config = DslConfig(**SIZES, tie_word_embeddings=tied)
        torch.manual_seed(3)
        core = LanguageModel(config.core())
        torch.manual_seed(3)
        ours = AutoModelForCausalLM.from_config(config)
        assert all(torch.equal(value, core.state_dict()[name]) for name, value in ours.model.state_dict().items())
        assert (ours.model.lm_head.weight is ours.model.embed_tokens.weight) == tied


@torch.no_grad()
def test_saved_and_opened_again_it_is_bit_equal(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids, tied = tokens(2, 20), model.config.tie_word_embeddings
    assert not again.training and torch.equal(again(ids).logits, model(ids).logits)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in again.parameters()), "as a fresh model's lie"
    assert (again.model.lm_head.weight is again.model.embed_tokens.weight) == tied
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("model.lm_head.weight" in file.keys()) == (not tied)  # noqa: SIM118
        assert set(file.keys()) | {"model.lm_head.weight"} == set(model.state_dict())


def test_weights_that_no_file_has_are_refused(tmp_path):
    shell(balance="none").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"3 weights do not fit its config.json, .*e_score_correction_bias among them"):
        AutoModelForCausalLM.from_pretrained(tmp_path, balance="loss_free")


def test_router_bias_stays_in_fp32(tmp_path):
    seeded()
    model, name = shell(), "model.layers.0.mlp.router.e_score_correction_bias"
    model.save_pretrained(tmp_path / "a")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    for one in (half, again):
        assert torch.equal(one.state_dict()[name], model.state_dict()[name])
        assert one.model.norm.weight.dtype is torch.bfloat16
        assert one(tokens(1, 5)).logits.isfinite().all()
    assert (
        AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16).state_dict()[name].dtype is torch.float32
    )


def test_loss_is_cross_entropy_and_what_the_routers_add():
    seeded()
    extra = {"balance": "aux_loss", "aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
    model, ids = shell(**extra).train(), tokens(2, 20)
    labels = ids.clone()
    labels[0, :7] = -100
    out = model(ids, labels=labels, output_router_stats=True)
    assert len(out.router_stats) == 3 and out.past_key_values is None
    routers = sum(layer.aux_loss + layer.z_loss for layer in out.router_stats)
    words = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close("loss", out.loss, words + routers)
    assert routers > 0.5 and model(ids).router_stats is None
    out.loss.backward()
    assert model.model.layers[0].mlp.router.weight.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_in_no_loss(exact, side):
    ids, pad = tokens(1, 8), (3, 0) if side == "left" else (0, 3)
    mask = F.pad(torch.ones_like(ids), pad)
    assert_close(
        "loss", exact(F.pad(ids, pad), attention_mask=mask, labels=F.pad(ids, pad)).loss, exact(ids, labels=ids).loss
    )


@torch.no_grad()
def test_cached_equals_uncached(exact):
    ids = tokens(2, 40)
    whole = exact(ids).logits
    for ends in ([9, 10, 11, 12, 40], [1, 2, 39, 40], [25, 40]):
        cache, parts, start = StateCache(), [], 0
        for end in ends:
            out = exact(ids[:, start:end], past_key_values=cache)
            assert out.past_key_values is cache and cache.get_seq_length() == end
            parts, start = [*parts, out.logits], end
        assert_close(f"chunks {ends}", torch.cat(parts, 1), whole, 1e-10)


@torch.no_grad()
def test_generate_is_the_same_with_and_without_cache(exact):
    penalty = {"repetition_penalty": 50.0}  # or random weights may say one token for ever
    ids, steps = tokens(2, 9), {"max_new_tokens": 9, **penalty}
    greedy = exact.generate(ids, do_sample=False, **steps)
    assert torch.equal(greedy, exact.generate(ids, do_sample=False, use_cache=False, **steps))
    assert len(set(greedy[0, 9:].tolist())) > 3
    beams = exact.generate(ids, do_sample=False, num_beams=3, num_return_sequences=2, **steps)
    assert torch.equal(beams, exact.generate(ids, num_beams=3, num_return_sequences=2, use_cache=False, **steps))
    assert exact.generate(ids, do_sample=True, num_return_sequences=3, top_k=5, **steps).shape == (6, 18)
    assert torch.equal(greedy, exact.generate(ids, do_sample=False, prefill_chunk_size=4, **steps))
    cache = StateCache()
    half = exact.generate(ids, do_sample=False, past_key_values=cache, max_new_tokens=5, **penalty)
    all_real = torch.ones_like(half)  # generate would take a generated 0 for padding
    more = {"attention_mask": all_real, "past_key_values": cache, "max_new_tokens": 4, **penalty}
    assert torch.equal(greedy, exact.generate(half, do_sample=False, **more))


@torch.no_grad()
def test_left_padded_batch_equals_single_prompts(exact):
    prompts = [tokens(1, n) for n in (3, 12, 7)]
    ids = torch.cat([F.pad(p, (12 - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([F.pad(torch.ones_like(p), (12 - p.shape[1], 0)) for p in prompts])
    how = {"max_new_tokens": 10, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    batch = exact.generate(ids, attention_mask=mask, **how)
    for row, prompt in enumerate(prompts):
        alone = exact.generate(prompt, attention_mask=torch.ones_like(prompt), **how)
        assert_close(f"row {row}", torch.stack(batch.logits)[:, row], torch.stack(alone.logits)[:, 0], 1e-10)
        assert batch.sequences[row, 12:].tolist() == alone.sequences[0, prompt.shape[1] :].tolist()
    plain = exact.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, use_cache=False)
    assert torch.equal(plain, batch.sequences)


@torch.no_grad()
def test_padding_before_later_tokens_is_skipped_or_refused(exact):
    ids, mask = tokens(1, 9), torch.tensor([[1] * 5 + [0] * 3 + [1]])
    cache = exact(ids[:, :8], attention_mask=mask[:, :8]).past_key_values
    if "linear_attention" in exact.config.layer_types:
        with pytest.raises(ValueError, match=r"attention_mask must mark one unbroken .* got a gap in rows \[0\]"):
            exact(ids[:, 8:], attention_mask=mask, past_key_values=cache)
    else:
        got = exact(ids[:, 8:], attention_mask=mask, past_key_values=cache).logits
        assert_close("logits", got, exact(ids[mask.bool()][None]).logits[:, -1:], 1e-10)


@torch.no_grad()
def test_positions_count_real_tokens_only():
    model, seen = shell(layer_types=["full_attention"]), []
    model.model.layers[0].mixer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2].tolist()))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    cache = model(tokens(2, 4), attention_mask=mask[:, :4]).past_key_values
    model(tokens(2, 1), attention_mask=mask, past_key_values=cache)
    assert seen == [[[0, 0, 0, 1], [0, 1, 2, 3]], [[2], [4]]]


@torch.no_grad()
def test_rows_of_the_cache_repeat_and_are_selected(exact):
    ids = tokens(3, 10)
    cache = exact(ids[:, :9]).past_key_values
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    rows = [2, 2, 0, 0]
    got = exact(ids[rows, 9:], past_key_values=cache).logits
    assert_close("picked rows", got, exact(ids[rows]).logits[:, 9:], 1e-10)
    cache.reset()
    assert cache.get_seq_length() == 0


def test_what_a_state_cannot_do_is_refused():
    model, ids = shell(), tokens(1, 6)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=4)
    with pytest.raises(ValueError, match="cannot be cropped"):
        model(ids).past_key_values.crop(-1)
    with pytest.raises(ValueError, match="cache_implementation must be None, got 'static'"):
        model.generate(ids, cache_implementation="static", max_new_tokens=4)
    with pytest.raises(TypeError, match="past_key_values must be a StateCache, got DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"attention_mask must be \[1, 6\].* got \[1, 4\]"):
        model(ids, attention_mask=ids[:, :4])
    with pytest.raises(ValueError, match=r"labels must be \[1, 6\], like input_ids, got \[1, 4\]"):
        model(ids, labels=ids[:, :4])
    with pytest.raises(TypeError, match="does not take inputs_embeds"):
        model(ids, inputs_embeds=torch.zeros(1, 6, 48))
    with pytest.raises(ValueError, match="DslForCausalLM does not support"):
        model.activation_checkpointing_enable()


def test_the_window_ends_a_text_where_a_layer_has_one():
    ids = tokens(1, 90)
    for changes, length in (({"layer_types": ["full_attention"]}, 96), ({}, 110)):
        assert shell(**changes).generate(ids, max_new_tokens=20, do_sample=False).shape == (1, length)
    with pytest.raises(ValueError, match=r"max_position_embeddings=96 .*got 97"):
        shell(layer_types=["full_attention"])(tokens(1, 97))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A home with one run, `small`, of two steps."""
    monkeypatch.setenv("DSL_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for step in (100, 200):
        parts = {"model": shell(bos_token_id=step // 100), "tokenizer": bytes_tokenizer()}
        checkpoint.save(tmp_path / "checkpoints/small", step, trainer={"step": step}, optimizer={}, **parts)
    return tmp_path / "checkpoints"


def step_of(source, step=None):
    model, tokenizer = load(source, step)
    assert not model.training and len(tokenizer) == 257 and model(tokens(1, 4)).logits.isfinite().all()
    return model.config.bos_token_id * 100


def test_load_finds_a_run_a_step_and_a_folder(runs, tmp_path, capfd):
    assert [step_of(name) for name in ("small", "checkpoints/small", runs / "small")] == [200] * 3
    assert step_of("small", step=100) == step_of(runs / "small/step-000100") == 100
    shell(bos_token_id=7).save_pretrained(tmp_path / "bare")
    bytes_tokenizer().save_pretrained(tmp_path / "bare")
    assert step_of(tmp_path / "bare") == 700
    assert capfd.readouterr().err == ""  # no progress bars, no warnings


def test_load_skips_a_damaged_step_and_names_it(runs, caplog):
    os.truncate(runs / "small/step-000200/model.safetensors", 1000)
    assert step_of("small") == 100
    assert "skipped step-000200 (model.safetensors: 1000 bytes instead of" in caplog.text
    with pytest.raises(CheckpointError, match=r"step-000200 is damaged: model.safetensors: 1000 bytes"):
        load("small", 200)
    os.truncate(runs / "small/step-000100/model.safetensors", 0)
    with pytest.raises(CheckpointError, match=r"small holds no good checkpoint: step-000200 .*; step-000100 \("):
        load("small")


def change(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "prepare, source, message",
    [
        (lambda at: None, "smal", r"no run or folder 'smal', did you mean 'small'\?"),
        (lambda at: None, "checkpoints/none", "no run or folder 'checkpoints/none'"),
        (lambda at: None, "./none", r"no run or folder './none'"),
        (lambda at: (at / "empty").mkdir(), "empty", "empty holds no good checkpoint: nothing is there"),
        (lambda at: None, "somebody/something", "cannot load the config of somebody/something: "),
        (lambda at: change(at / "bare", model_type="gpt2"), "bare", "config of .*bare: its model_type is 'gpt2', not"),
        (lambda at: change(at / "bare", num_expert=2), "bare", r"unknown setting 'num_expert', did you mean 'num_exp"),
        (lambda at: (at / "bare/config.json").write_text("{"), "bare", "config of .*bare: .*not a valid JSON"),
        (lambda at: change(at / "bare", moe_layers=[0]), "bare", "weights of .*bare: 6 weights do not fit its"),
        (lambda at: change(at / "bare", hidden_size=96), "bare", "weights of .*bare: .* do not fit its config.json"),
        (lambda at: os.truncate(at / "bare/model.safetensors", 5000), "bare", "cannot load the weights of .*bare: "),
        (lambda at: (at / "bare/model.safetensors").unlink(), "bare", "weights of .*bare: .*no file named model.safe"),
        (lambda at: (at / "bare/tokenizer.json").unlink(), "bare", "cannot load the tokenizer of .*bare: "),
    ],
)
def test_load_says_in_one_sentence_what_is_wrong(tmp_path, monkeypatch, prepare, source, message):
    monkeypatch.setenv("DSL_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    runs = tmp_path / "checkpoints"
    for name in ("bare", "small/step-000001"):
        shell(num_hidden_layers=2).save_pretrained(runs / name)
        bytes_tokenizer().save_pretrained(runs / name)
    prepare(runs)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(source)
    print(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A model folder, also as a repository of the hub's cache, that names code which tells when it is run."""
    (tmp_path / "evilmod.py").write_text("raise SystemExit('code of a checkpoint was run')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = tmp_path / "cache/models--somebody--something/snapshots" / ("0" * 40)
    for folder in (tmp_path / "bare", snapshot):
        shell(num_hidden_layers=2).save_pretrained(folder)
        bytes_tokenizer().save_pretrained(folder)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    return [tmp_path / "bare", snapshot]


@pytest.mark.parametrize("name", ["linear_attention_kind", "full_attention_kind", "router"])
def test_a_checkpoint_runs_no_code_that_the_reader_has_not_imported(foreign, name):
    assert not load("somebody/something")[0].training
    for folder in foreign:
        change(folder, **{name: "evilmod:f"})
    said = f"{name}='evilmod:f' is code from elsewhere: import 'evilmod' first"
    for source in (foreign[0], "somebody/something"):
        with pytest.raises(CheckpointError, match=f"cannot load the config of .*: {said}"):
            load(source)
        for opened in (AutoConfig, AutoModelForCausalLM, DslForCausalLM):
            with pytest.raises(ValueError, match=said):
                opened.from_pretrained(source)


@pytest.mark.parametrize("name", ["os:system", "subprocess:Popen", "functools:partial"])
def test_what_is_no_module_of_torch_is_no_mixer(foreign, name):
    change(foreign[0], linear_attention_kind=name)
    with pytest.raises(CheckpointError, match=f"'{name}' must be a subclass of torch.nn.Module"):
        load(foreign[0])


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    asked = []

    def connect(self, address):
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("socket.socket.connect", connect)
    with pytest.raises(CheckpointError, match="cannot load the config of somebody/something: "):
        load("somebody/something")
    assert len(asked) == 1


def test_an_error_without_words_is_named(runs, monkeypatch):
    def fail(*_, **__):
        raise OSError

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(CheckpointError, match=r"cannot load the config of .*: OSError$"):
        load("small")


def test_a_hub_id_has_no_steps(foreign):
    with pytest.raises(CheckpointError, match="no run or folder 'somebody/something'"):
        load("somebody/something", 3)


def test_load_names_the_steps_there_are(runs):
    with pytest.raises(CheckpointError, match=r"step-000150 does not exist, steps there: \[100, 200\]"):
        load("small", 150)


def test_pipeline_and_streamer(model, tmp_path):
    tokenizer = bytes_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    writer = pipeline("text-generation", model=str(tmp_path))
    texts = writer(["def f", "class Model:"], max_new_tokens=8, do_sample=False, batch_size=2)
    ids = tokenizer("def f", return_tensors="pt")
    want = model.generate(**ids, max_new_tokens=8, do_sample=False)[0]
    assert texts[0][0]["generated_text"] == tokenizer.decode(want, skip_special_tokens=True)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=300)
    arguments = {**ids, "max_new_tokens": 8, "do_sample": False, "streamer": streamer}
    worker = threading.Thread(target=model.generate, kwargs=arguments)
    worker.start()
    assert "".join(streamer) == tokenizer.decode(want[5:])
    worker.join()


def test_embeddings_can_be_resized(model):
    model.resize_token_embeddings(260)
    assert model(tokens(1, 5)).logits.shape == (1, 5, 260) and model.config.core().vocab_size == 260


def test_plans_of_distribution_name_what_is_there(caplog):
    model = shell()
    names = {name.replace(".0", ".*") for name, _ in [*model.named_modules(), *model.named_parameters()]}
    assert model.ep_plan and model.fsdp_plan and not (model.ep_plan.keys() | model.fsdp_plan.keys()) - names


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import dsl, transformers",
        "from transformers import AutoModelForCausalLM; import dsl",
        "import dsl; import transformers.models.auto.image_processing_auto",  # another module of the package first
    ],
)
def test_auto_classes_know_us_after_import_dsl(imports, tmp_path):
    shell().save_pretrained(tmp_path)
    code = f"""
import sys
{imports}
import transformers
assert "dsl.hub" not in sys.modules
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
print(type(model).__name__, type(transformers.AutoConfig.from_pretrained({str(tmp_path)!r})).__name__)
print(type(transformers.AutoModelForCausalLM.from_config(dsl.DslConfig(num_hidden_layers=1))).__name__)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["DslForCausalLM", "DslConfig", "DslForCausalLM"]


@pytest.mark.slow
def test_fsdp_and_expert_parallelism_give_the_gradients_of_one_process(tmp_path):
    pytest.importorskip("accelerate", reason="transformers shards models with `pip install accelerate`")
    worker = Path(__file__).with_name("parallel_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", worker, tmp_path]
    paths = os.pathsep.join([str(worker.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    want = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    for name in ("fsdp", "ep"):
        got = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        assert all(torch.equal(got[key], value) for key, value in want.items())
