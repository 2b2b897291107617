"""Prepared event logs: immutable, memory-mapped, one row per user. Written by `recray.prepare`, read here."""
