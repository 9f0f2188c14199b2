"""The process's counters for Prometheus: ``pip install 'hybrid-moe[prometheus]'``.

`register` is for a process that answers scrapes itself. Servers of several processes collect through files
(``PROMETHEUS_MULTIPROC_DIR``), in which a collector has no place: there each process has a `Mirror` and updates it.

=============================== =======================================================
``hybrid_moe_calls_total``      calls made, by ``device``, ``problem``, ``candidate``,
                                ``regime`` and ``source``; graphs' replays aren't counted
``hybrid_moe_tokens_total``     the sum of their T
``hybrid_moe_shadow_*_total``   ``checks``, ``breaches`` and ``skipped`` of shadow checks, by
                                ``device``, ``problem`` and ``candidate``
``hybrid_moe_quarantined``      1 for each candidate in quarantine, with its ``cause``
=============================== =======================================================
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ..policy.schema import Interval
from .metrics import shadow_snapshot, snapshot
from .quarantine import quarantined

__all__ = ["HybridMoECollector", "Mirror", "register"]

_CANDIDATE = ("device", "problem", "candidate")
_CALL = (*_CANDIDATE, "regime", "source")
_QUARANTINED = "hybrid_moe_quarantined"
_HELP = {
    "hybrid_moe_calls": "Calls of the MoE layer made; replays of CUDA graphs run no Python and aren't counted",
    "hybrid_moe_tokens": "Tokens of these calls",
    "hybrid_moe_shadow_checks": "Calls of which a few tokens were compared with the reference",
    "hybrid_moe_shadow_breaches": "Of these, those with a wrong result",
    "hybrid_moe_shadow_skipped": "Calls that were due and not compared",
    _QUARANTINED: "1 for a candidate that failed in this process and is passed over",
}


@dataclass(frozen=True, slots=True)
class _Metric:
    """One metric's values now, by those of its labels; what has the same labels is added up."""

    name: str
    labels: tuple[str, ...]
    values: dict[tuple[str, ...], int] = field(default_factory=lambda: defaultdict(int))


def _metrics() -> Iterator[_Metric]:
    calls, tokens = _Metric("hybrid_moe_calls", _CALL), _Metric("hybrid_moe_tokens", _CALL)
    for sample in snapshot():
        label = sample.label
        about = (label.device, label.problem.definition, str(label.choice), _regime(label.regime), label.source)
        calls.values[about] += sample.calls
        tokens.values[about] += sample.tokens
    yield from (calls, tokens)
    shadow = [_Metric(f"hybrid_moe_shadow_{what}", _CANDIDATE) for what in ("checks", "breaches", "skipped")]
    for checks in shadow_snapshot():
        which = (checks.device, checks.problem.definition, str(checks.choice))
        for metric, count in zip(shadow, (checks.checks, checks.breaches, checks.skipped), strict=True):
            metric.values[which] += count
    yield from shadow
    failed = _Metric(_QUARANTINED, (*_CANDIDATE, "cause"))
    for entry in quarantined():
        failed.values[(entry.device, entry.problem.definition, str(entry.choice), entry.cause)] = 1
    yield failed


def _regime(bounds: Interval | None) -> str:
    if bounds is None:
        return "none"
    first, last = bounds
    return f"{first}-" if last is None else f"{first}-{last}"


class HybridMoECollector(Collector):
    """Reads the counters when it is asked for them, so that calls pay nothing for it."""

    def describe(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        """The metrics' names, so that a registry doesn't ask for their values."""
        return [_family(_Metric(name, ())) for name in _HELP]

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """The metrics as they are now."""
        for metric in _metrics():
            yield _family(metric)


def _family(metric: _Metric) -> CounterMetricFamily | GaugeMetricFamily:
    kind = GaugeMetricFamily if metric.name == _QUARANTINED else CounterMetricFamily
    family = kind(metric.name, _HELP[metric.name], labels=metric.labels)
    for labels, value in metric.values.items():
        family.add_metric(labels, value)
    return family


def register(registry: CollectorRegistry = REGISTRY) -> HybridMoECollector:
    """Show the counters in a registry, once; ValueError if one shows them already.

    Parameters
    ----------
    registry
        By default the one that `prometheus_client.start_http_server` answers from.
    """
    collector = HybridMoECollector()
    registry.register(collector)
    return collector


class Mirror:
    """The counters as metrics that hold their values, which Prometheus' files of several processes take.

    Parameters
    ----------
    registry
        Where they are made known.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._metrics: dict[str, Counter | Gauge] = {}
        self._seen: dict[str, Mapping[tuple[str, ...], int]] = {}
        for metric in _metrics():
            text = _HELP[metric.name]
            if metric.name == _QUARANTINED:
                made: Counter | Gauge = Gauge(
                    metric.name, text, metric.labels, registry=registry, multiprocess_mode="livemax"
                )
            else:
                made = Counter(metric.name, text, metric.labels, registry=registry)
            self._metrics[metric.name], self._seen[metric.name] = made, {}

    def update(self) -> None:
        """Take over what was counted since the last time; from one thread, as a server's loop."""
        for metric in _metrics():
            made, seen = self._metrics[metric.name], self._seen[metric.name]
            for labels in seen.keys() | metric.values.keys():
                before, now = seen.get(labels, 0), metric.values.get(labels, 0)
                if isinstance(made, Gauge):
                    made.labels(*labels).set(now)
                elif now > before:
                    made.labels(*labels).inc(now - before)
            self._seen[metric.name] = {labels: 0 for labels in seen} | dict(metric.values)
