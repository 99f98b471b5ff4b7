"""What certifying a machine found: the record of it, and the rates that plans are predicted from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from djinn.bench.certify.findings import Check
from djinn.bench.certify.proof import Proof
from djinn.bench.rates.compute import Compute
from djinn.bench.rates.disk import BLOCK, DiskRate
from djinn.bench.rates.link import LinkRate
from djinn.bench.rates.several import SUM_BYTES, LinksTogether, SumRate
from djinn.bench.rates.streaming import Streaming
from djinn.errors import ConfigError
from djinn.hardware import Machine
from djinn.host.rates import HostCores
from djinn.places import certification_path
from djinn.planning.rates import Rates
from djinn.reading import read_json

if TYPE_CHECKING:
    import pandas as pd


class Certification(BaseModel):
    """What was found; written to ``results/certify.json`` of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    profile: str
    config_digest: str
    machine: Machine
    link: tuple[LinkRate, ...]
    disk: tuple[DiskRate, ...]
    links: tuple[LinksTogether, ...] = ()
    """Of several GPUs: each link alone, then at once with others."""
    sums: tuple[SumRate, ...] = ()
    """What several GPUs take to add up what each has."""
    compute: Compute | None = None
    """None in records from before it was measured, and where measuring it failed."""
    host: HostCores | None = None
    """What the host's cores multiply; None as ``compute``."""
    streaming: Streaming | None = None
    """What streaming costs beside copies; None as ``compute``."""
    proof: Proof | None
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.verdict != "fail" for check in self.checks)

    @property
    def rates(self) -> Rates:
        """What plans are predicted from: the best of each kind of rate, of the device that was certified."""
        on_gpu = any(rate.kind == "pinned to device" for rate in self.link)
        kind = "pinned to device" if on_gpu else "memcpy"
        copies = [rate.gbps * 1e9 for rate in self.link if rate.kind == kind]
        reads = [rate.gbps * 1e9 for rate in self.disk if rate.kind == "read" and rate.gbps is not None]
        direct = [rate.gbps * 1e9 for rate in self.disk if (rate.kind, rate.mode) == ("read", "direct") and rate.gbps]
        # Small chunks stay in a processor's cache, which a model does not.
        best = max if on_gpu else min
        computed = self.compute or Compute(device="cuda" if on_gpu else "cpu", rates=(), module_s=0.0)
        found = computed.rates_with(link=best(copies, default=None), disk=max(direct or reads, default=None))
        if self.streaming is not None:
            found = self.streaming.beside(found)
        at_once: dict[int, float] = {}
        for together in self.links:
            count, slowest = len(together.gpus), 1e9 * min(together.gbps)
            if count > 1:
                at_once[count] = min(slowest, at_once.get(count, slowest))
        idle = {rate.nbytes: rate.seconds for rate in self.sums if not rate.beside_copies}
        few, many = SUM_BYTES
        measured = replace(
            found,
            links=tuple(sorted(at_once.items())),
            sum_s=idle.get(few, 0.0),
            sum_rate=many / idle[many] if many in idle else None,
        )
        return self.host.added_to(measured) if self.host else measured

    def frame(self) -> pd.DataFrame:
        """Return a row per check: check, measured, needed, verdict, remedy."""
        import pandas as pd  # of the artifact extra; certifying does without

        rows = [check.model_dump() for check in self.checks]
        return pd.DataFrame(rows).rename(columns={"name": "check"})

    def summary(self) -> str:
        """Return in sentences what the checks came to, and whether streaming was exact."""
        verdicts = [check.verdict for check in self.checks]
        text = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("pass", "warn", "fail"))
        if self.proof is None:
            return f"Checks: {text}. Whether streamed output equals resident output was not tried."
        found = "equals" if self.proof.holds else "DIFFERS FROM"
        return f"Checks: {text}. Streamed output {found} resident output, bit for bit."

    def rates_frame(self) -> pd.DataFrame:
        """Return a row per rate: what, chunk_bytes, threads, gbps (10^9 bytes/s), reason. Missing stays missing."""
        import pandas as pd

        rows: list[dict[str, object]] = [
            {"what": rate.kind, "chunk_bytes": rate.chunk_bytes, "gbps": rate.gbps} for rate in self.link
        ]
        rows += [
            {
                "what": f"disk {rate.kind}, {rate.mode}",
                "chunk_bytes": BLOCK,
                "threads": rate.threads,
                "gbps": rate.gbps,
                "reason": rate.reason,
            }
            for rate in self.disk
        ]
        rows += [
            {"what": f"pinned to device {gpu}, {_beside(rate.gpus, gpu)}", "gbps": gbps}
            for rate in self.links
            for gpu, gbps in zip(rate.gpus, rate.gbps, strict=True)
        ]
        rows += [
            {
                "what": f"sum over GPUs{', beside copies' if rate.beside_copies else ''}",
                "chunk_bytes": rate.nbytes,
                "gbps": rate.nbytes / rate.seconds / 1e9,
            }
            for rate in self.sums
        ]
        if self.host is not None:
            for product in (*self.host.alone, *self.host.beside_link):
                cores = f"the host's cores, {product.tokens} token{'s' if product.tokens > 1 else ''}"
                beside = "alone" if product.link_gbps is None else "beside copies"
                rows.append({"what": f"{cores}, {beside}", "threads": self.host.threads, "gbps": product.gbps})
                if product.link_gbps is not None:
                    rows.append({"what": f"pinned to device, beside {cores}", "gbps": product.link_gbps})
        return pd.DataFrame(rows, columns=["what", "chunk_bytes", "threads", "gbps", "reason"])


def _beside(gpus: tuple[int, ...], gpu: int) -> str:
    others = ", ".join(str(other) for other in gpus if other != gpu)
    return f"at once with {others}" if others else "alone"


def read_certification(run_dir: Path) -> Certification | None:
    """Read the certification of a run, or of a folder that holds it alone; None if there is none yet.

    Raises:
        ConfigError: the file is damaged.
    """
    path = certification_path(run_dir)
    if path is None:
        return None
    try:
        return read_json(path, Certification)
    except ConfigError as error:
        raise ConfigError(f"{error}; delete it and certify again") from None
