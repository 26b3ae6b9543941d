"""What a reduction does inside a model: attention, features and merged tokens of one block, with it and without.

`recording` is the protocol between this room and the attention layers, `explanation` the arrays and their pictures,
`walk` the way of an image through both models.
"""

from .explanation import Explanation, View
from .walk import explain

__all__ = ["Explanation", "View", "explain"]
