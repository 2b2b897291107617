"""Prepared event logs: immutable, memory-mapped, one row a user. Written by `recray.prepare`, read here."""
