"""The service: what a user of msgbus writes. Three groups, each of which gets every departure."""

from __future__ import annotations

import asyncio

from examples.flights.data import LATE
from examples.flights.results import Results
from pydantic import BaseModel

from msgbus import Bus, Context, Router, Topic


class Departure(BaseModel):
    """A flight that left. Without `dep_time` it was cancelled: such a message does not fit, and becomes a dead letter."""

    number: int
    carrier: str
    flight: int
    tailnum: str | None = None
    origin: str
    dest: str
    dep_time: int
    dep_delay: int


class LateDeparture(BaseModel):
    """What `alerts` tells the world, whether or not anybody listens yet."""

    number: int
    flight: str
    origin: str
    dest: str
    minutes: int


departures = Topic("departures", Departure, key="tailnum")
late_departures = Topic("late-departures", LateDeparture)


def flights(results: Results) -> Router:
    """The handlers, which write down what they find in `results`."""
    router = Router()

    @router.subscribe(departures, group="punctuality", ordered=False)
    async def punctuality(departure: Departure) -> None:
        """Statistics a carrier. Sums do not care about order, so this group gives it up."""
        if results.punctuality.first_time(departure.number):
            results.carriers[departure.carrier].add(departure.dep_delay)

    @router.subscribe(departures, group="rotation")
    async def rotation(departure: Departure) -> None:
        """A plane's day. The topic has a key, so each plane's departures come one after the other, in the order published."""
        await asyncio.sleep(0)  # the look at a database that a real one would take: meanwhile others run, of other planes
        if results.rotation.first_time(departure.number) and departure.tailnum is not None:
            results.planes.departed(departure.tailnum, departure.number)

    @router.subscribe(departures, group="alerts", ordered=False)
    async def alerts(departure: Departure, context: Context) -> None:
        """Publishes what is late. Its id follows from the departure's: if this runs twice, that is the same message again."""
        if departure.dep_delay > LATE:
            flight = f"{departure.carrier}{departure.flight}"
            late = LateDeparture(
                number=departure.number, flight=flight, origin=departure.origin, dest=departure.dest, minutes=departure.dep_delay
            )
            await context.publish(late_departures, late, id=f"late-{context.id}")
        results.alerts.first_time(departure.number)

    return router


bus = Bus(service="flights", routers=[flights(Results())])
"""For the command line: `msgbus explain examples.flights.service:bus`."""
