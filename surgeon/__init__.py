"""Surgeon: a compiler that makes language models physically smaller."""

from __future__ import annotations
