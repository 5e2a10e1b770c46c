"""Other people's tools on a trained run's step folder, unmodified: lm_eval, and the hub's reading of the model card.

transformers' own tools are in test_hub.py, OpenAI's client in test_serving.py, Gradio's in test_web.py.
"""

import json
import math

import pytest
import runs
import torch
from huggingface_hub import ModelCard
from runs import cache, home  # noqa: F401

from dsl import checkpoint
from dsl.hub import load


@pytest.fixture
def step(home):  # noqa: F811
    """The last step folder of a small run."""
    run = runs.make(max_steps=4, save_steps=4, eval_steps=4, sample_steps=4)
    runs.training.train(run, progress=False)
    return checkpoint.step_dir(run.run_dir, 4)


@pytest.mark.slow
def test_each_step_folder_has_a_card_that_the_hub_reads(step):
    text = (step / "README.md").read_text("utf-8")
    card = ModelCard(text)
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    parameters = sum(p.numel() for p in load(step)[0].parameters())
    state = checkpoint.read_trainer(step)
    assert f"| parameters | {parameters:,} |" in text and "step | 4 of 4" in text
    assert f"| held-out bits per byte | {state['bits_per_byte']:.3f} |" in text
    assert str(step.parent) not in text and checkpoint.verify(step) == []


TASKS = {
    "choice": """task: dsl_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/items.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
""",
    "rolling": """task: dsl_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/items.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
    "until": """task: dsl_until
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/items.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "x"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lm_eval(step, tmp_path, monkeypatch):
    """Three kinds of task of the evaluation harness; its bits per byte are those of the model's own logits."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    items = [
        {"question": "Return a new list", "choices": [" of names", " qqqq"], "answer": 0},
        {"question": "Raise an error", "choices": [" if", " zz"], "answer": 0},
    ]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    for name, text in TASKS.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text.replace("FOLDER", str(tmp_path)))
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    model = HFLM(pretrained=str(step), device="cpu", batch_size=2, dtype="float32")
    tasks = ["dsl_choice", "dsl_rolling", "dsl_until"]
    results = lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0)["results"]
    assert 0 <= results["dsl_choice"]["acc,none"] <= 1 and "exact_match,none" in results["dsl_until"]

    shell, tokenizer = load(step)
    nats, size = 0.0, 0
    for item in items:
        ids = tokenizer(item["question"])["input_ids"]
        logits = shell(torch.tensor([[tokenizer.eos_token_id, *ids]])).logits[0, :-1].log_softmax(-1)
        nats -= logits[range(len(ids)), ids].sum().item()
        size += len(item["question"].encode())
    assert results["dsl_rolling"]["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
