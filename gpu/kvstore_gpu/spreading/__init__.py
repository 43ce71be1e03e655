"""Where the words of a question lead in a prompt, from chunk to chunk: spreading activation over equal rare words.

Shapes
    ids and chunk of each token int64 ``[token]``; out float32 ``[token]``: how much each needs to be computed again,
    minus infinity where nothing leads.
Bytes moved
    Some hundred a token; thirteen launches and two sorts. Bound: launches, up to some hundred thousand tokens.
Source
    Collins and Loftus 1975; over passages, HippoRAG (arXiv 2405.14831). `kvstore_connectors.blend.selectors.trail`
    tells what it is for.
"""

from kvstore_gpu.spreading.launch import PLAIN, Spreading, needed
from kvstore_gpu.spreading.reference import COMMON, FAINT, WINDOW

__all__ = ["COMMON", "FAINT", "PLAIN", "WINDOW", "Spreading", "needed"]
