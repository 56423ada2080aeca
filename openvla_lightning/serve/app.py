"""The web application: /act, /health, /info, /metrics, /openapi.json, and the WebSockets of `protocols`."""

import asyncio
import platform
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import json_numpy
import numpy as np
import torch
import transformers
from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.websockets import WebSocketDisconnect

import openvla_lightning
from openvla_lightning.policy import Policy
from openvla_lightning.serve.batching import Batcher, stale
from openvla_lightning.serve.errors import Refused
from openvla_lightning.serve.guard import Guard, refused
from openvla_lightning.serve.openapi import description
from openvla_lightning.serve.protocols import PROTOCOLS, OwnProtocol
from openvla_lightning.serve.reading import Question, Reader
from openvla_lightning.serve.recording import Logbook

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Service:
    """A policy with reading, batching and recording of requests, without the network itself.

    Args:
        policy: the policy.
        max_batch, max_wait, max_queue: see `Batcher`.
        deadline: seconds after which a request is not answered; clients may ask for less.
        max_bytes: largest request.
        max_pixels: largest image.
        rate_hz: measured actions per second for one robot, for /info.
        logbook: records requests and answers; None: no recording.
    """

    def __init__(
        self,
        policy: Policy,
        max_batch: int = 16,
        max_wait: float = 0.0,
        max_queue: int = 256,
        deadline: float = 1.0,
        max_bytes: int = 2**23,
        max_pixels: int = 2**22,
        rate_hz: float | None = None,
        logbook: Logbook | None = None,
    ) -> None:
        self.logbook = logbook
        self.policy, self.deadline, self.max_bytes, self.rate_hz = policy, deadline, max_bytes, rate_hz
        processor = policy.processor
        self.reader = Reader(
            processor.transform.resize, policy.norm_stats, max_pixels, processor.views, policy.reads["proprio"]
        )
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.answers = Counter(
            "openvla_requests", "Requests for an action", ["transport", "code"], registry=self.registry
        )
        self.latency = Histogram(
            "openvla_latency_seconds",
            "From a request's first byte to its action",
            ["transport"],
            buckets=(0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.1, 0.2, 0.35, 0.5, 1, 2, 5),
            registry=self.registry,
        )
        batches = Histogram(
            "openvla_batch_size", "Robots acted on together", buckets=BATCH_SIZES, registry=self.registry
        )
        self.batcher = Batcher(policy.act_chunk, max_batch, max_wait, max_queue, batches.observe)
        Gauge("openvla_queue", "Requests that wait", registry=self.registry).set_function(self.batcher.waiting)
        self.open = 0
        """Number of requests that are being answered."""
        self.warnings: list[str] = []
        """Limits that cannot be met at the measured speed, for /health."""

    async def act(
        self, transport: str, began: float, read: Callable[[], Question], robot: str = ""
    ) -> tuple[Question, np.ndarray]:
        """Read and answer a request of `robot` with an action [D], or if requested with a chunk [T, D].

        Raises:
            Refused: when there is no action.
        """
        question = await asyncio.to_thread(read)
        allowed = self.deadline
        if question.deadline_ms is not None:
            allowed = min(allowed, question.deadline_ms / 1000)
        future = self.batcher.submit(question, began + allowed)
        try:
            chunk = await asyncio.wait_for(asyncio.wrap_future(future), began + allowed - time.monotonic())
        except TimeoutError:
            raise stale() from None
        self.latency.labels(transport).observe(time.monotonic() - began)
        if self.logbook is not None:
            self.logbook.note(robot, question.observation, chunk, question.chunk)
        return question, chunk if question.chunk else chunk[0]

    def counted(self, transport: str, code: str) -> None:
        """Count an answer: `ok`, or the code of the refusal."""
        self.answers.labels(transport, code).inc()

    def info(self) -> dict[str, Any]:
        """Facts about the policy, for robots and people."""
        policy = self.policy
        statistics = {
            key: entry.to_dict() if hasattr(entry, "to_dict") else dict(entry)
            for key, entry in policy.norm_stats.items()
        }
        return {
            "unnorm_key": policy.unnorm_key,
            "action_dim": policy.statistics.action_dim,
            "normalisation": policy.normalisation,
            "statistics": statistics,
            "cameras": list(policy.processor.views),
            "proprio": "proprio" in self.reader.needed,
            "action_chunk": policy.processor.action_head.action_chunk,
            "image_size": policy.processor.transform.image_size,
            "rate_hz": self.rate_hz,
            "device": str(policy.device),
            "dtype": str(policy.dtype).removeprefix("torch."),
            "quantisation": policy.vla.quantisation,
            "deadline_ms": 1000 * self.deadline,
            "max_bytes": self.max_bytes,
            "max_pixels": self.reader.max_pixels,
            "versions": {
                "openvla_lightning": openvla_lightning.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }


def build_app(service: Service, token: str | None = None) -> FastAPI:
    """The application.

    Args:
        service: answers the requests.
        token: clients must send it as `Authorization: Bearer <token>`, except to /health; None: no token.
    """
    app = FastAPI(title="openvla_lightning", docs_url=None, redoc_url=None)
    app.openapi = partial(description, service.reader, service.max_bytes, token is not None)  # type: ignore[method-assign]
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _failure)

    @app.post("/act")
    async def act(request: Request) -> Response:
        began, code = time.monotonic(), "internal"
        service.open += 1
        try:
            body = await _body(request, service.max_bytes)
            robot = request.client.host if request.client else "http"
            question, action = await service.act("http", began, partial(service.reader.from_json, body), robot)
            code = "ok"
            if not (question.oft or question.encoded):
                return JSONResponse(action.tolist())
            arrays = json_numpy.dumps(list(action) if question.oft else action)
            return JSONResponse(arrays) if question.encoded else Response(arrays, media_type="application/json")
        except Refused as error:
            code = error.code
            return refused(error)
        finally:
            service.open -= 1
            service.counted("http", code)

    for address, spoken in PROTOCOLS.items():
        app.add_api_websocket_route(address, partial(_converse, service, spoken))

    @app.get("/health")
    async def health() -> Response:
        if not service.batcher.alive:
            return JSONResponse({"status": "stopping"}, 503)
        if service.warnings:
            return JSONResponse({"status": "too_slow", "warnings": service.warnings})
        return JSONResponse({"status": "ok"})

    @app.get("/info")
    async def info() -> Response:
        return JSONResponse(service.info())

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    if token is not None:
        app.add_middleware(Guard, token=token)
    return app


