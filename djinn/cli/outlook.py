"""How ``djinn plan`` finds the rates to predict from, and how it prints what follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from djinn.cli.show import print_json, print_table, say
from djinn.errors import ConfigError
from djinn.sizes import format_bytes, parse_bytes, parse_rate

if TYPE_CHECKING:
    from djinn.planning.outlook import Choice, Forecast
    from djinn.planning.prediction import Prediction
    from djinn.planning.rates import Rates

_CERTIFY = (
    "`djinn certify` measures this machine; --machine plans for one that was measured before, or for a card's data "
    "sheet; --link plans for a link of that rate"
)
_ENOUGH_BYTES = 10**15
"""Host memory of a machine of which nobody has said how much it has."""
_TAKEN = "host memory is taken to be enough there; --ram says how much there is"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a plan is for."""

    name: str
    device: str
    rates: Rates | None
    free: int | None
    """Host memory that is free there, bytes; None for what is free here."""
    cores: int | None = None
    """Cores there that can be spared; None where nobody knows: then as many as here."""
    memory_bytes: int | None = None
    """Of its GPU's memory; None where there is none, or nobody knows."""
    note: str = ""
    """What a reader of the plan has to know."""
    elsewhere: Machine | None = None
    """What to plan for instead where this machine cannot hold the plan, and nobody asked for this one."""


def machine(
    name: str | None, device: str | None, *, link: str | None = None, disk: str | None = None, ram: str | None = None
) -> Machine:
    """Return the machine that was named, or this one with what is known of it; given numbers replace its own.

    Raises:
        ConfigError: no such machine, or one that was certified for another device.
    """
    from djinn.planning.rates import Rates

    if name is not None:
        found = _named(name, device)
    else:
        found = _here("cuda" if link and device is None else device, asked=link is not None)
    if link is not None or disk is not None:
        rates = found.rates or Rates(device="cpu" if found.device == "cpu" else "cuda")
        if link is not None:  # beside it the cores have not been measured
            rates = replace(rates, link=parse_rate(link), links=(), link_beside_cores=None, cores_beside_link=None)
        rates = rates if disk is None else replace(rates, disk=parse_rate(disk))
        found = replace(found, name=f"{found.name}, with the given rates", rates=rates)
    return found if ram is None else replace(found, free=parse_bytes(ram), note="", elsewhere=None)


def _named(name: str, device: str | None) -> Machine:
    """Return the machine of reference records, of a certified run or of a data sheet that was named."""
    from djinn.bench.data_sheets import sheet_of
    from djinn.bench.machines import machine_of
    from djinn.devices import device_of
    from djinn.host.cores import KEPT

    if (sheet := sheet_of(name)) is not None:
        rates = sheet.rates()
        found = Machine(
            name=f"{name} (data sheet, not measured)", device=rates.device, rates=rates, free=_ENOUGH_BYTES,
            note=_TAKEN, memory_bytes=sheet.memory_bytes,
        )  # fmt: skip
    else:
        certified = machine_of(name)
        rates, there = certified.rates, certified.machine
        cores = there.cores or there.threads
        found = Machine(
            name=name, device=rates.device, rates=rates, free=min(there.available_bytes, there.ram_limit_bytes),
            cores=None if cores is None else max(cores - KEPT, 1),
            memory_bytes=there.gpu_bytes if rates.device == "cuda" else None,
        )  # fmt: skip
    if device is not None and device_of(device).type != rates.device:
        raise ConfigError(f"device {device!r}: the rates of {found.name} are those of device {rates.device}")
    return found


