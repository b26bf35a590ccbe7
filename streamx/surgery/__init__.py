"""A reference model learns the batches of query files as they come."""

from streamx.surgery.run import surgery

__all__ = ["surgery"]
