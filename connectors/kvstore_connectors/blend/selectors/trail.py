"""Recompute what the question's words lead to, from chunk to chunk: found in the token ids alone, at no cost.

What crosses chunks crosses at names. A question names somebody; the chunk that tells of him names a company; the chunk
that tells of the company answers. Attention of the question shows the first of these steps but hardly the second, since
the tokens of the second chunk have not seen the first yet: that is what repair is for. The ids show both. Rare words of
the question light up where they stand in the chunks; light spreads over the words around, and on into the next chunk,
since a chunk often begins with what the last one ended with; and from every lit rare word it passes to the places where
that word stands again. (Spreading activation, Collins and Loftus 1975; over passages, HippoRAG 2024.)

Light shows the way; what has to be computed again is less. Of two places with the same word only the later one can see
the other, and has not, if they are in different chunks. So tokens count that are lit and have an equal one in an
earlier chunk, and those that light came to over a seam, with the words around them; what is lit besides comes last.

How rare a word is, is counted in the chunks themselves, in windows of `WINDOW` tokens, for tokens and for pairs of
tokens: a name of two tokens is rarer than each of them. A word that stands in one other window only is as rare as a
link can be. In a few hundred tokens "of the" is rare, too, so it counts how common a token is in the language:
vocabularies number tokens in the order in which they were merged, common ones first.

It is computed by `kvstore_gpu.spreading`, on the device that computes the prompt: in numpy on the host it took 8 to 13
ms of a prompt of 16,000 tokens, while the device had nothing to do.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore_connectors.blend.selectors.choice import Choice
from kvstore_gpu import spreading

if TYPE_CHECKING:
    from torch import Tensor

    from kvstore_connectors.blend.work import Work


@dataclass(frozen=True)
class Trail(Choice):
    """Spreading activation from the question over equal rare tokens.

    Parameters
    ----------
    how : Spreading
    """

    name: str = "trail"
    how: spreading.Spreading = spreading.PLAIN

    def scores(self, work: Work) -> Generator[int, None, Tensor]:
        yield from ()
        if repr(self) not in work.notes:
            prompt = work.prompt
            spans = [(span.start, span.stop) for span in prompt.spans]
            work.notes[repr(self)] = spreading.needed(prompt.ids, prompt.chunk_of, spans, self.how)
        return work.notes[repr(self)]
