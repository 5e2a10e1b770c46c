"""The model card of a checkpoint: the README.md that the hub and people read beside the weights.

Knows a run's settings and figures; nothing of tensors or files.
"""

from typing import Any

import yaml

from dsl.settings import Run


def model_card(run: Run, state: dict[str, Any], parameters: int) -> str:
    """Markdown under the hub's YAML head, from the settings and the trainer's state at a step."""
    model, data, train = run.model, run.data, run.train
    kinds = {"linear_attention": model.linear_attention_kind, "full_attention": model.full_attention_kind}
    mixers = ", ".join(kinds[kind] for kind in model.layer_types)
    experts = f"{model.num_experts} experts, {model.num_experts_per_tok} a token, in layers {[*model.moe_layers]}"
    bits = state.get("last_bits_per_byte")
    head = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["dsl", "mixture-of-experts"]}
    beyond = "" if "full_attention" in model.layer_types else " in training; generation may go on beyond it"
    sizes = (model.hidden_size, model.num_attention_heads, model.num_key_value_heads)
    rows = {
        "parameters": f"{parameters:,}",
        "mixers, first layer to last": mixers,
        "experts": experts if model.moe_layers else "none",
        "hidden size, heads, key-value heads": ", ".join(map(str, sizes)),
        "window": f"{model.max_position_embeddings} tokens{beyond}",
        "corpus": f"{data.corpus}, fraction {data.fraction:g}",
        "step": f"{state['step']:,} of {train.max_steps:,}",
        "tokens seen": f"{state['tokens']:,}",
        "held-out bits per byte": "not measured" if bits is None else f"{bits:.3f}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
{yaml.safe_dump(head, sort_keys=False)}---

# {run.name}, step {state["step"]}

A small language model of the workbook `dsl`, for learning and experiments. It imitates the form of its corpus; what
it says is not to be relied on.

| | |
|---|---|
{table}

```python
import dsl  # registers the model type
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")  # this folder
tokenizer = AutoTokenizer.from_pretrained(".")
```

`trainer.json` holds every setting of the run, `manifest.json` the checksums of the files.
"""
