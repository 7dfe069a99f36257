"""Metrics for Prometheus: the registry, and the ways to add to it. The owner of a value registers and counts it.

Names follow Prometheus's conventions; no label holds an id. The path of a token counts in plain integers
(`hub.Counts`), which are read when a client asks for the metrics.
"""

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics(Collector):
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._store_duration = self.histogram(
            "chatserver_store_operation_duration_seconds",
            "Duration of database operations.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
            labels=["operation"],
        )
        self._store_errors = self.counter(
            "chatserver_store_errors_total", "Operations that the database did not answer.", labels=["operation"]
        )

    def histogram(self, name: str, what: str, *, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        """Register a histogram and return it.

        :param what: its help text
        :param buckets: their upper bounds, ascending
        """
        return Histogram(name, what, labels, buckets=buckets, registry=self._registry)

    def counter(self, name: str, what: str, *, labels: Sequence[str] = ()) -> Counter:
        """Register a counter and return it.

        :param what: its help text
        """
        return Counter(name, what, labels, registry=self._registry)

    def watch(self, name: str, what: str, read: Callable[[], int], *, counter: bool = False) -> None:
        """Register a gauge, or a counter, whose value is read for each answer.

        :param what: its help text
        :param read: returns the value
        :param counter: whether the value only grows
        """
        self._registry.register(_Watched(name, what, read, counter))

    def observe_store(self, operation: str, seconds: float, answered: bool) -> None:
        """Count one database operation.

        :param answered: whether the database answered it
        """
        self._store_duration.labels(operation).observe(seconds)
        if not answered:
            self._store_errors.labels(operation).inc()

    def render(self) -> bytes:
        """Return all metrics in Prometheus's text format 0.0.4."""
        return generate_latest(self)

    def collect(self) -> Iterable[Metric]:
        """Yield all metrics without the creation times, which this format would show as metrics of their own."""
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class _Watched(Collector):
    def __init__(self, name: str, what: str, read: Callable[[], int], counter: bool) -> None:
        self._name, self._what, self._read = name, what, read
        self._family = CounterMetricFamily if counter else GaugeMetricFamily

    def collect(self) -> Iterable[Metric]:
        yield self._family(self._name, self._what, value=self._read())
