"""Count what a server does, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mmdlm.serving.step_batcher import Pass

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mmdlm_requests",
            "Requests, by route and status",
            ["route", "status"],
            registry=self.registry,
        )
        self.latency = Histogram(
            "mmdlm_request_seconds",
            "Seconds from a request to the end of its answer",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first = Histogram(
            "mmdlm_first_step_seconds",
            "Seconds from a request to the end of its first denoising step, if it streams",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.active = Gauge("mmdlm_requests_active", "Requests in work", registry=self.registry)
        self.waiting = Gauge(
            "mmdlm_queue", "Calls that wait for their first step", registry=self.registry
        )
        self.rows = Gauge("mmdlm_batch_rows", "Rows being denoised", registry=self.registry)
        self.passes = Counter("mmdlm_forward_passes", "Forward passes", registry=self.registry)
        self.pass_rows = Counter(
            "mmdlm_forward_pass_rows", "Rows of all forward passes", registry=self.registry
        )
        self.pass_seconds = Counter(
            "mmdlm_step_seconds", "Seconds spent in denoising steps", registry=self.registry
        )
        self.committed = Counter(
            "mmdlm_tokens_committed",
            "Text tokens and image codes that were committed",
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "mmdlm_prompt_tokens", "Tokens of prompts", registry=self.registry
        )
        self.tokens = Counter(
            "mmdlm_completion_tokens", "Tokens of written texts", registry=self.registry
        )
        self.images = Counter("mmdlm_images", "Images drawn", registry=self.registry)

    def observe(self, one: Pass) -> None:
        """Count a forward pass."""
        self.passes.inc()
        self.pass_rows.inc(one.rows)
        self.pass_seconds.inc(one.seconds)
        self.committed.inc(one.committed)

    def text(self) -> bytes:
        """Return all of them in Prometheus's format."""
        return generate_latest(self.registry)
