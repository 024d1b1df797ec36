"""msgbus on RabbitMQ's quorum queues. Chosen by a URL: `amqp://`, `amqps://`."""

from msgbus_rabbitmq.adapter import RabbitAdapter

__all__ = ["RabbitAdapter"]
