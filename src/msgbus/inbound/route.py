"""Route: one subscription, resolved and bound: how a job becomes an outcome. All that can be done once is done when it is made."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import hashlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Executor
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar

from msgbus.context import Context
from msgbus.contract.codec import Codec
from msgbus.contract.outcome import DONE, Outcome
from msgbus.errors import BatchFailed, DecodeError, Drop, Reject, RetryLater
from msgbus.inbound.job import Job
from msgbus.inbound.plan import Plan
from msgbus.inbound.reading import age_of, reader
from msgbus.middleware.base import Middleware, compose
from msgbus.publishing import Publishes, handling

M = TypeVar("M")

Invoke = Callable[[Context], Awaitable[Outcome]]

EXITS = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)
"""What ends the process, or the run, by another's will: no failure of the handler. Any other error of it is one."""


class Route(Generic[M]):
    """A plan at work. Used by one event loop at a time."""

    def __init__(
        self,
        plan: Plan,
        codec: Codec[M],
        publisher: Publishes,
        middleware: Sequence[Middleware],
        executor: Executor | None,
    ) -> None:
        self.plan = plan
        self._topic = plan.topic.name
        self._group = plan.group or plan.name
        self._retry = plan.retry
        self._publisher = publisher
        self.read = reader(plan.topic, codec)
        """Envelope → message; raises `DecodeError`."""
        self._timeout = plan.timeout
        self._executor = executor
        self._handler = plan.handler
        self._context_name = plan.signature.context
        self._session_name = plan.signature.session
        self.call: Callable[[Any, Context | list[Context]], Awaitable[Any]]
        """The handler's own run, with its timeout; of a batch, with a list of messages and one of contexts."""
        self.call = self._call_sync if not plan.signature.is_async else self._call_async if plan.timeout is None else self._call_in_time
        innermost: Invoke = self._invoke
        self._chain = compose(middleware, "consume", innermost)
        self._middleware = tuple(middleware)
        self._has_middleware = self._chain is not innermost

    async def handle(self, job: Job) -> Outcome:
        """Runs the handler once for a job. Never raises but for cancellation: what goes wrong is the outcome."""
        try:
            if self._timeout is None:
                context = Context(job.envelope, self._publisher, topic=self._topic, group=self._group, attempt=job.attempt)
            else:
                context = self._context(job)
            outcome = await self._chain(context)
        except EXITS:
            raise
        except BaseException as error:
            return self.failed(job, error)
        if self._has_middleware:
            return self._checked(job, outcome)
        return outcome

    def _checked(self, job: Job, outcome: object) -> Outcome:
        """What a user's middleware returned, if it is an outcome; a forgotten `return` is a failure like any other."""
        if isinstance(outcome, Outcome):
            return outcome
        return self.failed(job, TypeError(f"middleware returned {outcome!r}, not an Outcome: return what call_next returned"))

    def failed(self, job: Job, error: BaseException) -> Outcome:
        """What the retry policy says of a run that ended in this error."""
        return self._retry.next_action(job.attempt, error, age_of(job.envelope))

    def _context(self, job: Job) -> Context:
        deadline = None if self._timeout is None else datetime.now(UTC) + timedelta(seconds=self._timeout)
        return Context(job.envelope, self._publisher, topic=self._topic, group=self._group, attempt=job.attempt, deadline=deadline)

    async def _invoke(self, context: Context) -> Outcome:
        message = self.read(context.envelope)
        try:
            result = await self.call(message, context)
            if self.plan.publish_to is not None:
                await context.publish(self.plan.publish_to, result, id=derived_id(context.id, self._group))
        except (Reject, RetryLater, Drop) as word:
            return self._retry.next_action(context.attempt, word, age_of(context.envelope))
        return DONE

    def member_outcome(self, context: Context, error: Exception | None) -> Outcome | Exception:
        """What a batch's error, or none, means for one member."""
        if error is None:
            return DONE
        if isinstance(error, Reject | RetryLater | Drop):
            return self._retry.next_action(context.attempt, error, age_of(context.envelope))
        return error

    def _call_async(self, message: Any, context: Context | list[Context]) -> Awaitable[Any]:
        if self._session_name is not None:
            return self._call_in_session(message, context)
        name = self._context_name
        running: Awaitable[Any] = self._handler(message) if name is None else self._handler(message, **{name: context})
        return running

    def _call_in_session(self, message: Any, context: Context | list[Context]) -> Awaitable[Any]:
        running: Awaitable[Any] = self._handler(message, **self._session_of(context), **self._named(context))
        return running

    def _named(self, context: Any) -> dict[str, Any]:
        return {} if self._context_name is None else {self._context_name: context}

    def _session_of(self, context: Context | list[Context]) -> dict[str, Any]:
        """No batch handler takes a session: `bind` refused it."""
        return {} if self._session_name is None or isinstance(context, list) else {self._session_name: context.session}

    def _call_sync(self, message: Any, context: Context | list[Context]) -> Awaitable[Any]:
        loop = asyncio.get_running_loop()
        arguments = self._session_of(context)
        if (name := self._context_name) is not None:
            arguments[name] = [one.in_thread(loop) for one in context] if isinstance(context, list) else context.in_thread(loop)
        run: Callable[[], Any] = functools.partial(contextvars.copy_context().run, _call, self._handler, message, **arguments)
        return loop.run_in_executor(self._executor, run)

    async def _call_in_time(self, message: Any, context: Context | list[Context]) -> Any:
        timeout = self._timeout
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                return await self._call_async(message, context)
        except TimeoutError as error:
            if limit.expired():
                raise TimeoutError(f"{self.plan.name} ran longer than its timeout of {timeout:g} s") from error
            raise

    # ------------------------------------------------------------ batches

    async def handle_batch(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Runs a batch handler once for these jobs; one outcome a job. Never raises but for cancellation.

        Every member passes the middleware on its own; those that reach the innermost share one call of the handler.
        """
        if not self._has_middleware:
            gathering = Gathering(self, len(jobs))
            return await gathering.call_for([self._context(job) for job in jobs], jobs)
        gathering = Gathering(self, len(jobs))
        chain = compose(self._middleware, "consume", gathering.join)
        async with asyncio.TaskGroup() as group:
            gathering.group = group
            tasks = [group.create_task(self._member(job, chain, gathering)) for job in jobs]
        return [
            self.failed(job, asyncio.CancelledError("the handler was cancelled, and not by us")) if task.cancelled() else task.result()
            for job, task in zip(jobs, tasks, strict=True)
        ]

    async def _member(self, job: Job, chain: Invoke, gathering: Gathering) -> Outcome:
        token = handling.set(job.envelope)
        try:
            return self._checked(job, await chain(self._context(job)))
        except Exception as error:
            return self.failed(job, error)
        finally:
            handling.reset(token)
            gathering.left()


class Gathering:
    """One call of a batch handler, and the members that share it."""

    def __init__(self, route: Route[Any], expected: int) -> None:
        self.group: asyncio.TaskGroup | None = None
        self._route = route
        self._expected = expected
        self._members: list[tuple[Context, Any, asyncio.Future[Outcome]]] = []
        self._called = False

    async def join(self, context: Context) -> Outcome:
        """A member's innermost: waits until every other one has come or ended, then for the handler.

        A second `call_next` after the one call that the members share fails: there is nobody to share another with.
        """
        message = self._route.read(context.envelope)
        if self._called:
            raise RuntimeError("call_next was called again, after the batch's handler had been: let the retry policy run it again")
        outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        member = (context, message, outcome)
        self._members.append(member)
        self._call_when_complete()
        try:
            return await outcome
        finally:
            if not self._called:  # a middleware's own time-out: it takes no part
                self._members.remove(member)

    def left(self) -> None:
        """A member's chain has ended."""
        if not self._called:
            self._expected -= 1
            self._call_when_complete()

    def _call_when_complete(self) -> None:
        if not self._called and self._members and len(self._members) == self._expected and self.group is not None:
            self._called = True
            self.group.create_task(self._call())

    async def _call(self) -> None:
        contexts = [context for context, _, _ in self._members]
        try:
            results = await self._outcomes(contexts, [message for _, message, _ in self._members])
        except asyncio.CancelledError:  # a task group takes no notice of a cancelled task: the members would wait for ever
            for _, _, future in self._members:
                future.cancel()
            raise
        for (_, _, future), result in zip(self._members, results, strict=True):
            if future.done():
                continue
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)

    async def call_for(self, contexts: Sequence[Context], jobs: Sequence[Job]) -> list[Outcome]:
        """The shared call without middleware. Members that cannot be decoded do not take part."""
        outcomes: list[Outcome | None] = [None] * len(jobs)
        good: list[int] = []
        messages: list[Any] = []
        for index, context in enumerate(contexts):
            try:
                messages.append(self._route.read(context.envelope))
                good.append(index)
            except DecodeError as error:
                outcomes[index] = self._route.failed(jobs[index], error)
        if good:
            results = await self._outcomes([contexts[index] for index in good], messages)
            for index, result in zip(good, results, strict=True):
                outcomes[index] = self._route.failed(jobs[index], result) if isinstance(result, BaseException) else result
        return [outcome for outcome in outcomes if outcome is not None]

    async def _outcomes(self, contexts: list[Context], messages: list[Any]) -> Sequence[Outcome | Exception]:
        """What the one call means for each member: an outcome, or the error that it failed with."""
        try:
            await self._route.call(messages, contexts)
        except BatchFailed as failed:
            strange = [index for index in failed.errors if not 0 <= index < len(contexts)]
            if strange:
                error = IndexError(f"BatchFailed names member {strange[0]} of a batch of {len(contexts)}")
                return [error] * len(contexts)
            return [self._route.member_outcome(context, failed.errors.get(index)) for index, context in enumerate(contexts)]
        except Exception as error:
            return [self._route.member_outcome(context, error) for context in contexts]
        return [DONE] * len(contexts)


def _call(handler: Callable[..., Any], message: Any, /, **arguments: Any) -> Any:
    """A sync handler's call. A coroutine that it returns would never run, and its message would count as done."""
    try:
        result = handler(message, **arguments)
    except StopIteration as error:  # no future can hold one: its message would never end
        raise RuntimeError("the handler raised StopIteration") from error
    if isinstance(result, Awaitable):
        if isinstance(result, Coroutine):
            result.close()
        raise TypeError("the handler is no async function, yet it returned something to be awaited: make it async def")
    return result


def derived_id(message_id: str, group: str) -> str:
    """The id of what a handler returns: the same each time the same message is handled, so that a repetition can be recognised."""
    return hashlib.blake2b(f"{message_id}\0{group}".encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
