"""msgbus on Apache Kafka, by aiokafka: `kafka://` and `kafkas://`."""

from msgbus_kafka.adapter import KafkaAdapter

__all__ = ["KafkaAdapter"]
