"""The server process around the application: its port, slow clients, and stopping."""

import asyncio
import functools
import json
import logging
import math
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from openvla_lightning.policy import Policy
from openvla_lightning.serve.app import BATCH_SIZES, Service, build_app
from openvla_lightning.serve.errors import Refused
from openvla_lightning.serve.recording import Logbook

log = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "::1", "localhost")
SAME_SIGNAL = 1.0
"""Seconds within which a signal may come twice for one: `timeout` sends it to the process, and to its group."""


def serve(
    load: Callable[[], Policy],
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    max_batch: int = 16,
    max_wait_ms: float = 0.0,
    max_queue: int = 256,
    max_connections: int = 512,
    deadline_ms: float = 1000.0,
    receive_seconds: float = 10.0,
    stop_seconds: float = 10.0,
    max_bytes: int = 2**23,
    max_pixels: int = 2**22,
    record: str | Path | None = None,
    record_fps: float = 5.0,
) -> None:
    """Serve a policy until SIGTERM or Ctrl-C; then answer queued requests, refuse new ones, and return.

    Args:
        load: loads the policy.
        host: address to listen on; `0.0.0.0` opens it to the network.
        port: 0 takes a free one; the log names it.
        token: see `build_app`.
        max_batch, max_queue: see `Batcher`.
        max_wait_ms: milliseconds to wait for more robots before acting for one.
        max_connections: largest number of connections at a time.
        deadline_ms: see `Service`, in milliseconds.
        receive_seconds: time for a whole request to arrive; a slower one gets 408.
        stop_seconds: time for queued requests when stopping.
        max_bytes, max_pixels: see `Service`.
        record, record_fps: folder and rate of a LeRobot dataset of requests and answers, see `Logbook`; None: no
            recording.

    Raises:
        ValueError: for a limit that is not positive, or a port in use; raised before the policy is loaded.
    """
    positive: dict[str, float] = {"max_batch": max_batch, "max_queue": max_queue, "max_connections": max_connections}
    positive |= {"deadline_ms": deadline_ms, "receive_seconds": receive_seconds, "max_bytes": max_bytes}
    positive |= {"max_pixels": max_pixels, "record_fps": record_fps}
    if wrong := [f"{name}={value}" for name, value in positive.items() if value <= 0]:
        raise ValueError(f"these must be positive: {', '.join(wrong)}")
    if host not in LOOPBACK and not token:
        log.warning(f"Anyone who reaches {host}:{port} can use this policy: set OPENVLA_LIGHTNING_TOKEN to ask for one")
    check_port(host, port)
    logbook = None if record is None else Logbook(record, record_fps)
    policy = load()
    sizes = [size for size in BATCH_SIZES if size < max_batch]
    log.info(f"Warmed up in {policy.warm_up([*sizes, max_batch]):.1f} s")
    latency = policy.warm_up()
    rate = 1 / latency
    log.info(speed(rate, policy.processor.action_head.action_chunk))
    too_tight = beyond(latency, policy.warm_up([max_batch]), deadline_ms, max_wait_ms, max_batch, max_queue)
    for problem in too_tight:
        log.warning(problem)
    seconds = max_wait_ms / 1000, max_queue, deadline_ms / 1000
    service = Service(policy, max_batch, *seconds, max_bytes, max_pixels, round(rate, 2), logbook)
    service.warnings = too_tight
    config = uvicorn.Config(
        build_app(service, token or None),
        host=host,
        port=port,
        http=functools.partial(PunctualProtocol, receive_seconds),  # type: ignore[arg-type]
        ws="websockets-sansio",
        ws_max_size=max_bytes,
        ws_per_message_deflate=False,  # images are compressed already; this also prevents decompression bombs
        limit_concurrency=max_connections,
        timeout_graceful_shutdown=int(stop_seconds) + 1,
        log_config=None,
        access_log=False,
        server_header=False,
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    Server(config, service, stop_seconds).run()
    service.batcher.join()
    if logbook is not None:
        logbook.close()
    log.info("Stopped")


def check_port(host: str, port: int) -> None:
    """Raise ValueError if the port cannot be used; this is fast, while loading a policy takes minutes."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
    except (OSError, OverflowError) as error:  # the latter for a number that is no port
        problem = getattr(error, "strerror", None) or error
        hint = "choose another with server.port=..., or 0 for a free one"
        raise ValueError(f"server.host={host} server.port={port}: {problem}; {hint}") from None


def speed(rate: float, action_chunk: int) -> str:
    """A line about `rate` answers a second, each of `action_chunk` actions."""
    if action_chunk == 1:
        return f"{rate:.1f} actions a second for one robot"
    return f"{rate:.1f} chunks of {action_chunk} actions a second for one robot"


def beyond(
    latency: float, batch_latency: float, deadline_ms: float, max_wait_ms: float, max_batch: int, max_queue: int
) -> list[str]:
    """Messages about limits that cannot be met at the measured speed, with better values; empty if all can be met.

    Args:
        latency: measured seconds for one robot.
        batch_latency: seconds for `max_batch` robots together.
        deadline_ms, max_wait_ms, max_batch, max_queue: as in `serve`.
    """
    messages, deadline, wait = [], deadline_ms / 1000, max_wait_ms / 1000
    if latency + wait > deadline:
        needed = math.ceil(2000 * (latency + wait))
        messages.append(
            f"server.deadline_ms={deadline_ms:g} is less than the {1000 * (latency + wait):.0f} ms that one action "
            f"takes here: every request will be refused as stale. server.deadline_ms={needed} leaves time to spare"
        )
    elif batch_latency + wait > deadline and max_batch > 1:
        messages.append(
            f"server.max_batch={max_batch} takes {1000 * (batch_latency + wait):.0f} ms, more than "
            f"server.deadline_ms={deadline_ms:g}: when many robots ask at once, they are refused as stale"
        )
    else:
        served = int((deadline - wait) / batch_latency) * max_batch
        if served < max_queue:
            log.info(f"Of a full queue of {max_queue}, {served} are answered before the deadline (server.max_queue)")
    return messages


class Server(uvicorn.Server):
    """uvicorn's server; after the first signal, every accepted request is still answered, over WebSockets, too."""

    def __init__(self, config: uvicorn.Config, service: Service, stop_seconds: float) -> None:
        super().__init__(config)
        self._service, self._stop_seconds = service, stop_seconds
        self._stop_by: float | None = None

    async def startup(self, *args: Any, **kwargs: Any) -> None:
        """Listen, and log the address."""
        await super().startup(*args, **kwargs)
        for server in self.servers:
            host, port = server.sockets[0].getsockname()[:2]
            log.info(f"Ready: http://{host}:{port}/act")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop after all answers; stop at once at the second signal."""
        now = time.monotonic()
        if self._stop_by is None:
            log.info(f"{signal.Signals(sig).name}: stopping")
            self._stop_by = now + self._stop_seconds
        elif now - (self._stop_by - self._stop_seconds) > SAME_SIGNAL:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Whether to end: after a signal, when no request is waiting."""
        if self._stop_by is not None:
            self._service.batcher.close()
            late = time.monotonic() > self._stop_by
            self.should_exit = self.should_exit or late or not self._service.open
        return await super().on_tick(counter)


class PunctualProtocol(H11Protocol):
    """uvicorn's protocol with a time limit for the arrival of a whole request."""

    def __init__(self, seconds: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Keep the timer running while the request is incomplete."""
        super().data_received(data)
        upgraded = self.transport.get_protocol() is not self  # to a WebSocket, which has no time limit
        if not upgraded and self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._wait()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self._seconds, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            refusal = Refused(408, "too_slow", f"a request has to arrive within {self._seconds:g} s")
            body = json.dumps(refusal.body).encode()
            head = f"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()
