"""The conformance suite is whole: every name that the contract asks for is there, once, and says which clause it holds."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

import msgbus.testing
from msgbus.contract.adapter import Capability
from msgbus.testing import SUITE_MODULES, adapter_suite, test_memory
from msgbus.testing.stage import REGISTRY

PUBLISHING = """
    publish_returns_after_confirm publish_before_any_group_is_kept_for_the_first publish_too_large_rejected publish_timeout_is_unknown
    publish_cancel_is_unknown_never_swallowed publish_after_close_raises publish_before_start_raises
    publish_many_keeps_order_and_reports_the_first_unconfirmed send_gives_one_outcome_an_envelope
    a_bad_envelope_does_not_fail_its_batch_mates_wrongly dead_letter_copy_fits_at_the_size_limit publish_concurrent_1000_all_confirmed
    close_flushes_pending_publishes same_message_id_concurrently_no_cross_talk
"""
CONSUMING = """
    roundtrip_all_content_types roundtrip_empty_body roundtrip_non_utf8_body headers_roundtrip_types_and_unicode
    concurrent_consumers_share_group groups_each_get_all one_groups_retry_and_dead_letter_leave_other_groups_alone multi_topic_no_leak
    first_group_gets_what_came_before_it retained_topic_gives_history_to_a_later_group group_misses_nothing_after_it_was_declared
    latest_group_gets_only_new never_more_than_the_window_un_settled ack_after_handler_only redeliver_on_handler_error
    redeliver_on_worker_task_crash receiver_double_ack_is_noop a_deliverys_second_word_raises_already_settled
    ack_stale_is_counted_not_raised release_gives_back_uncounted reject_dead_letters continue_after_errors
    continue_after_subscriber_close_no_loss concurrent_close_safe subscriber_ctx_cancel_stops message_ctx_isolated_between_messages
    later_group_starts_at_its_declaration plain_name_takes_the_brokers_shards
"""
ORDERING = """
    per_key_order_single_consumer per_key_order_many_consumers shards_spread_over_processes_and_come_back order_survives_drain_and_kill
    order_survives_a_quarantine keys_run_in_parallel slow_key_does_not_block_others delay_not_before delay_ordering_of_different_delays
    delay_survives_restart delay_scoped_to_group priority_preempts_backlog priority_no_starvation ttl_expired_not_delivered
    ttl_checked_before_retry
"""
RETRYING = """
    retry_count_exact retry_backoff_bounds_with_seed retry_scoped_to_group given_up_straight_to_dead_letters
    invalid_payload_to_dlq_bytes_identical dlq_headers_complete dlq_write_failure_keeps_source redrive_preserves_id_and_body
    redrive_filter_limit_dry_run poison_process_killer_dead_lettered_and_its_neighbours_spared resets_and_drains_are_not_deaths
    tries_that_never_ran_do_not_count a_duplicate_that_arrives_during_the_run_is_settled_with_it breaker_opens_pauses_probes_closes
    shutdown_cancel_not_counted_as_attempt
"""
LIFECYCLE = """
    graceful_drain_finishes_inflight drain_gives_back_what_was_not_started lost_tenure_is_not_started drain_timeout_cancels_unacked
    stop_is_idempotent start_stop_100_times_no_leak depth_and_lag purge purge_while_at_work replay_while_at_work
    replay_passes_nothing_over health_reports_down_and_recovers topology_mismatch_fails_start
    unsupported_feature_fails_at_declare broadcast_each_instance namespace_prefixes_every_name
    topology_check_declares_nothing_and_names_what_is_missing dropped_group_frees_what_it_held
"""
REFUSED = """
    broadcast_refused_with_alternative priorities_refused_with_alternative ordering_refused_with_alternative
    retain_refused_with_alternative delay_refused_with_alternative durability_refused_with_alternative patterns_refused_with_alternative
"""
CLAIMED = """
    processes_share_the_broker confirmed_outlives_its_process_and_a_restart
"""

STORING = """
    inbox_effect_once outbox_atomic_commit_and_rollback
"""

NAMES = " ".join((PUBLISHING, CONSUMING, ORDERING, RETRYING, LIFECYCLE, REFUSED, CLAIMED, STORING)).split()

WAITS_FOR = {
    "request_reply": "request",
    "request_timeout": "request",
    "request_late_reply_dropped": "request",
    "scheduler_fires_once_across_instances": "schedule",
}
"""Names that have no test yet, and the module of msgbus that they wait for."""

FALSE_CLAIM_FAILS = {
    Capability.DELAY: ["delay_not_before", "delay_survives_restart"],
    Capability.PRIORITIES: ["priority_preempts_backlog"],
    Capability.SHARDS: ["per_key_order_many_consumers", "shards_spread_over_processes_and_come_back"],
    Capability.BROADCAST: ["broadcast_each_instance"],
    Capability.RETAIN: ["retained_topic_gives_history_to_a_later_group"],
    Capability.CRASH_COUNT: ["poison_process_killer_dead_lettered_and_its_neighbours_spared"],
    Capability.DURABLE: ["confirmed_outlives_its_process_and_a_restart"],
    Capability.SHARED: ["processes_share_the_broker"],
}
"""For each capability, tests that fail where it is claimed and does not hold: test_sabotage.py shows that they do."""


def test_every_name_of_the_contract_is_there_once_and_no_other() -> None:
    """The registry holds the list, and `import *` of the suite gives all of it to whoever runs it."""
    assert len(NAMES) == len(set(NAMES))
    assert sorted(REGISTRY) == sorted(NAMES)
    assert sorted(adapter_suite.__all__) == sorted(f"test_{name}" for name in NAMES)
    assert [name for name in NAMES if getattr(test_memory, f"test_{name}") is not REGISTRY[name]] == []


def test_no_test_hides_another() -> None:
    """A name is defined once over all modules of the suite, where a second `def` would replace the first without a word."""
    found: list[str] = []
    for module in SUITE_MODULES:
        source = Path(msgbus.testing.__file__).with_name(f"suite_{module}.py").read_text(encoding="utf-8")
        found += [node.name for node in ast.parse(source).body if isinstance(node, ast.AsyncFunctionDef) and node.decorator_list]
    assert sorted(found) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_states_its_clause(name: str) -> None:
    """The docstring is a sentence, and pytest will run it under its own name."""
    test = REGISTRY[name]
    assert test.__name__ == f"test_{name}"
    assert test.__doc__ is not None
    assert len(test.__doc__.split()) >= 5


@pytest.mark.parametrize("name", WAITS_FOR)
def test_what_is_not_there_yet_waits_for_a_component_that_is_not_there(name: str) -> None:
    """The day the component exists this fails, and asks for the test."""
    assert name not in REGISTRY
    assert importlib.util.find_spec(f"msgbus.{WAITS_FOR[name]}") is None


def test_each_capability_has_tests_that_a_false_claim_fails() -> None:
    """None is forgotten when the contract gets a new one."""
    assert set(FALSE_CLAIM_FAILS) == set(Capability)
    assert [name for names in FALSE_CLAIM_FAILS.values() for name in names if name not in NAMES] == []
