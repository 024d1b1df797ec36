"""Takes orders over HTTP. Needs its database alone: what it has to tell is a row of the same transaction, and a relay sends it."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from examples.shop.database import connect, opened
from examples.shop.messages import OrderPlaced, orders_placed
from fastapi import FastAPI, Header, HTTPException, Response
from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from msgbus import Bus
from msgbus.stores.sql import SqlStore


class Base(DeclarativeBase): ...


class Order(Base):
    __tablename__ = "orders"
    number: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[str]
    request: Mapped[str] = mapped_column(unique=True)  # the customer's Idempotency-Key: a request that comes again is the same order
    customer: Mapped[str]
    item: Mapped[str]
    cents: Mapped[int]


class Purchase(BaseModel):
    customer: str = Field(min_length=1, max_length=100)
    item: str = Field(min_length=1, max_length=100)
    cents: int = Field(ge=1)


class Accepted(BaseModel):
    order_id: str


engine = connect("orders")
sessions = async_sessionmaker(engine, expire_on_commit=False)
store = SqlStore(sessions, create_tables=True)  # in production a migration makes the tables
bus = Bus(service="orders", store=store)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
    async with opened(engine, Base.metadata):
        await store.create_tables()  # elsewhere the bus does it when it starts; this one is never entered
        yield


app = FastAPI(title="orders", lifespan=lifespan)


@app.post("/orders", status_code=201)
async def buy(purchase: Purchase, idempotency_key: Annotated[str, Header(min_length=1, max_length=100)], response: Response) -> Accepted:
    """201: bought, for good. 200: this request was answered before, with this order. 422: it was another purchase then."""
    order = Order(order_id=uuid.uuid4().hex, request=idempotency_key, **purchase.model_dump())
    message = OrderPlaced(order_id=order.order_id, **purchase.model_dump())
    try:
        async with sessions.begin() as session:
            session.add(order)
            await session.flush()  # fails here if the request is known
            # The key names the effect: an order is one invoice, however often and by whomever its message is published.
            await bus.outbox(session).publish(orders_placed, message, idempotency_key=order.order_id)
    except IntegrityError:
        response.status_code = 200
        return await answered_before(purchase, idempotency_key)
    return Accepted(order_id=order.order_id)


async def answered_before(purchase: Purchase, request: str) -> Accepted:
    async with sessions() as session:
        order = (await session.scalars(select(Order).where(Order.request == request))).one()
    if Purchase(customer=order.customer, item=order.item, cents=order.cents) != purchase:
        raise HTTPException(422, "this Idempotency-Key came before, with another purchase")
    return Accepted(order_id=order.order_id)
