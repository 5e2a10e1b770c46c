"""Small shells with random weights and a tokenizer of single bytes: no training, no files, milliseconds."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dsl.hub import DslConfig, DslForCausalLM

FULL = ("full_attention",)
STACKS = {
    "elu": {},
    "delta": {"linear_attention_kind": "delta"},
    "softmax": {"layer_types": FULL, "moe_layers": ()},
    "latent": {"layer_types": FULL, "full_attention_kind": "latent", "num_shared_experts": 1},
    "elu and softmax": {"layer_types": ("linear_attention", *FULL), "tie_word_embeddings": False},
    "delta and latent": {
        "layer_types": ("linear_attention", "linear_attention", *FULL),
        "linear_attention_kind": "delta",
        "full_attention_kind": "latent",
        "moe_layers": (1, 2),
        "router_score": "sigmoid",
    },
}
SIZES = {
    "vocab_size": 257,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_experts": 4,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
}


def shell(**changes) -> DslForCausalLM:
    """A model in eval mode whose matrices and router biases are wide enough that every part speaks up."""
    model = DslForCausalLM(DslConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
        for buffer in model.buffers():
            buffer.normal_(std=0.05)
    return model


def tokens(*shape: int) -> torch.Tensor:
    """Random ids; 0 is the padding."""
    return torch.randint(1, SIZES["vocab_size"], shape)


def bytes_tokenizer(ends: bool = True) -> PreTrainedTokenizerFast:
    """Token 0 is <|endoftext|> (padding and, where a text `ends`, eos), the other 256 are bytes."""
    words = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    engine = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    special = {"pad_token": words[0], **({"eos_token": words[0]} if ends else {})}
    return PreTrainedTokenizerFast(tokenizer_object=engine, padding_side="left", **special)
