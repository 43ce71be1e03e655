"""What blending needs to know of a model: its layers one step at a time, whatever engine runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from kvstore.rope import Rotary


class Model(Protocol):
    """A decoder, opened between its projections and its attention.

    Keys are handed out before rotation; `rope` turns queries and keys for their positions.
    Shapes: hidden ``[n, hidden]``, queries ``[n, heads, dim]``, keys and values ``[n, kv_heads, dim]``. Under tensor
    parallelism heads are those of this rank, and `post` gives what all ranks have summed.
    """

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        ...

    @property
    def rotary(self) -> Rotary:
        """How `rope` turns, for keys that are cached."""
        ...

    @property
    def scale(self) -> float:
        """Factor on query-key products before the softmax."""
        ...

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states that enter layer 0."""
        ...

    def ready(self, rows: torch.Tensor) -> None:
        """Positions that pass the layers next: what they alone decide is made, or sent for, before all else."""
        ...

    def qkv(self, layer: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of these rows, normed if the model does so, not rotated yet."""
        ...

    def rope(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both turned for their positions, perhaps in place; unchanged in layers without positions."""
        ...

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Attention ``[n, heads * dim]`` of rotated queries at ``positions`` over the keys of positions 0, 1, 2, ...

        `attention.attend` does it in torch; an engine may use its paged kernel, a sequence for each of
        `attention.runs`.
        """
        ...

    def looked_at(
        self, queries: torch.Tensor, keys: torch.Tensor, tokens: int, values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention that each of the first ``tokens`` keys gets, float32 ``[kv_heads, tokens]``.

        The rotated queries are those of the last positions before ``tokens``; summed over them, and over the heads that
        share a KV head. With values each is multiplied by the length of the value that it fetches.
        `attention.column_sums` does it in torch.
        """
        ...

    def post(self, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Output projection, residuals and MLP: the hidden states that enter the next layer, perhaps in place."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token scores of hidden states behind the last layer."""
        ...

    def total(self, scores: torch.Tensor, how: Literal["sum", "max"]) -> torch.Tensor:
        """Scores summed, or their maximum, over tensor parallel ranks; unchanged where there is one rank."""
        ...
