"""What else would fit, and what it would give: other batches, budgets and prompts around a plan. Pure.

Each answer to "what if" is a plan of its own, made and predicted as the first one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from djinn.errors import PlanError, UnavailableError
from djinn.planning.placement import Plan
from djinn.planning.prediction import Prediction
from djinn.planning.request import Request
from djinn.planning.workspace import Workload, largest

MORE_BYTES = 10**9
"""How much more budget :attr:`Forecast.more` has."""


_BUDGETS = 32


_MOST_BATCH = 2**16


MOST_TOKENS = 2**24


PlanFor = Callable[[int, Workload], Plan]


PredictFor = Callable[[Plan, Workload], Prediction]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A plan of another budget or batch, and how fast it would be."""

    budget: int
    batch: int
    plan: Plan
    predicted: Prediction


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a forecast is of, beside the plan."""

    request: Request
    gpus: int
    """That hold the model together; the plan is that of one of them."""
    whole_bytes: int
    """Of the model that they hold together."""
    arena_bytes: int
    """The most host memory that streamed weights may take, of all GPUs together."""
    threads: int
    """Of the host, that multiply where that was asked for and nobody has measured what they do."""
    without_cores: Plan | None
    """The plan without the host's cores, where they were asked for."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A plan and what follows from it. What needs rates that are not known is None or empty."""

    plan: Plan
    asked: Asked
    work: Workload
    predicted: Prediction | None
    unknown: str
    """Why nothing is predicted, or not every choice; empty where all is."""
    without_cores: Prediction | None
    """Of the plan without the host's cores, where they were asked for."""
    batches: tuple[Choice, ...]
    """Batches of 1, 2, 4 and so on, as far as they fit the budget."""
    budgets: tuple[Choice, ...]
    """From the smallest budget that works to the one in which everything is resident, the chosen one among them."""
    more: Choice | None
    """With one more GB of budget."""
    largest_batch: int
    """Sequences that fit at once, each of this prompt."""
    longest_prompt: int
    """Tokens that fit this batch, new tokens beside them; no more than the model was made for."""

    @property
    def gain_s(self) -> float | None:
        """Seconds per token that one more GB of budget saves."""
        if self.more is None or self.predicted is None:
            return None
        return self.predicted.token_s - self.more.predicted.token_s


def outlook(
    chosen: Plan,
    asked: Asked,
    work: Workload,
    plan_for: PlanFor,
    predict_for: PredictFor,
    *,
    longest: int = MOST_TOKENS,
) -> Forecast:
    """Return the forecast of a plan; ``longest`` is the longest prompt that the model can take. Pure."""
    unknown: list[str] = []

    def times(planned: Plan, workload: Workload) -> Prediction | None:
        try:
            return predict_for(planned, workload)
        except UnavailableError as error:
            unknown.append(str(error))
            return None

    def choice(budget: int, workload: Workload) -> Choice | None:
        try:
            planned = plan_for(budget, workload)
        except PlanError:
            return None
        predicted = times(planned, workload)
        if predicted is None:
            return None
        return Choice(budget=budget, batch=workload.batch, plan=planned, predicted=predicted)

    def fits(workload: Workload, budget: int = chosen.budget) -> bool:
        try:
            plan_for(budget, workload)
        except PlanError:
            return False
        return True

    largest_batch = largest(lambda size: fits(replace(work, batch=size)), _MOST_BATCH)
    longest_prompt = largest(lambda tokens: fits(replace(work, prompt_tokens=tokens)), longest + 1)
    batches: list[Choice | None] = []
    budgets: list[Choice | None] = []
    more, without_cores = None, None
    predicted = times(chosen, work)
    if predicted is not None and not predicted.token_s:
        unknown.append("all weights are resident, and how fast this machine computes has not been measured")
        predicted = None
    if predicted is not None:
        if asked.without_cores is not None:
            without_cores = times(asked.without_cores, work)
        more = choice(chosen.budget + MORE_BYTES, work)
        batches = [choice(chosen.budget, replace(work, batch=2**k)) for k in range(largest_batch.bit_length())]
        most = chosen.model_bytes + chosen.workspace_bytes + chosen.scratch_bytes + MORE_BYTES // 100
        least = max(most, chosen.budget) - largest(lambda spared: fits(work, max(most, chosen.budget) - spared), most)
        steps = np.linspace(least, max(most, chosen.budget), _BUDGETS).astype(int)
        budgets = [choice(int(step), work) for step in sorted({*map(int, steps), chosen.budget})]
    return Forecast(
        plan=chosen,
        asked=asked,
        work=work,
        predicted=predicted,
        unknown=unknown[0] if unknown else "",
        without_cores=without_cores,
        batches=tuple(filter(None, batches)),
        budgets=tuple(filter(None, budgets)),
        more=more,
        largest_batch=largest_batch,
        longest_prompt=longest_prompt,
    )
