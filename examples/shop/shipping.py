"""Ships what is paid."""

from __future__ import annotations

from examples.shop.database import connect, opened
from examples.shop.messages import InvoicePaid, invoices_paid
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from msgbus import Bus
from msgbus.stores.sql import SqlStore


class Base(DeclarativeBase): ...


class Shipment(Base):
    __tablename__ = "shipments"
    number: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[str]  # not unique, as in billing
    customer: Mapped[str]
    item: Mapped[str]
    cents: Mapped[int]


engine = connect("shipping")
store = SqlStore(async_sessionmaker(engine, expire_on_commit=False), create_tables=True)
bus = Bus(service="shipping", store=store, lifespan=lambda _: opened(engine, Base.metadata))


@bus.subscribe(invoices_paid)
async def ship(invoice: InvoicePaid, session: AsyncSession) -> None:
    session.add(Shipment(**invoice.model_dump(exclude={"invoice"})))