def _here(device: str | None, *, asked: bool) -> Machine:
    """Return this machine; its link is not measured where another's rate is ``asked`` for."""
    import torch

    from djinn.bench.machines import certified_here
    from djinn.devices import device_of

    where = device_of(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        return Machine(name="a GPU that is not here", device=str(where), rates=None, free=_ENOUGH_BYTES, note=_TAKEN)
    here = certified_here(where.type)
    if here is not None:
        run, certification = here
        own = Machine(name=f"this machine ({run.name})", device=str(where), rates=certification.rates, free=None)
    else:
        measured_now = _link_here() if where.type == "cuda" and not asked else None
        own = Machine(name="this machine, not certified", device=str(where), rates=measured_now, free=None)
    if where.type == "cuda":
        return replace(own, memory_bytes=torch.cuda.get_device_properties(where).total_memory)
    if device is not None:
        return own
    note = f"this machine has no GPU and too little memory for that budget: planned for a GPU elsewhere; {_TAKEN}"
    other = Machine(name="a GPU elsewhere", device="cuda", rates=None, free=_ENOUGH_BYTES, note=note)
    return replace(own, elsewhere=other)


def _link_here() -> Rates:
    """Return the rate of this machine's link, measured now."""
    from djinn.bench.rates.link import pinned_h2d_rate
    from djinn.planning.rates import Rates

    return Rates(device="cuda", link=pinned_h2d_rate(64 * 2**20))


def print_forecast(forecast: Forecast, there: Machine, as_json: bool) -> None:
    """Print a forecast: as JSON, or the placement, what was predicted and the choices around it."""
    if as_json:
        print_json(_as_json(forecast, there))
        return
    plan, asked = forecast.plan, forecast.asked
    if asked.gpus > 1:
        say(_several(forecast))
    say(plan.table())
    fits = (
        f"the largest batch that fits is {forecast.largest_batch}, the longest prompt {forecast.longest_prompt} tokens"
    )
    if forecast.predicted is None:
        say(f"\n{fits}\nno times: {forecast.unknown}; {_CERTIFY}")
        for line in _host(forecast, there):
            say(line)
        _say_memory(forecast, there)
        return
    predicted = forecast.predicted
    say(f"\npredicted for {there.name}, {_rates(there.rates, asked.gpus)}:")
    print_table(
        ["batch", "first token s", "s per token", "tokens/s", "limit"],
        [_row(choice) for choice in forecast.batches],
    )
    if forecast.unknown:
        say(f"other batches and budgets have no times: {forecast.unknown}; --link and --disk say a rate")
    if forecast.gain_s is not None:
        saved = f"{forecast.gain_s:.3g} s" if forecast.gain_s > 0 else "nothing"
        say(f"one more GB of budget saves {saved} of the {predicted.token_s:.3g} s per token")
    say(fits)
    if plan.pool.slots:
        share = f"{predicted.hit_rate:.2f} of the experts that routers pick"
        say(f"{share} are taken to be in the pool{_assumed(forecast)}")
        say("sequences of a batch are taken to pick independently; the pool's hits are no more than it can hold")
    for line in _host(forecast, there):
        say(line)
    if predicted.blind:
        say(f"not measured there, so taken to be free: {', '.join(predicted.blind)}")
    _say_memory(forecast, there)


def _several(forecast: Forecast) -> str:
    """Return what the plan of one of several GPUs is a part of."""
    asked, plan = forecast.asked, forecast.plan
    return (
        f"model {format_bytes(asked.whole_bytes)}, {format_bytes(plan.model_bytes)} on each of {asked.gpus} GPUs; "
        f"pinned {format_bytes(asked.gpus * plan.pinned_bytes)} in all; of each GPU:\n"
    )


def _say_memory(forecast: Forecast, there: Machine) -> None:
    """Say what the plan takes for granted of the memory there."""
    plan, asked = forecast.plan, forecast.asked
    if plan.away and asked.request.host_memory is None and there.free != _ENOUGH_BYTES:
        most = format_bytes(asked.arena_bytes)
        say(f"streamed weights may take {most} of the host memory there; --host-memory sets another limit")
    if there.memory_bytes is not None and plan.budget > there.memory_bytes:
        say(f"the GPU has {format_bytes(there.memory_bytes)}, less than the budget")
    if there.note:
        say(there.note)


def _host(forecast: Forecast, there: Machine) -> Iterator[str]:
    """Yield what a plan for which the host's cores were asked is made from, and what they bring."""
    asked, predicted, without = forecast.asked, forecast.predicted, forecast.without_cores
    host = asked.request.host
    if host is None:
        return
    if host.rates is None or host.rates.assumed:
        cores = f"{asked.threads} cores"
        if host.threads is None and there.cores is None:
            cores = f"cores of this machine: {asked.threads}; give --host-threads for another"
        yield f"what the host's cores do is assumed, not measured by `djinn certify` ({cores})"
    if forecast.plan.host is None:
        yield "the host's cores are given nothing: they would bring nothing here"
        return
    rates = forecast.plan.host.rates
    speeds = f"{_three_digits(rates.cores / 1e9)} GB/s beside a link of {_three_digits(rates.link / 1e9)} GB/s"
    yield f"the host's cores compute at {speeds}; tokens are close to the resident model's, not equal to them"
    if without is not None and predicted is not None:
        brings = "" if without.token_s > predicted.token_s else ": they bring nothing here"
        yield f"without --host-compute a token takes {without.token_s:.3g} s{brings}"


def _assumed(forecast: Forecast) -> str:
    even = forecast.predicted is not None and forecast.predicted.hit_rate == forecast.plan.pool.share
    return ", as if they picked evenly; --hit-rate says another share" if even else ""


def draw(forecast: Forecast, there: Machine, model: str, path: Path) -> list[Path]:
    """Draw a forecast as PDF, PNG and CSV, named as ``path`` is; return where they are.

    Raises:
        UnavailableError: nothing was predicted.
    """
    from djinn.figures import forecast as picture
    from djinn.figures.draw import save

    figure = picture.draw(forecast, f"{model} on {there.name}", there.memory_bytes)
    return save(figure, picture.budgets_frame(forecast), path.with_suffix(""))


def _row(choice: Choice) -> list[Any]:
    predicted = choice.predicted
    rate = predicted.tokens_per_s
    return [choice.batch, predicted.ttft_s, predicted.token_s, rate, predicted.limit]


def _rates(rates: Rates | None, gpus: int) -> str:
    if rates is None:
        return "no rates"
    words = [
        f"{name} {_three_digits(rate / 1e9)} GB/s"
        for name, rate in (("link", rates.beside(gpus).link), ("disk", rates.disk))
        if rate is not None
    ]
    if gpus > 1 and rates.link is not None:
        busy = rates.busy_links(gpus)
        words[0] += f" each, with {busy} busy" if busy else " each, not measured at once"
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
    plan, asked = forecast.plan, forecast.asked
    sizes = ("budget", "model_bytes", "resident_bytes", "ring_bytes", "workspace_bytes", "pinned_bytes", "disk_bytes")
    tiers = zip(plan.units, plan.tiers, strict=True)
    return {name: getattr(plan, name) for name in sizes} | {
        "machine": there.name,
        "device": there.device,
        "note": there.note,
        "gpus": asked.gpus,
        "whole_model_bytes": asked.whole_bytes,
        "host_memory": asked.arena_bytes,
        "gpu_bytes": there.memory_bytes,
        "predicted": _times(forecast.predicted),
        "unknown": forecast.unknown,
        "batches": [{"batch": choice.batch, **(_times(choice.predicted) or {})} for choice in forecast.batches],
        "budgets": [
            {"budget": choice.budget, "token_s": choice.predicted.token_s, "limit": choice.predicted.limit}
            for choice in forecast.budgets
        ],
        "pool": {"slots": plan.pool.slots, "experts": plan.pool.experts, "bytes": plan.pool.nbytes},
        "host": None if plan.host is None else {"units": sorted(plan.host.units), **asdict(plan.host.rates)},
        "without_host_compute": _times(forecast.without_cores),
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
