"""Many queries onto one reference: planned, spread over processes or machines, taken up again, looked at."""
