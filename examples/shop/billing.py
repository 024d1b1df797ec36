"""Writes an invoice for each order, and says that it is paid: one transaction with the note that the order's message is done."""

from __future__ import annotations

from examples.shop.database import connect, opened
from examples.shop.messages import InvoicePaid, OrderPlaced, invoices_paid, orders_placed
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from msgbus import Bus
from msgbus.stores.sql import SqlStore


class Base(DeclarativeBase): ...


class Invoice(Base):
    __tablename__ = "invoices"
    number: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[str]  # not unique, so that a second invoice would be seen: that there is none is the inbox's doing
    customer: Mapped[str]
    item: Mapped[str]
    cents: Mapped[int]


engine = connect("billing")
store = SqlStore(async_sessionmaker(engine, expire_on_commit=False), create_tables=True)
bus = Bus(service="billing", store=store, lifespan=lambda _: opened(engine, Base.metadata))


@bus.subscribe(orders_placed, publish_to=invoices_paid)
async def invoice(order: OrderPlaced, session: AsyncSession) -> InvoicePaid:
    made = Invoice(**order.model_dump())
    session.add(made)
    await session.flush()  # gives it its number
    return InvoicePaid(invoice=made.number, **order.model_dump())
