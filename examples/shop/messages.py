"""What the services tell each other: the one module that all of them import."""

from __future__ import annotations

from pydantic import BaseModel

from msgbus import Topic


class OrderPlaced(BaseModel):
    order_id: str
    customer: str
    item: str
    cents: int


class InvoicePaid(BaseModel):
    invoice: int
    order_id: str
    customer: str
    item: str
    cents: int


# The key: what happens to one customer happens in the order in which that customer bought.
orders_placed = Topic("orders.placed", OrderPlaced, key="customer")
invoices_paid = Topic("invoices.paid", InvoicePaid, key="customer")
