"""How ``djinn plan`` finds the rates to predict from, and how it prints what follows from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from djinn.cli.show import print_json, print_table, say
from djinn.errors import ConfigError

if TYPE_CHECKING:
    from djinn.planning.host import HostRates
    from djinn.planning.outlook import Choice, Forecast
    from djinn.planning.prediction import Prediction, Rates

_CERTIFY = "`djinn certify` measures this machine; --machine plans for one that was measured before"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a plan is for."""

    name: str
    device: str
    rates: Rates | None
    free: int | None
    """Host memory that is free there, bytes; None for what is free here."""
    cores: int | None = None
    """Cores there that can be spared; None for those here."""


def machine(name: str | None, device: str | None) -> Machine:
    """Return the machine that was named, or this one with what is known of it.

    Raises:
        ConfigError: no such machine, or one that was certified for another device.
    """
    from djinn.bench.machines import certified_here, machine_of
    from djinn.devices import device_of
    from djinn.host.cores import KEPT
    from djinn.planning.prediction import Rates

    if name is not None:
        found = machine_of(name)
        has = found.rates.device
        if device is not None and device_of(device).type != has:
            raise ConfigError(f"device {device!r}: the rates of {name} are those of device {has}")
        cores = found.machine.cores or found.machine.threads
        return Machine(
            name=name, device=has, rates=found.rates, free=found.machine.available_bytes,
            cores=None if cores is None else max(cores - KEPT, 1),
        )  # fmt: skip
    where = device_of(device)
    here = certified_here(where.type)
    if here is not None:
        run, certification = here
        return Machine(name=f"this machine ({run.name})", device=str(where), rates=certification.rates, free=None)
    rates = None
    import torch

    if where.type == "cuda" and torch.cuda.is_available():
        from djinn.bench.rates.link import pinned_h2d_rate

        rates = Rates(device="cuda", link=pinned_h2d_rate(64 * 2**20))
    return Machine(name="this machine, not certified", device=str(where), rates=rates, free=None)


def print_forecast(forecast: Forecast, there: Machine, as_json: bool) -> None:
    """Print a forecast: as JSON, or the placement, what was predicted and the choices around it."""
    if as_json:
        print_json(_as_json(forecast, there))
        return
    say(forecast.plan.table())
    fits = (
        f"the largest batch that fits is {forecast.largest_batch}, the longest prompt {forecast.longest_prompt} tokens"
    )
    if forecast.predicted is None:
        say(f"\n{fits}\nno times: {forecast.unknown}; {_CERTIFY}")
        return
    predicted = forecast.predicted
    say(f"\npredicted for {there.name}, {_rates(there.rates)}:")
    print_table(
        ["batch", "first token s", "s per token", "tokens/s", "limit"],
        [_row(choice) for choice in forecast.batches],
    )
    if forecast.gain_s is not None:
        say(f"one more GB of budget saves {forecast.gain_s:.3g} s of the {predicted.token_s:.3g} s per token")
    say(fits)
    if forecast.plan.pool.slots:
        share = f"{predicted.hit_rate:.2f} of the experts that routers pick"
        say(f"{share} are taken to be in the pool{_assumed(forecast)}")
    if forecast.plan.host is not None:
        say(_host(forecast.plan.host.rates))
    if predicted.blind:
        say(f"not measured there, so taken to be free: {', '.join(predicted.blind)}")


def _host(rates: HostRates) -> str:
    """Return what a plan with host units is made from."""
    speeds = f"{_three_digits(rates.cores / 1e9)} GB/s beside a link of {_three_digits(rates.link / 1e9)} GB/s"
    if rates.assumed:
        speeds += ", which is assumed: `djinn certify` measures it"
    return f"the host's cores compute at {speeds}; tokens are then close to the resident model's, not equal to them"


def _assumed(forecast: Forecast) -> str:
    even = forecast.predicted is not None and forecast.predicted.hit_rate == forecast.plan.pool.share
    return ", as if they picked evenly; --hit-rate says another share" if even else ""


def draw(forecast: Forecast, there: Machine, model: str, path: Path) -> list[Path]:
    """Draw a forecast as PDF, PNG and CSV, named as ``path`` is; return where they are.

    Raises:
        ConfigError: another kind of picture.
        UnavailableError: nothing was predicted.
    """
    if path.suffix not in (".pdf", ".png"):
        raise ConfigError(f"figure {str(path)!r}: figures are .pdf and .png")
    from djinn.figures import forecast as picture
    from djinn.figures.draw import save

    figure = picture.draw(forecast, f"{model} on {there.name}")
    return save(figure, picture.budgets_frame(forecast), path.with_suffix(""))


def _row(choice: Choice) -> list[Any]:
    predicted = choice.predicted
    rate = predicted.tokens_per_s
    return [choice.batch, predicted.ttft_s, predicted.token_s, rate, predicted.limit]


def _rates(rates: Rates | None) -> str:
    if rates is None:
        return "no rates"
    words = [
        f"{name} {_three_digits(rate / 1e9)} GB/s"
        for name, rate in (("link", rates.link), ("disk", rates.disk))
        if rate is not None
    ]
    if rates.compute:
        first, last = rates.compute[0], rates.compute[-1]
        words += [
            f"memory {_three_digits(first.rate / 1e9)} GB/s",
            f"{_three_digits(last.rate * last.tokens / 1e12)} TFLOP/s",
        ]
    return ", ".join(words)


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _as_json(forecast: Forecast, there: Machine) -> dict[str, Any]:
    plan = forecast.plan
    sizes = ("budget", "model_bytes", "resident_bytes", "ring_bytes", "workspace_bytes", "pinned_bytes", "disk_bytes")
    tiers = zip(plan.units, plan.tiers, strict=True)
    return {name: getattr(plan, name) for name in sizes} | {
        "machine": there.name,
        "device": there.device,
        "predicted": _times(forecast.predicted),
        "unknown": forecast.unknown,
        "batches": [{"batch": choice.batch, **(_times(choice.predicted) or {})} for choice in forecast.batches],
        "budgets": [
            {"budget": choice.budget, "token_s": choice.predicted.token_s, "limit": choice.predicted.limit}
            for choice in forecast.budgets
        ],
        "pool": {"slots": plan.pool.slots, "experts": plan.pool.experts, "bytes": plan.pool.nbytes},
        "host": None if plan.host is None else {"units": sorted(plan.host.units), **asdict(plan.host.rates)},
        "one_more_gb_saves_s": forecast.gain_s,
        "largest_batch": forecast.largest_batch,
        "longest_prompt": forecast.longest_prompt,
        "units": [{"name": unit.name, "bytes": unit.weight_bytes, "tier": tier} for unit, tier in tiers],
    }


def _times(predicted: Prediction | None) -> dict[str, Any] | None:
    if predicted is None:
        return None
    names = (
        "hit_rate", "ttft_s", "token_s", "tokens_per_s", "link_s", "disk_s", "compute_s", "host_s", "cores_s", "limit",
    )  # fmt: skip
    return {name: getattr(predicted, name) for name in names} | {"not_measured": list(predicted.blind)}
