"""Customers: each buys one thing after the other over HTTP, and asks again, with the same key, until there is an answer."""

from __future__ import annotations

import asyncio
import random
import uuid
from dataclasses import dataclass, field

import httpx
from examples.shop.books import Line
from examples.shop.parts import ShopError
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_random

ITEMS = {"tea": 350, "cup": 1290, "kettle": 4900, "tray": 2250}
NAMES = ("ann", "ben", "cem", "dag", "eva", "flo", "gil", "hua", "ida", "jon")
IMPATIENCE = 0.2
"""How many of the purchases are sent twice at once: somebody clicks twice."""
PATIENCE = 60.0
"""Seconds until a customer who gets no answer gives up, and the demo with it."""


@dataclass
class Told:
    """What the shop has told its customers."""

    accepted: list[Line] = field(default_factory=list[Line])
    """Of each customer in the order bought."""
    unanswered: int = 0
    """Requests that had to be sent again: refused connections, broken ones, errors of the server."""
    repeated: int = 0
    """Requests of which the shop said that it had answered them before."""
    two_orders: int = 0
    """Requests that became two orders. There must be none."""


class Unanswered(ShopError):
    """Nobody answered, or with an error that is worth another try."""


async def go_shopping(url: str, orders: int, seconds: float, told: Told) -> None:
    """All customers at once buy `orders` things between them, within about so many seconds."""
    async with httpx.AsyncClient(base_url=url, timeout=5) as client, asyncio.TaskGroup() as group:
        for number, name in enumerate(NAMES):
            share = len(range(number, orders, len(NAMES)))
            if share:
                group.create_task(_shop(client, name, share, seconds / share, told))


async def _shop(client: httpx.AsyncClient, name: str, count: int, pause: float, told: Told) -> None:
    for _ in range(count):
        await asyncio.sleep(pause * random.uniform(0.5, 1.5))
        item = random.choice(list(ITEMS))
        request = uuid.uuid4().hex
        clicks = 2 if random.random() < IMPATIENCE else 1
        answers = await asyncio.gather(*(_buy(client, request, name, item, told) for _ in range(clicks)))
        told.accepted.append(Line(answers[0], name, item, ITEMS[item]))
        told.two_orders += len(set(answers)) > 1


@retry(retry=retry_if_exception_type(Unanswered), wait=wait_random(0.1, 0.5), stop=stop_after_delay(PATIENCE), reraise=True)
async def _buy(client: httpx.AsyncClient, request: str, customer: str, item: str, told: Told) -> str:
    """The order's id, once the shop has taken it."""
    try:
        purchase = {"customer": customer, "item": item, "cents": ITEMS[item]}
        response = await client.post("/orders", json=purchase, headers={"Idempotency-Key": request})
    except httpx.TransportError as error:
        told.unanswered += 1
        raise Unanswered(f"{type(error).__name__}: {error}") from error
    if response.is_server_error:
        told.unanswered += 1
        raise Unanswered(f"{response.status_code}: {response.text}")
    told.repeated += response.status_code == 200
    order_id: str = response.raise_for_status().json()["order_id"]
    return order_id
