"""What Prometheus sees, by model, through Ray's exporter."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300]


class Metrics:
    """The gateway's."""

    def __init__(self) -> None:
        by_model = ("model",)
        self.requests = Counter("avray_requests", "HTTP requests.", ("model", "route", "status"))
        self.refusals = Counter("avray_refusals", "Requests refused for want of room.", by_model)
        self.first = Histogram("avray_time_to_first_audio_s", "Seconds to the first sound.", SECONDS, by_model)
        self.whole = Histogram("avray_generation_s", "Seconds from admission to the last sound.", SECONDS, by_model)
        self.real_time = Histogram("avray_real_time_factor", "Seconds of work for a second of sound.",
                                   [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10], by_model)
        self.waiting = Gauge("avray_requests_under_way", "Admitted and not finished.", by_model)


class ReplicaMetrics:
    """A replica's."""

    def __init__(self, model: str) -> None:
        self.steps = Counter("avray_engine_steps", "Steps of the engine: token frames, solver steps.", ("model",))
        self.batch = Gauge("avray_engine_batch", "Requests in the slots.", ("model",))
        self.queue = Gauge("avray_engine_queue", "Requests waiting for a slot.", ("model",))
        for metric in (self.steps, self.batch, self.queue):
            metric.set_default_tags({"model": model})
