"""What Prometheus may ask. Names follow its conventions; no ids in labels.

The hot path counts in plain integers (`hub.Counts`), which are read when somebody asks.
"""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics(Collector):
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.first_token = Histogram(
            "chatserver_time_to_first_token_seconds",
            "From a stored user message to the first characters of its reply.",
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
            registry=registry,
        )
        self.reply_duration = Histogram(
            "chatserver_reply_duration_seconds",
            "From a stored user message to its reply's stored end.",
            ["status"],
            buckets=(0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
            registry=registry,
        )
        self.store_duration = Histogram(
            "chatserver_store_operation_duration_seconds",
            "How long the database takes.",
            ["operation"],
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
            registry=registry,
        )
        self.store_errors = Counter(
            "chatserver_store_errors_total",
            "Operations that the database did not answer.",
            ["operation"],
            registry=registry,
        )
        self.resumes = Counter("chatserver_resumes_total", "Streams opened with a position.", registry=registry)
        self.resets = Counter("chatserver_resets_total", "Streams whose position did not exist.", registry=registry)
        self.slow_clients = Counter(
            "chatserver_slow_clients_cut_total", "Streams cut because their client took nothing.", registry=registry
        )
        self.loop_lag = Histogram(
            "chatserver_event_loop_lag_seconds",
            "How late the event loop runs what is due, looked at once a second.",
            buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
            registry=registry,
        )

    def watch(self, name: str, what: str, read: Callable[[], int], *, counter: bool = False) -> None:
        """Add a metric that is read from the server whenever somebody asks: a gauge, or a counter."""
        self._registry.register(_Watched(name, what, read, counter))

    def observe_store(self, operation: str, seconds: float, answered: bool) -> None:
        """Take note of one database operation."""
        self.store_duration.labels(operation).observe(seconds)
        if not answered:
            self.store_errors.labels(operation).inc()

    def render(self) -> bytes:
        """Return everything in Prometheus's text format 0.0.4."""
        return generate_latest(self)

    def collect(self) -> Iterable[Metric]:
        """Yield everything but when each count began, which the format would show as metrics of their own."""
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class _Watched(Collector):
    def __init__(self, name: str, what: str, read: Callable[[], int], counter: bool) -> None:
        self._name, self._what, self._read = name, what, read
        self._family = CounterMetricFamily if counter else GaugeMetricFamily

    def collect(self) -> Iterable[Metric]:
        yield self._family(self._name, self._what, value=self._read())
