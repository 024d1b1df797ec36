"""What adapters, idempotency stores and codecs implement.

The contract of the seam is prose: read `adapter.py` first, then run `msgbus.testing.adapter_suite` against what you wrote.
"""
