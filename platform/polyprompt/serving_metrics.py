"""What Prometheus reads of the endpoint, at /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one endpoint. Labels have few values: what callers make up is never one."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "HTTP requests by path and status", "path", "status")
        self.refused = self._counter("refused", "requests that were not answered, by reason", "code")
        self.rows = self._counter(
            "rows", "rows by model, version, task and outcome", "model", "version", "task", "outcome"
        )
        self.loads = self._counter("loads", "models loaded, replaced or dropped", "model", "outcome")
        self.retries = self._counter("retries", "calls that were made again because a replica was lost")
        self.seconds = Histogram(
            "polyprompt_request_seconds", "from a request's head to its answer's end", ["path"],
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.batches = Histogram(
            "polyprompt_batch_rows", "rows that a row was answered together with", buckets=ROWS, registry=self.registry
        )
        self.waiting = Gauge("polyprompt_waiting_rows", "rows taken and not yet answered", registry=self.registry)

    def text(self) -> bytes:
        """Return the exposition format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"polyprompt_{name}", about, labels, registry=self.registry)
