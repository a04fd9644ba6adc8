"""The metrics of `/metrics`, with vLLM's names and the prefix ``qvl:``."""

from __future__ import annotations

import threading
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qvl_runtime.engine.generation import Piece, Timings
from qvl_runtime.server.admission import Admission

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """Counters of a server. They contain no text of requests or answers.

    Parameters
    ----------
    admission : Admission

    Attributes
    ----------
    first_token, between_tokens, end_to_end : Histogram
        See `Watch`.
    """

    def __init__(self, admission: Admission):
        self.registry = registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"qvl:{name}", about, labels, registry=registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"qvl:{name}", about, buckets=buckets, registry=registry)

        running = Gauge("qvl:num_requests_running", "Running requests.", registry=registry)
        running.set_function(lambda: admission.running)
        waiting = Gauge("qvl:num_requests_waiting", "Waiting requests.", registry=registry)
        waiting.set_function(lambda: admission.waiting)
        self._responses = counter("http_responses", "Responses by route and status.", "route", "status")
        self._success = counter("request_success", "Completed answers.", "finished_reason")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._generated = counter("generation_tokens", "Tokens of answers.")
        self._queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._pictures = counter("picture_cache_queries", "Pictures looked up in the picture cache.")
        self._known = counter("picture_cache_hits", "Pictures found in the picture cache.")
        self._picture = counter("picture_seconds", "Seconds spent on encoding pictures.")
        self._prefill = counter("prefill_seconds", "Seconds spent on prompts.")
        self._decode = counter("decode_seconds", "Seconds spent on answers.")
        self.first_token = histogram("time_to_first_token_seconds", "From a request to its first token.", SECONDS)
        self.between_tokens = histogram("inter_token_latency_seconds", "Between two pieces of an answer.", BETWEEN)
        self.end_to_end = histogram("e2e_request_latency_seconds", "From a request to the end of its answers.", SECONDS)

    def response(self, route: str, status: int) -> None:
        """Count a response."""
        self._responses.labels(route, status).inc()

    def answer(self, timings: Timings, finish_reason: str) -> None:
        """Count a completed answer."""
        self._success.labels(finish_reason).inc()
        self._prompt.inc(timings.prompt_tokens)
        self._generated.inc(timings.new_tokens)
        self._queries.inc(timings.prompt_tokens)
        self._hits.inc(timings.cached_tokens)
        self._pictures.inc(timings.images)
        self._known.inc(timings.cached_images)
        self._picture.inc(timings.image)
        self._prefill.inc(timings.prefill)
        self._decode.inc(timings.decode)

    def shown(self) -> bytes:
        """Return all metrics in Prometheus' format."""
        return generate_latest(self.registry)


class Watch:
    """Times a request whose answers are read in several threads.

    Parameters
    ----------
    metrics : Metrics
    arrived : float
        Time of arrival, from `time.monotonic`.
    """

    def __init__(self, metrics: Metrics, arrived: float):
        self._metrics, self._arrived = metrics, arrived
        self._lock = threading.Lock()
        self._last: dict[int, float] = {}

    def piece(self, index: int, piece: Piece) -> None:
        """Count a piece of the answer with this index."""
        if not piece.token_ids:
            return
        with self._lock:
            now = time.monotonic()
            if index in self._last:
                self._metrics.between_tokens.observe(now - self._last[index])
            elif not self._last:
                self._metrics.first_token.observe(now - self._arrived)
            self._last[index] = now

    def end(self) -> None:
        """Count the end of the last answer."""
        self._metrics.end_to_end.observe(time.monotonic() - self._arrived)
