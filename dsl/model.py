"""The language model: embedding, pre-norm blocks of a mixer and a feed-forward part, head and loss.

A plain `nn.Module` that knows nothing of tokenizers, training or the Hugging Face classes around it.
Shape letters: B batch, T time, D hidden size, V vocabulary, L MoE layers, E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsl.attention import MIXERS, RMSNorm, State
from dsl.config import ModelConfig
from dsl.moe import Experts, MoE, RoutingStats, SwiGLU, TopKRouter


class Block(nn.Module):
    """x + mixer(norm(x)), then x + experts or dense SwiGLU of norm(x)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = MIXERS.resolve(config.kind(layer))(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        sparse = layer in config.moe_layers
        self.mlp = MoE(config, layer) if sparse else SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, state: State | None, positions: Tensor, keep: Tensor | None):
        y, state = self.mixer(self.input_layernorm(x), state, positions, keep)
        x = x + y
        y = self.post_attention_layernorm(x)
        y, stats = self.mlp(y, keep) if isinstance(self.mlp, MoE) else (self.mlp(y), None)
        return x + y, state, stats


class LanguageModel(nn.Module):
    """A causal language model; initialised here, with the global torch generator."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialise()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @torch.no_grad()
    def _initialise(self) -> None:
        """Normal matrices; those that write into the residual stream are smaller by sqrt(2 layers), as in GPT-2."""
        std, depth = self.config.initializer_range, (2 * self.config.num_hidden_layers) ** 0.5
        for name, module in self.named_modules():
            writes = name.endswith(("o_proj", "down_proj"))
            if isinstance(module, nn.Linear | nn.Embedding | TopKRouter):
                nn.init.normal_(module.weight, std=std / depth if writes else std)
            elif isinstance(module, Experts):
                nn.init.normal_(module.gate_up_proj, std=std)
                nn.init.normal_(module.down_proj, std=std / depth)

    def forward(
        self,
        tokens: Tensor,
        state: list[State] | None = None,
        positions: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, list[State], list[RoutingStats]]:
        """tokens [B, T] int64 -> (hidden [B, T, D], one state a layer, one RoutingStats an MoE layer).

        `state` continues an earlier call; `positions` [B, T] default to the steps since the state began; `keep`
        [B, T] marks real tokens (None: all). Raises ValueError past max_position_embeddings in a model with
        softmax or latent layers, and where the state is of another model.
        """
        c, T = self.config, tokens.shape[1]
        if state is not None and len(state) != len(self.layers):
            raise ValueError(f"state must have one entry for each of {len(self.layers)} layers, got {len(state)}")
        start = state[0].length if state else 0
        if "full_attention" in c.layer_types and start + T > c.max_position_embeddings:
            limit = f"max_position_embeddings={c.max_position_embeddings} in a model with softmax or latent layers"
            raise ValueError(f"prompt and new tokens must fit {limit}, got {start + T} tokens")
        if positions is None:
            positions = torch.arange(start, start + T, device=tokens.device).expand_as(tokens)
        x, after, stats = self.embed_tokens(tokens), [], []
        for layer, past in zip(self.layers, state or [None] * len(self.layers), strict=True):
            x, past, routing = layer(x, past, positions, keep)
            after.append(past)
            stats += [routing] if routing is not None else []
        return self.norm(x), after, stats

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return self.lm_head(hidden)

    def loss(self, hidden: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats of labels [B, T] (already shifted; -100: not counted), in fp32 or better.

        "mean" and "sum" never hold all logits: they are made, used and dropped 128 rows at a time. "none" gives [B, T].
        """
        rows, labels_flat = hidden.flatten(0, -2), labels.flatten()
        with torch.autocast(hidden.device.type, enabled=False):
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            rows, weight = rows.to(dtype), self.lm_head.weight.to(dtype)
            if reduction == "none":
                return F.cross_entropy(rows @ weight.mT, labels_flat, reduction="none").view_as(labels)
            return F.linear_cross_entropy(rows, weight, labels_flat, reduction=reduction, options=_LOSS_CHUNKS)

    @property
    def moe_blocks(self) -> list[MoE]:
        """The MoE parts in the order of `stats`."""
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoE)]

    def update_router_biases(self, counts: Tensor) -> None:
        """One loss-free balancing step: counts [L, E] of a whole optimizer step; nothing for other balancing."""
        for block, count in zip(self.moe_blocks, counts, strict=True):
            block.update_bias(count)


# The automatic chunking of torch 2.13 is many times slower on a CPU.
_LOSS_CHUNKS = nn.LinearCrossEntropyOptions(acc_policy="compact", chunking_method=None, batch_chunk_size=128)
