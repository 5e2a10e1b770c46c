"""One readable loop that turns a prompt into text: for notebooks, the command line, the server and training.

It runs on the core's state, not on the Hugging Face cache, and shows what a reader wants to see of each token. It
knows nothing of batches, files or screens; the filters of the distribution are transformers' own.

Shape letters: V vocabulary, L MoE layers, k experts of a token.
"""

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from threading import Event

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsl.attention import State
from dsl.hub import DslForCausalLM
from dsl.model import LanguageModel
from dsl.moe import NotFiniteError
from dsl.schema import Sampling

RUNNERS_UP = 5
COLDEST = 1e-6  # temperature: by less, fp32 logits would be divided to infinity


@dataclass(frozen=True)
class Token:
    """One generated token, which the model has already read.

    `text` holds whole characters only, so it may be empty. `probability` and `runners_up` (id, text, probability)
    are the model's own, before temperature and filters. `experts` [L, k] int64 are those that this token visited.
    """

    id: int
    text: str
    probability: float
    runners_up: list[tuple[int, str, float]]
    experts: Tensor
    position: int  # in the sequence, prompt included
    state_bytes: int  # of all layers, this token included


@dataclass(frozen=True)
class Reading:
    """What the model says after a reading: logits [1, V], the last token's experts ([k] a layer), its state's bytes."""

    logits: Tensor
    experts: list[Tensor]
    state_bytes: int


def read(core: LanguageModel, ids: Tensor, state: list[State] | None = None) -> tuple[Reading, list[State]]:
    """Read ids [1, T] after a state."""
    hidden, state, stats = core(ids, state)
    experts = [layer.experts[0, -1] for layer in stats]
    return Reading(core.logits(hidden[:, -1]), experts, sum(layer.num_bytes for layer in state)), state


Turns = Generator[Tensor | Token | None, Reading | None, None]


class _Text:
    """Text of a growing list of ids; a character that wants more bytes waits, and is left out if they never come."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: int):
        self.decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._start(before)

    def _start(self, token: int) -> None:
        # one token of context, for tokenizers that put spaces between words
        self.ids, self.shown = [token], len(self.decode([token]))

    def add(self, token: int) -> str:
        self.ids.append(token)
        text = self.decode(self.ids)
        whole = text.rstrip("\ufffd")  # stands for bytes that are no character, or not yet
        piece, self.shown = whole[self.shown :], max(self.shown, len(whole))
        if whole == text:
            self._start(token)
        return piece


def _chooser(how: Sampling, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """A function from the ids so far [1, T] and the next one's logits [1, V] to the next id [1]."""
    filters, chance = transformers.LogitsProcessorList(), None
    if how.repetition_penalty != 1:
        filters.append(transformers.RepetitionPenaltyLogitsProcessor(how.repetition_penalty))
    if how.temperature > 0:
        filters.append(transformers.TemperatureLogitsWarper(max(how.temperature, COLDEST)))
        filters += [transformers.TopKLogitsWarper(how.top_k)] if how.top_k else []
        filters += [transformers.TopPLogitsWarper(how.top_p)] if how.top_p else []
        chance = torch.Generator(device)
        chance.seed() if how.seed is None else chance.manual_seed(how.seed)

    def choose(ids: Tensor, logits: Tensor) -> Tensor:
        scores = filters(ids, logits).clamp(max=torch.finfo(torch.float32).max)  # of a tiny repetition penalty
        if chance is None:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1)[0], 1, generator=chance)

    return choose


