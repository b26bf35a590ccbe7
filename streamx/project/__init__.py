"""New cells -> latents in the space of a reference model, without training."""

from streamx.project.run import project

__all__ = ["project"]
