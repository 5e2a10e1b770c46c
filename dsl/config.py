"""What a model is: its sizes and choices, checked once, here.

Knows nothing of tensors, training or files, and imports only the standard library, so that a mistyped
setting is refused before torch is loaded. Field names are those of the Hugging Face ecosystem.
"""

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

LayerType = Literal["linear_attention", "full_attention"]


def _of(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of a `LanguageModel`; frozen, validated at construction.

    A pattern in `layer_types` repeats until it has `num_hidden_layers` entries; `moe_layers="all"` becomes the
    tuple of all layers. A kind or router may be a built-in name, a registered name, or "module:Class".
    Raises ValueError with one line per broken rule: the field, the rule, the value.
    """

    vocab_size: int = _of(4096, "entries of the vocabulary")
    hidden_size: int = _of(192, "width of the residual stream")
    intermediate_size: int = _of(512, "inner width of a dense SwiGLU")
    num_hidden_layers: int = _of(4, "blocks")
    num_attention_heads: int = _of(6, "query heads")
    num_key_value_heads: int = _of(2, "key-value heads; must divide the query heads")
    head_dim: int | None = _of(None, "width of a head; None: hidden_size / num_attention_heads")
    max_position_embeddings: int = _of(512, "training window, and the limit of softmax and latent layers")
    layer_types: tuple[LayerType, ...] = _of(("linear_attention",), "one per layer, or a pattern that repeats")
    linear_attention_kind: str = _of("elu", "elu | delta | a registered mixer")
    full_attention_kind: str = _of("softmax", "softmax | latent | a registered mixer")
    feature_map: Literal["elu", "dpfp", "taylor"] = _of("elu", "of queries and keys in the elu mixer")
    normalize: bool = _of(True, "divide linear attention by its key sum; False: RMSNorm of the output")
    linear_conv_kernel_dim: int = _of(4, "width of the short causal convolution of linear layers; 0: none")
    qk_norm: bool = _of(True, "RMSNorm of queries and keys in softmax attention")
    rope_theta: float = _of(10_000.0, "base of the rotary frequencies")
    kv_lora_rank: int = _of(64, "width of the latent that latent attention caches")
    q_lora_rank: int | None = _of(None, "width of the query latent; None: full queries")
    qk_nope_head_dim: int | None = _of(None, "latent attention, part without positions; None: head_dim")
    qk_rope_head_dim: int | None = _of(None, "latent attention, rotary part; None: half of head_dim, even")
    v_head_dim: int | None = _of(None, "latent attention, width of values; None: head_dim")
    moe_layers: tuple[int, ...] | Literal["all"] = _of("all", "0-based layers with experts; the rest are dense")
    num_experts: int = _of(8, "routed experts of a layer")
    num_experts_per_tok: int = _of(2, "experts that a token visits (k)")
    moe_intermediate_size: int | None = _of(None, "inner width of an expert; None: intermediate_size")
    num_shared_experts: int = _of(0, "experts that every token visits")
    router: str = _of("top_k", "top_k | a registered router")
    router_score: Literal["softmax", "sigmoid"] = _of("softmax", "from router logits to scores")
    capacity_factor: float | None = _of(None, "room of an expert over its fair share, in training; None: no drops")
    balance: Literal["loss_free", "aux_loss", "none"] = _of("loss_free", "how the load is kept even")
    bias_update_speed: float = _of(1e-3, "step of the loss-free bias")
    aux_loss_coef: float = _of(1e-2, "weight of the auxiliary loss (balance=aux_loss)")
    aux_loss_scope: Literal["batch", "sequence"] = _of("batch", "over what the auxiliary loss counts the load")
    router_z_loss_coef: float = _of(0.0, "weight of the squared logsumexp of router logits")
    n_group: int = _of(1, "groups of experts (DeepSeek-V3)")
    topk_group: int = _of(1, "groups that a token may use")
    norm_topk_prob: bool = _of(True, "gate weights of the chosen experts sum to one")
    routed_scaling_factor: float = _of(1.0, "factor on the gate weights")
    rms_norm_eps: float = _of(1e-6, "added to the mean square in every RMSNorm")
    initializer_range: float = _of(0.02, "standard deviation of fresh matrices")
    tie_word_embeddings: bool = _of(True, "one matrix for embedding and head")

    def __post_init__(self) -> None:
        head_dim = self.hidden_size // self.num_attention_heads if self.num_attention_heads > 0 else 0
        self._fill(head_dim=head_dim, moe_intermediate_size=self.intermediate_size)
        rotary = max(2, self.head_dim // 4 * 2)
        self._fill(qk_nope_head_dim=self.head_dim, qk_rope_head_dim=rotary, v_head_dim=self.head_dim)
        layers, pattern = max(self.num_hidden_layers, 0), tuple(self.layer_types)
        object.__setattr__(self, "layer_types", (pattern * layers)[:layers] if pattern else ())
        moe = tuple(range(layers)) if self.moe_layers == "all" else self.moe_layers
        object.__setattr__(self, "moe_layers", tuple(moe))
        if problems := self._problems(pattern):
            raise ValueError("\n".join(problems))

    def _fill(self, **values: int) -> None:
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def _problems(self, pattern: tuple[str, ...]) -> list[str]:
        problems = []

        def rule(ok: bool, name: str, text: str, value: Any = None) -> None:
            if not ok:
                problems.append(f"{name} must {text}, got {getattr(self, name) if value is None else value!r}")

        positive = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim max_position_embeddings rope_theta kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
            "num_experts num_experts_per_tok moe_intermediate_size n_group topk_group routed_scaling_factor "
            "rms_norm_eps initializer_range"
        )
        for name in positive.split():
            rule(getattr(self, name) > 0, name, "be positive")
        natural = "linear_conv_kernel_dim num_shared_experts bias_update_speed aux_loss_coef router_z_loss_coef"
        for name in natural.split():
            rule(getattr(self, name) >= 0, name, "not be negative")
        for name in ("capacity_factor", "q_lora_rank"):
            rule(getattr(self, name) is None or getattr(self, name) > 0, name, "be positive or None")
        for name, choices in CHOICES.items():
            for value in pattern if name == "layer_types" else (getattr(self, name),):
                rule(value in choices, name, f"be one of {', '.join(choices)}", value)
        rule(len(pattern) > 0, "layer_types", "name at least one layer")
        layers, heads, experts = self.num_hidden_layers, self.num_attention_heads, self.num_experts
        few = len(pattern) <= max(layers, 1)
        rule(few, "layer_types", f"have at most num_hidden_layers={layers} entries")
        if (shared := self.num_key_value_heads) > 0:
            rule(heads % shared == 0, "num_key_value_heads", f"divide num_attention_heads={heads}")
        rule(self.head_dim % 2 == 0, "head_dim", "be even (rotary positions turn pairs)")
        rule(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "be even (rotary positions turn pairs)")
        inside = all(isinstance(i, int) and 0 <= i < layers for i in self.moe_layers)
        unique = len(set(self.moe_layers)) == len(self.moe_layers)
        rule(inside and unique, "moe_layers", f"be distinct layers from 0 to {layers - 1}")
        if min(experts, self.num_experts_per_tok, self.n_group, self.topk_group) > 0:
            groups, usable = self.n_group, self.topk_group
            rule(experts % groups == 0, "n_group", f"divide num_experts={experts}")
            rule(usable <= groups, "topk_group", f"be at most n_group={groups}")
            room = experts // groups * min(usable, groups)
            text = f"be at most {room}, the experts in reach (num_experts={experts}, groups {usable} of {groups})"
            rule(self.num_experts_per_tok <= room, "num_experts_per_tok", text)
            rule(groups == 1 or experts // groups >= 2, "n_group", "leave two experts or more in a group")
        return problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values, patterns expanded; `ModelConfig(**config.to_dict()) == config`."""
        values = dataclasses.asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    def kind(self, layer: int) -> str:
        """Name of the mixer of one layer: "elu", "delta", "softmax", "latent" or a registered one."""
        linear = self.layer_types[layer] == "linear_attention"
        return self.linear_attention_kind if linear else self.full_attention_kind


HINTS = get_type_hints(ModelConfig)  # field -> type
CHOICES = {name: get_args(hint) for name, hint in HINTS.items() if get_origin(hint) is Literal}
CHOICES["layer_types"] = get_args(LayerType)


def check_foreign(values: Mapping[str, Any]) -> None:
    """For settings that a file brought: raises ValueError where they name a "module:Class" that nobody has imported."""
    for name in ("linear_attention_kind", "full_attention_kind", "router"):
        module, colon, _ = str(values.get(name)).partition(":")
        if colon and module not in sys.modules:
            rule = f"import {module!r} first, if you trust it, with `import` or --import"
            raise ValueError(f"{name}={values[name]!r} is code from elsewhere: {rule}")


def import_own(module: str) -> ModuleType:
    """A module of the user's own, also one in the current folder, where the installed command does not look."""
    if module.startswith("."):
        raise ImportError(f"No module named {module!r}")
    if "" not in sys.path:
        sys.path.append("")
    return importlib.import_module(module)


class Registry(dict[str, type]):
    """Classes by the name that a config may use; "module:Class" names the reader's own, imported on demand."""

    def __init__(self, field_name: str, builtin: Mapping[str, type]):
        super().__init__(builtin)
        self.field_name, self.builtin = field_name, frozenset(builtin)

    def register(self, name: str, cls: type) -> None:
        """Make `cls` usable as `name`; a second call replaces the first. Raises ValueError for a built-in name."""
        if name in self.builtin or ":" in name or not isinstance(cls, type):
            raise ValueError(f"{self.field_name} must get a new name and a class, got {name!r} and {cls!r}")
        self[name] = cls

    def resolve(self, name: str) -> type:
        """The class of a name, which the caller trusts: its module is run. Raises ValueError with the known names."""
        module, _, attribute = name.partition(":")
        if module and attribute:
            try:
                found = getattr(import_own(module), attribute)
            except (ImportError, AttributeError) as error:
                raise ValueError(f"{self.field_name}={name!r} cannot be imported: {error}") from error
            if not (isinstance(found, type) and issubclass(found, sys.modules["torch"].nn.Module)):
                raise ValueError(f"{self.field_name}={name!r} must be a subclass of torch.nn.Module")
            return found
        if name not in self:
            raise ValueError(f"{self.field_name} must be one of {', '.join(self)} or 'module:Class', got {name!r}")
        return self[name]