def _prompt_ids(model: DslForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    try:
        prompt.encode()
    except (AttributeError, UnicodeEncodeError):
        raise ValueError(f"prompt must be text in valid Unicode, got {prompt!r:.80}") from None
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = tokenizer(prompt)["input_ids"] or [first]
    if first is None and ids == [first]:
        raise ValueError("prompt must not be empty: the tokenizer has no bos or eos token to start from")
    if max(ids) >= model.config.vocab_size:
        raise ValueError(f"vocab_size={model.config.vocab_size} must cover the tokenizer, got token {max(ids)}")
    limit = model.config.context_limit
    if limit is not None and len(ids) >= limit:
        rule = f"be shorter than max_position_embeddings={limit} tokens in a model with softmax or latent layers"
        raise ValueError(f"prompt must {rule}, got {len(ids)}")
    return ids


def generate(
    model: DslForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    stop: Callable[[], bool] | Event | None = None,
    **sampling,
) -> Iterator[Token]:
    """Tokens that continue the prompt: until eos (the last token then), max_new_tokens, the window's end, or `stop`.

    `sampling` are the fields of `schema.Sampling`; temperature 0 equals `model.generate(do_sample=False)`; an empty
    prompt starts from bos or eos. Raises ValueError when called, before the first token.
    """
    return _read_alone(model.model, turns(model, tokenizer, prompt, stop=stop, **sampling))


@torch.inference_mode()
def _read_alone(core: LanguageModel, asked: Turns) -> Iterator[Token]:
    """The model's calls for one sequence."""
    state = None
    for ids in asked:
        reading, state = read(core, ids, state)
        if (token := asked.send(reading)) is not None:
            yield token


def turns(model, tokenizer, prompt, *, stop=None, **sampling) -> Turns:
    """The loop of `generate` without the model's calls, so that many may share them.

    It gives, in turn, the ids [1, T] that the model must read next (the prompt, then one at a time) and, when it is
    sent the `Reading`, the `Token` that was read (None for the prompt). Raises ValueError when called.
    """
    how = Sampling(**sampling)
    if model.training:
        raise ValueError("model must be in eval mode: in training, experts drop what exceeds their capacity")
    return _turns(model, tokenizer, _prompt_ids(model, tokenizer, prompt), how, getattr(stop, "is_set", stop))


def end_tokens(model: DslForCausalLM, tokenizer: PreTrainedTokenizerBase) -> set[int | None]:
    """The ids that end a text: the tokenizer's end-of-text token, and those of the generation config."""
    more = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])}


@torch.inference_mode()
def _turns(model, tokenizer, ids: list[int], how: Sampling, stopped: Callable[[], bool] | None) -> Turns:
    text, ends = _Text(tokenizer, ids[-1]), end_tokens(model, tokenizer)
    tokens, choose = torch.tensor([ids], device=model.device), _chooser(how, model.device)
    reading = yield tokens
    yield None
    for position in range(len(ids), min(len(ids) + how.max_new_tokens, model.config.context_limit or math.inf)):
        if stopped is not None and stopped():
            return
        logits = reading.logits[:, : len(tokenizer)].float()  # the vocabulary may be padded
        if not logits.isfinite().all():
            raise NotFiniteError("logits must be finite, got NaN or infinity: the weights are broken")
        token = choose(tokens, logits)
        tokens, new = torch.cat([tokens, token[None]], 1), token.item()
        reading = yield token[None]
        probabilities = logits[0].softmax(-1)
        best = probabilities.topk(min(RUNNERS_UP + 1, len(probabilities)))
        others = [(i, p) for p, i in zip(*map(Tensor.tolist, best), strict=True) if i != new][:RUNNERS_UP]
        yield Token(
            id=new,
            text=text.add(new),
            probability=probabilities[new].item(),
            runners_up=[(i, tokenizer.decode([i]), p) for i, p in others],
            experts=torch.stack(reading.experts).cpu() if reading.experts else torch.empty(0, 0).long(),
            position=position,
            state_bytes=reading.state_bytes,
        )
        if new in ends:
            return


def complete(model: DslForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, **sampling) -> str:
    """The text that `generate` adds to the prompt; the same parameters and errors."""
    return "".join(token.text for token in generate(model, tokenizer, prompt, **sampling))
