CREATE TABLE msgbus_outbox (
    id BIGINT NOT NULL AUTO_INCREMENT,
    message_id VARBINARY(255) NOT NULL,
    topic VARBINARY(255) NOT NULL,
    `key` VARBINARY(255),
    shard SMALLINT NOT NULL,
    content_type VARCHAR(255) NOT NULL,
    headers LONGTEXT NOT NULL,
    payload LONGBLOB NOT NULL,
    options LONGTEXT NOT NULL,
    created_at BIGINT NOT NULL,
    available_at BIGINT NOT NULL,
    expires_at BIGINT,
    status SMALLINT NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    last_error VARCHAR(2000),
    sent_at BIGINT,
    PRIMARY KEY (id),
    CONSTRAINT msgbus_outbox_message_id UNIQUE (message_id)
);
CREATE INDEX msgbus_outbox_due ON msgbus_outbox (shard, status, available_at, id);
CREATE INDEX msgbus_outbox_key ON msgbus_outbox (`key`, status, id);
CREATE INDEX msgbus_outbox_sent_at ON msgbus_outbox (sent_at);
CREATE INDEX msgbus_outbox_shard ON msgbus_outbox (shard, status, id, available_at);
CREATE TABLE msgbus_inbox (
    consumer VARBINARY(255) NOT NULL,
    message_id VARBINARY(255) NOT NULL,
    state SMALLINT NOT NULL,
    token VARCHAR(36),
    fingerprint VARCHAR(64) NOT NULL,
    result LONGBLOB,
    created_at BIGINT NOT NULL,
    completed_at BIGINT,
    expires_at BIGINT NOT NULL,
    PRIMARY KEY (consumer, message_id)
);
CREATE INDEX msgbus_inbox_expires_at ON msgbus_inbox (expires_at);
CREATE TABLE msgbus_relay_shard (
    shard SMALLINT NOT NULL,
    owner VARCHAR(255),
    token VARCHAR(36),
    lease_until BIGINT NOT NULL DEFAULT 0,
    PRIMARY KEY (shard)
);
