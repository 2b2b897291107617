"""What users do between two nights, on disk before it is acknowledged: `log` (the contract), its two stores, and `writer`."""
