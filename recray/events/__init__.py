"""The event store, on disk before an entry is acknowledged: `log` (the contract), `sqlite` and `redis` (its
implementations), `writer`, `collect` and `rewards`.
"""
