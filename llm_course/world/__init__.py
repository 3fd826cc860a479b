"The village of the course: all that is drawn from it, each with its truth."
from .story import World

__all__ = ["World"]