async def _converse(service: Service, spoken: type[OwnProtocol], socket: WebSocket) -> None:
    """Answer the messages of one client, in order, until it disconnects."""
    protocol = spoken(service.reader, service.info)
    await socket.accept()
    robot = f"{protocol.name} {id(socket)}"
    try:
        if (greeting := protocol.greeting()) is not None:
            await socket.send_bytes(greeting)
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            began, code = time.monotonic(), "internal"
            content: bytes | str = message.get("bytes") or message.get("text") or b""
            service.open += 1
            try:
                answer, code = await _answered(service, protocol, content, began, robot)
                if answer is not None:
                    await (socket.send_text(answer) if isinstance(answer, str) else socket.send_bytes(answer))
            finally:
                service.open -= 1
                if code:
                    service.counted(protocol.name, code)
    except WebSocketDisconnect:
        return
    finally:
        if service.logbook is not None:
            service.logbook.end(robot)


async def _answered(
    service: Service, protocol: OwnProtocol, content: bytes | str, began: float, robot: str
) -> tuple[bytes | str | None, str]:
    """The answer to a message, and what to count it as; nothing for a message that asks for no action."""
    try:
        if not await asyncio.to_thread(protocol.asks, content):
            return protocol.reply(content), ""
        if (held := protocol.held()) is not None:
            question = await asyncio.to_thread(protocol.read, content)  # the request is checked in any case
            return protocol.answer(question, held, time.monotonic() - began), "ok"
        question, action = await service.act(protocol.name, began, partial(protocol.read, content), robot)
        return protocol.answer(question, action, time.monotonic() - began), "ok"
    except Refused as error:
        return protocol.refusal(error), error.code


async def _body(request: Request, limit: int) -> bytes:
    refusal = Refused(413, "too_large", f"a request may have {limit} bytes; scale the image or send a JPEG")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise refusal
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise refusal
    except ClientDisconnect:
        raise Refused(408, "too_slow", "the request ended before its body did") from None
    return bytes(body)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = f"POST /act; GET /health, /info, /metrics, /openapi.json; WebSocket {', '.join(PROTOCOLS)}"
    refusal = Refused(error.status_code, "no_such_thing", f"{error.detail}; there are {known}")
    return refused(refusal, dict(error.headers or {}))


async def _failure(request: Request, error: Exception) -> Response:
    return refused(Refused(500, "internal", "the server failed; its log says why"))
