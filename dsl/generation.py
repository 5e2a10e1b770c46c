"""One readable loop that turns a prompt into text: for notebooks, the command line, the server and training.

It runs on the core's state, not on the Hugging Face cache, and shows what a reader wants to see of each token. It
knows nothing of batches, files or screens; the filters of the distribution are transformers' own.

Shape letters: V vocabulary, L MoE layers, k experts of a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from threading import Event

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsl.hub import DslForCausalLM

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
class Answer:
    """What the model says after a reading: logits [1, V], the last token's experts ([k] a layer), its state's bytes."""

    logits: Tensor
    experts: list[Tensor]
    state_bytes: int


Steps = Generator[Tensor | Token | None, Answer | None, None]


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


def _check(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed) -> None:
    def number(value, kind, least, most=1.7e308) -> bool:
        return isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most

    above_zero = 5e-324
    problems = [
        f"{name} must {rule}, got {value!r}"
        for name, value, rule, good in (
            ("max_new_tokens", max_new_tokens, "be a positive integer", number(max_new_tokens, Integral, 1)),
            ("temperature", temperature, "be a number from 0 (greedy) up", number(temperature, Real, 0)),
            ("top_k", top_k, "be a positive integer or None", top_k is None or number(top_k, Integral, 1)),
            ("top_p", top_p, "be in (0, 1] or None", top_p is None or number(top_p, Real, above_zero, 1)),
            ("repetition_penalty", repetition_penalty, "be positive", number(repetition_penalty, Real, above_zero)),
            ("seed", seed, "be an integer from 0 or None", seed is None or number(seed, Integral, 0, 2**63 - 1)),
        )
        if not good
    ]
    if problems:
        raise ValueError("\n".join(problems))


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
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: Callable[[], bool] | Event | None = None,
) -> Iterator[Token]:
    """Tokens that continue the prompt: until eos (the last token then), max_new_tokens, the window's end, or `stop`.

    temperature 0 takes the likeliest token and equals `model.generate(do_sample=False)`; a seed makes sampling
    repeatable; an empty prompt starts from bos or eos. Raises ValueError when called, before the first token.
    """
    sampling = (max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    return _alone(model.model, steps(model, tokenizer, prompt, *sampling, stop))


@torch.inference_mode()
def _alone(core, asking: Steps) -> Iterator[Token]:
    state = None
    for tokens in asking:
        hidden, state, stats = core(tokens, state)
        experts = [layer.experts[0, -1] for layer in stats]
        token = asking.send(Answer(core.logits(hidden[:, -1]), experts, sum(layer.num_bytes for layer in state)))
        if token is not None:
            yield token


def steps(
    model,
    tokenizer,
    prompt,
    max_new_tokens,
    temperature=1.0,
    top_k=None,
    top_p=None,
    repetition_penalty=1.0,
    seed=None,
    stop=None,
) -> Steps:
    """The loop of `generate` without the model's calls, so that many may share them.

    It gives, in turn, the tokens [1, T] that the model must read next (the prompt, then one at a time) and, when it is
    sent the `Answer`, the `Token` that was read (None for the prompt). Raises ValueError when called.
    """
    _check(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    if model.training:
        raise ValueError("model must be in eval mode: in training, experts drop what exceeds their capacity")
    ids = _prompt_ids(model, tokenizer, prompt)
    filters = transformers.LogitsProcessorList()
    if repetition_penalty != 1:
        filters.append(transformers.RepetitionPenaltyLogitsProcessor(float(repetition_penalty)))
    chance = None
    if temperature > 0:
        filters.append(transformers.TemperatureLogitsWarper(max(float(temperature), COLDEST)))
        filters += [transformers.TopKLogitsWarper(int(top_k))] if top_k else []
        filters += [transformers.TopPLogitsWarper(float(top_p))] if top_p else []
        chance = torch.Generator(model.device)
        chance.seed() if seed is None else chance.manual_seed(seed)
    return _steps(model, tokenizer, ids, max_new_tokens, filters, chance, getattr(stop, "is_set", stop))


@torch.inference_mode()
def _steps(model, tokenizer, ids, max_new_tokens, filters, chance, stopped) -> Steps:
    text, ends = _Text(tokenizer, ids[-1]), {tokenizer.eos_token_id}
    ends.update(torch.tensor(model.generation_config.eos_token_id or []).flatten().tolist())
    tokens = torch.tensor([ids], device=model.device)
    answer = yield tokens
    yield None
    for position in range(len(ids), min(len(ids) + max_new_tokens, model.config.context_limit or math.inf)):
        if stopped is not None and stopped():
            return
        logits = answer.logits.float()
        if not logits.isfinite().all():
            raise ValueError("logits must be finite, got NaN or infinity: the weights are broken")
        logits[:, len(tokenizer) :] = -math.inf  # the vocabulary may be padded
        scores = filters(tokens, logits).clamp(max=torch.finfo(torch.float32).max)  # of a tiny repetition penalty
        token = scores.argmax(-1) if chance is None else torch.multinomial(scores.softmax(-1)[0], 1, generator=chance)
        tokens, new = torch.cat([tokens, token[None]], 1), token.item()
        answer = yield token[None]
        probabilities = logits[0].softmax(-1)
        best = probabilities.topk(min(RUNNERS_UP + 1, len(tokenizer), len(probabilities)))
        others = [(i, p) for p, i in zip(*map(Tensor.tolist, best), strict=True) if i != new][:RUNNERS_UP]
        yield Token(
            id=new,
            text=text.add(new),
            probability=probabilities[new].item(),
            runners_up=[(i, tokenizer.decode([i]), p) for i, p in others],
            experts=torch.stack(answer.experts).cpu() if answer.experts else torch.empty(0, 0).long(),
            position=position,
            state_bytes=answer.state_bytes,
        )
        if new in ends:
            return


def complete(model: DslForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, **sampling) -> str:
    """The text that `generate` adds to the prompt; the same parameters and errors."""
    return "".join(token.text for token in generate(model, tokenizer, prompt, **sampling))
