"""Conformance: retrying."""

from __future__ import annotations
