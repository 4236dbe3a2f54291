"""The Starlette example with two pages that stay open: /live, a websocket, and /events, a stream of events."""

import asyncio
import json
import os
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from examples.asgi_app import app as app
from shmsession import Session


async def live(websocket: WebSocket) -> None:
    """Say what changes, and count what is sent; close with 1008 and the reason when the session ends."""
    session = Session.of(websocket)
    changes = session.changes()
    await websocket.accept()
    await websocket.send_text(str(os.getpid()))

    async def tell() -> None:
        async for keys in changes:
            await websocket.send_text(json.dumps({key: session.get(key) for key in keys}))
        await websocket.close(1008, str(session.ended))

    telling = asyncio.create_task(tell())
    while (message := await websocket.receive())["type"] == "websocket.receive":
        await websocket.send_text(str(session.increment(message["text"])))
    telling.cancel()


async def events(request: Request) -> StreamingResponse:
    """The same as events of a stream, which counts them in the session."""
    session = Session.of(request)
    changes = session.changes()

    async def tell() -> AsyncIterator[str]:
        yield f"data: {os.getpid()}\n\n"
        async for keys in changes:
            yield f"data: {json.dumps({key: session.get(key) for key in keys})}\n\n"
        session["seen"] = True  # nobody keeps it: the session is gone
        yield f"event: end\ndata: {session.ended}\n\n"

    return StreamingResponse(tell(), media_type="text/event-stream")


app.router.routes += [WebSocketRoute("/live", live), Route("/events", events)]
