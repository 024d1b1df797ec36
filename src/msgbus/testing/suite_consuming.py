"""Conformance: consuming."""

from __future__ import annotations
