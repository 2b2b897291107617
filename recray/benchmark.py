"""`recray benchmark`: what recray costs, measured on this machine."""
