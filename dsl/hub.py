"""The Hugging Face shell: what transformers needs around the plain core, so that everybody else's tools can use it.

`AutoModelForCausalLM`, `generate`, `pipeline`, safetensors and the hub work on `DslForCausalLM`; its logits are the
core's, bit for bit. No mathematics is here, and nothing of training.

Shape letters: B batch, T new tokens, S past and new tokens, V vocabulary.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging as bars
from transformers.utils.generic import can_return_tuple

from dsl import checkpoint, schema, settings
from dsl.attention import State, check_unbroken
from dsl.checkpoint import CheckpointError
from dsl.config import ModelConfig, check_foreign
from dsl.model import LanguageModel

logger = logging.getLogger(__name__)
# what transformers writes into a config.json or passes when it reads one, beside the properties of its base class
THEIR_NAMES = {"model_type", "auto_map", "quantization_config", "attn_implementation", "experts_implementation"}
_CoreFields = make_dataclass("_CoreFields", [(f.name, f.type, f.default) for f in fields(ModelConfig)])


class DslConfig(PreTrainedConfig, _CoreFields):
    """The fields of `ModelConfig` and the few that generation wants, as transformers keeps them.

    Checked at construction: unknown names, wrong types and broken rules raise ValueError, one line each.
    """

    model_type = "dsl"
    keys_to_ignore_at_inference = ("past_key_values", "router_stats")
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **others):
        for name in others.keys() - THEIR_NAMES:
            if not name.startswith("_") and not isinstance(getattr(PreTrainedConfig, name, None), property):
                raise ValueError(f"unknown setting {name!r}{schema.suggest(name, (f.name for f in fields(self)))}")
        for name, value in self.core().to_dict().items():
            setattr(self, name, value)
        super().__post_init__(**others)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """What transformers makes of a config.json: it may come from anybody, so it runs nobody's code."""
        check_foreign(config_dict)
        return super().from_dict(config_dict, **kwargs)

    def core(self) -> ModelConfig:
        """The checked, frozen config of the core; raises ValueError."""
        return schema.model_config(**{f.name: getattr(self, f.name) for f in fields(ModelConfig)})

    @property
    def context_limit(self) -> int | None:
        """Most tokens of a sequence: the window where a layer is softmax or latent, else None (no limit)."""
        return self.max_position_embeddings if "full_attention" in self.layer_types else None


class StateCache(Cache):
    """The core's list of states on its way through `generate`: rows are reordered and repeated, never cropped."""

    is_croppable = False

    def __init__(self):
        super().__init__(layers=[])
        self.reset()

    def reset(self):
        self.states: list[State] | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.states[0].length if self.states else 0  # padding included

    def batch_select_indices(self, indices: Tensor):
        self.states = [state.rows(indices) for state in self.states]

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats: int):
        first = next(iter(self.states[0].tensors().values()))
        self.batch_select_indices(torch.arange(len(first), device=first.device).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int):
        raise ValueError("a recurrent state cannot be cropped: assisted decoding is not available for this model")


@dataclass
class DslOutput(CausalLMOutputWithPast):
    """transformers' output (loss, logits [B, T, V], past_key_values) and one `RoutingStats` per MoE layer."""

    router_stats: list | None = None


@contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars of transformers, for milliseconds of work: they fill logs and notebooks."""
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


class DslForCausalLM(PreTrainedModel, GenerationMixin):
    """`LanguageModel` as transformers wants it; `.model` is the core, and the head is the core's."""

    config_class = DslConfig
    base_model_prefix = "model"
    accepts_loss_kwargs = False  # our loss is a mean over a call: the Trainer then scales accumulation by itself
    _is_stateful = True  # generate refuses assisted decoding, which takes tokens back
    _no_split_modules = ("Block",)
    _tied_weights_keys: ClassVar = {"model.lm_head.weight": "model.embed_tokens.weight"}
    _fsdp_plan: ClassVar = {"model.embed_tokens": "keep_full_weight", "model.layers.*": "free_full_weight"}
    _ep_plan: ClassVar = {
        "model.layers.*.mlp.experts": "ep_dispatch_experts",
        "model.layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "model.layers.*.mlp.experts.down_proj": "grouped_gemm",
    }

    def __init__(self, config: DslConfig):
        super().__init__(config)
        self.model = LanguageModel(config.core())
        self.post_init()

    def _init_weights(self, module):
        """Nothing to do: the core draws its weights when it is built."""

    def get_output_embeddings(self):
        return self.model.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.model.lm_head = new_embeddings

    @classmethod
    @_no_bars()
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """As transformers', which leaves in a weight that no file has what the memory held: here a ValueError.

        So is a weight that the model has no place for, and one of another shape. `output_loading_info=True` leaves
        the judgement to the caller.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()  # aligned: the last bit of a sum depends on where its numbers lie
        if output_loading_info:
            return model, info
        wrong = {*info["missing_keys"], *info["unexpected_keys"], *(name for name, *_ in info["mismatched_keys"])}
        if wrong:
            raise ValueError(f"{len(wrong)} weights do not fit its config.json, {min(wrong)} among them")
        return model

    @_no_bars()
    def save_pretrained(self, *args, **kwargs):
        super().save_pretrained(*args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        # a private hook of transformers, whose minor version is pinned: its own caches know nothing of our states
        if generation_config.cache_implementation is not None:
            raise ValueError(f"cache_implementation must be None, got {generation_config.cache_implementation!r}")
        if limit := self.config.context_limit:  # the text ends where the window does
            generation_config.max_length = min(generation_config.max_length, limit)
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = StateCache()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_stats: bool = False,
        **others,
    ) -> DslOutput:
        """Logits of input_ids [B, T], read after `past_key_values`, which is updated in place.

        attention_mask [B, S] marks the real tokens. labels [B, T] are input_ids, or -100 where no loss is wanted; the
        loss is cross-entropy plus the routers', padding left out. Raises ValueError for shapes or a length that do not
        fit, and for padding between real tokens where a layer has a convolution.
        """
        if refused := [name for name, value in others.items() if value is not None and value is not False]:
            raise TypeError(f"DslForCausalLM does not take {', '.join(refused)}")
        cache = past_key_values
        if cache is None and (self.config.use_cache and not self.training if use_cache is None else use_cache):
            cache = StateCache()
        if not isinstance(cache, StateCache | None):
            raise TypeError(f"past_key_values must be a StateCache, got {type(cache).__name__}")
        seen, states = (0, None) if cache is None else (cache.get_seq_length(), cache.states)
        keep = None
        if attention_mask is not None:
            if attention_mask.shape != (len(input_ids), seen + input_ids.shape[1]):
                shape = [len(input_ids), seen + input_ids.shape[1]]
                raise ValueError(f"attention_mask must be {shape}, past and new tokens, got {[*attention_mask.shape]}")
            if not attention_mask.all():
                if any(getattr(state, "window", None) is not None for state in states or ()):
                    check_unbroken("attention_mask", attention_mask)
                keep = attention_mask[:, seen:].bool()
                if position_ids is None:
                    position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, seen:]
        if position_ids is not None:
            position_ids = position_ids.expand_as(input_ids)
        hidden, states, stats = self.model(input_ids, states, position_ids, keep)
        if cache is not None:
            cache.states = states
        loss = None
        if labels is not None:
            if labels.shape != input_ids.shape:
                raise ValueError(f"labels must be {[*input_ids.shape]}, like input_ids, got {[*labels.shape]}")
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)
            if keep is not None:  # padding says nothing and is not said
                targets = targets.masked_fill(~(keep & keep.roll(-1, 1)), -100)
            loss = self.model.loss(hidden, targets) + sum(layer.aux_loss + layer.z_loss for layer in stats)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(hidden[:, kept])
        return DslOutput(loss, logits, cache, router_stats=stats if output_router_stats else None)


def _folder(source: str, step: int | None) -> Path | None:
    """The model folder that a run's name, a run's folder or a model folder means; None: perhaps a hub id."""
    place = settings.find_run(source)
    hub_id = source.count("/") == 1 and not source.startswith((".", "/", "~", "checkpoints/"))
    if place is None and hub_id and step is None:
        return None
    if place is None:
        runs = (path.name for path in settings.home().glob("checkpoints/*"))
        raise CheckpointError(f"no run or folder {source!r}{schema.suggest(source, runs)}")
    if step is not None and not (place := checkpoint.step_dir(place, step)).is_dir():
        raise CheckpointError(f"{place} does not exist, steps there: {checkpoint.steps(place.parent)}")
    if not (place / "config.json").exists():
        newest, bad = checkpoint.newest(place)
        problems = "; ".join(f"{path.name} ({problem})" for path, problem in bad)
        if newest is None:
            raise CheckpointError(f"{place} holds no good checkpoint: {problems or 'nothing is there'}")
        if bad:
            logger.warning("skipped %s", problems)
        return newest
    if problems := checkpoint.verify(place) if (place / "manifest.json").exists() else []:
        raise CheckpointError(f"{place} is damaged: {'; '.join(problems)}")
    return place


def _silent(name: str) -> bool:
    """Whether the hub does not answer at all: asked once, since its library would try for half a minute."""
    try:
        HfApi().model_info(name, timeout=10)
    except (HTTPError, ConnectionError) as error:
        return not isinstance(error, HfHubHTTPError)  # that is an answer, which the library explains
    return False


def load(source: str | Path, step: int | None = None) -> tuple[DslForCausalLM, transformers.PreTrainedTokenizerBase]:
    """The model, in eval mode, and tokenizer of a run (its newest good step, or `step`), a model folder or a hub id.

    Weights come in fp32, whatever they are kept in. Raises CheckpointError in one sentence: nothing there, damaged,
    incomplete, or a model of another type.
    """
    place, part = _folder(str(source), step), "config"
    try:
        with _no_bars():
            local = {"local_files_only": place is not None or _silent(str(source))}
            place = place or source
            config = AutoConfig.from_pretrained(place, **local)
            if not isinstance(config, DslConfig):
                raise ValueError(f"its model_type is {config.model_type!r}, not 'dsl'")
            part, options = "weights", {"dtype": torch.float32, "ignore_mismatched_sizes": True, **local}
            model = DslForCausalLM.from_pretrained(place, config=config, **options)
            part = "tokenizer"
            return model, transformers.AutoTokenizer.from_pretrained(place, **local)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"cannot load the {part} of {place or source}: {reason}") from error


AutoConfig.register("dsl", DslConfig, exist_ok=True)  # `dsl` itself may have named it
AutoModelForCausalLM.register(DslConfig, DslForCausalLM)
