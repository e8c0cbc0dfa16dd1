"""The learner that a run leaves behind: `learner.safetensors` and `learner.json`, and how to use it on new classes.

    import numpy as np
    from ray_dfml.learner import Learner

    adapted = Learner.load("runs/free").adapt(support, ["cat", "cat", "dog", "dog"])  # uint8 [4 c h w]
    print(adapted.predict(query))                                                     # ["dog", "cat", ...]

The mathematics is that of the `evaluate` op without calibration, and a test checks that both give the same bits.
"""

import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from ray_dfml import published
from ray_dfml.core.backbones import known_arch
from ray_dfml.core.images import normalise, to_pixels
from ray_dfml.core.inner_loop import Head
from ray_dfml.data import weights_file
from ray_dfml.data.manifest import Input
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.evaluate import BatchNormMode, adapt_to
from ray_dfml.files import Uri, located
from ray_dfml.types import ImageSpec, LearnerWeights

WEIGHTS = "learner.safetensors"
CARD_BYTES = 1 << 20
"""The size of the largest `learner.json` that is parsed."""
CHUNK = 256
"""How many query images are classified at once if batch norm has fixed statistics."""
_SLACK = 1e-5  # float pixels may leave [0, 1] by rounding


Card = TypeVar("Card", bound=BaseModel)
Finite = Annotated[float, Field(allow_inf_nan=False)]


class LearnerCard(BaseModel):
    """`learner.json`: what is needed to use the weights, and where they come from."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: Literal[1] = 1
    method: str
    arch: Annotated[str, AfterValidator(known_arch)]
    way: int = Field(ge=2, le=100_000)
    head: Head = "maml"
    input: Input
    mean: list[Finite]
    std: list[Annotated[Finite, Field(gt=0)]]
    bn: BatchNormMode
    steps: int = Field(ge=0, le=100_000)
    lr: float = Field(gt=0, allow_inf_nan=False)
    selection: Literal["val", "last"]
    profile: str
    seed: int

    @model_validator(mode="after")
    def _one_per_channel(self) -> "LearnerCard":
        if not len(self.mean) == len(self.std) == self.input.channels:
            raise ValueError(f"mean and std need {self.input.channels} values, one per channel")
        return self

    @property
    def image(self) -> ImageSpec:
        """Size and normalisation of the images."""
        return ImageSpec(**self.input.model_dump(), mean=tuple(self.mean), std=tuple(self.std))


def export(
    folder: Path, weights: LearnerWeights, *, method: str, bn: BatchNormMode, selection: str, profile: str, seed: int
) -> None:
    """Write the weights and statistics as named tensors, and `learner.json`. Each file is replaced in one step.

    Raises RejectedError for values that `Learner.load` would refuse.
    """
    image = weights.image
    card = LearnerCard.model_validate(
        {
            "method": method,
            "arch": weights.arch,
            "way": weights.outputs,
            "head": weights.head,
            "input": {"channels": image.channels, "height": image.height, "width": image.width},
            "mean": [float(v) for v in image.mean],
            "std": [float(v) for v in image.std],
            "bn": bn,
            "steps": weights.steps,
            "lr": float(weights.lr),
            "selection": selection,
            "profile": profile,
            "seed": seed,
        }
    )
    layouts = weights_file.parts(weights.arch, image, weights.outputs)
    tensors: dict[str, Tensor] = {}
    for layout, flat in zip(layouts, (weights.theta, weights.stats), strict=True):
        tensors |= layout.unflatten(flat.detach().to("cpu", torch.float32))
    weights_file.check_values(tensors)
    weights_file.write(folder / WEIGHTS, tensors)
    text = json.dumps(card.model_dump(mode="json"), indent=2) + "\n"
    weights_file.write_bytes((folder / WEIGHTS).with_suffix(".json"), text.encode())


class Learner:
    """A few-shot learner, which `adapt` adapts to 2 to `way` new classes from a few labelled images of each.

        learner = Learner.load("runs/free")
        adapted = learner.adapt(x, ["cat", "cat", "dog", "dog"])  # x: uint8 [4 c h w]
        adapted.predict(queries)                                  # one label per query image
        adapted.predict_proba(queries)                            # [m 2], columns in the order of adapted.classes

    Images must have the size `learner.image`; they are not resized here. For image files, `data.folders.read_folder`
    resizes them.
    """

    weights: LearnerWeights
    """The network, its weights, and how they adapt."""
    bn: BatchNormMode
    """The batch-norm statistics that adaptation and prediction use."""

    def __init__(self, card: LearnerCard, theta: Tensor, stats: Tensor) -> None:
        self.weights = LearnerWeights(
            arch=card.arch, image=card.image, outputs=card.way, theta=theta, stats=stats, head=card.head,
            steps=card.steps, lr=card.lr,
        )  # fmt: skip
        self.bn = card.bn
        self.method, self.profile, self.selection, self.seed = card.method, card.profile, card.selection, card.seed

    @classmethod
    def load(cls, path: str | Path | Uri) -> "Learner":
        """Load the learner of a run folder, or a `learner.safetensors` file with its `.json` beside it.

        The run folder may be in an object store.

        Raises UsageError if there is none, and RejectedError if it is damaged or does not fit its `.json`.
        """
        path = published.local(located(path))
        file = path / WEIGHTS if path.is_dir() else path
        if not file.exists():
            raise UsageError(f"{file}: no such file; name the folder of a finished run, or its {WEIGHTS}")
        if file.suffix != ".safetensors":
            raise UsageError(f"{file}: a learner is a .safetensors file with its .json beside it; name that file")
        if is_student(file):
            raise UsageError(f"{file}: a student, which adapts to no classes; use Student.load, or `ray-dfml evaluate`")
        card = read_card(file.with_suffix(".json"), LearnerCard)
        tensors = weights_file.read(file)
        try:
            layouts = weights_file.parts(card.arch, card.image, card.way)
            tensors = weights_file.fit(tensors, card.arch, card.image, card.way)
            weights_file.check_values(tensors)
        except RejectedError as error:
            raise RejectedError(f"{file}: {error}; export the learner again") from None
        return cls(card, layouts.parameters.flatten(tensors), layouts.statistics.flatten(tensors))

    @property
    def image(self) -> ImageSpec:
        """Size and normalisation of the images that the learner takes."""
        return self.weights.image

    @property
    def way(self) -> int:
        """The most classes that the learner can tell apart at once."""
        return self.weights.outputs

    def adapt(self, x: np.ndarray | Tensor, y: Sequence[Hashable] | np.ndarray | Tensor) -> "AdaptedLearner":
        """Adapt to a support. The result is a new object, and the learner itself does not change.

        `x` holds the images, in NumPy or torch: uint8 [n c h w] or [n h w c], or float in [0, 1] [n c h w]. `y` holds n
        labels of any hashable kind. Class i is the i-th distinct label in `y`, and outputs of the head beyond the last
        class take no part in loss and predictions. All n images form one batch. `weights.head` says which weights the
        SGD steps change, if any (`core.inner_loop.adapted`). Raises UsageError for images or labels that do not fit.
        """
        labels = y.tolist() if isinstance(y, np.ndarray | Tensor) else list(y)
        support = network_input(x, self.image)
        if len(labels) != len(support):
            raise UsageError(f"adapt: {len(support)} images and {len(labels)} labels; give one label per image")
        try:
            classes = tuple(dict.fromkeys(labels))
        except TypeError:
            raise UsageError("adapt: a label is not hashable; use strings or numbers, one per image") from None
        if len(classes) < 2:
            raise UsageError(f"adapt: {len(classes)} distinct labels in the support; give images of at least 2 classes")
        if len(classes) > self.way:
            raise UsageError(
                f"adapt: {len(classes)} classes in the support, this learner tells at most {self.way} apart; "
                "use fewer classes, or train a learner from a pool with more"
            )
        numbers = {label: i for i, label in enumerate(classes)}
        return AdaptedLearner(self, classes, support, torch.tensor([numbers[label] for label in labels]))


class AdaptedLearner:
    """A learner adapted to the classes of a support; `classes` gives their order.

    With batch norm `transductive` (see `Learner.bn`) all queries of one call are classified together, and each
    prediction depends on the other queries. Such queries should come in one batch, with about as many of each class. A
    single query would be a degenerate batch, so its batch norm uses the statistics of the support. With `support` or
    `running` each query is classified by itself.
    """

    classes: tuple[Any, ...]
    learner: Learner
    theta: Tensor
    """The adapted weights [p]."""
    stats: Tensor
    """Batch-norm statistics [k] of single queries: of the support, or the learner's own if `bn` is `running`."""

    def __init__(self, learner: Learner, classes: tuple[Any, ...], support: Tensor, labels: Tensor) -> None:
        """Adapt `learner` to normalised images [s c h w] with labels [s] in 0..k-1 (`evaluate.adapt_to`)."""
        self.classes = classes
        self.learner = learner
        weights = learner.weights
        self.theta = adapt_to(
            weights.net, weights.theta, weights.stats, support, labels,
            steps=weights.steps, lr=weights.lr, bn=learner.bn, head=weights.head,
        )  # fmt: skip
        self.stats = weights.stats
        if learner.bn != "running":
            with torch.no_grad():
                self.stats = weights.net.with_stats(self.theta, support, first_order=True)[1]

    def _logits(self, q: np.ndarray | Tensor) -> Tensor:
        query, network = network_input(q, self.learner.image), self.learner.weights.net
        with torch.no_grad():
            if self.learner.bn == "transductive" and len(query) > 1:
                logits = network(self.theta, query, first_order=True)
            else:
                parts = [part for part in query.split(CHUNK) if len(part)]
                chunks = [network(self.theta, part, self.stats, first_order=True) for part in parts]
                logits = torch.cat(chunks) if chunks else torch.zeros(0, self.learner.way)
        return logits[:, : len(self.classes)]

    def predict(self, q: np.ndarray | Tensor) -> list[Any]:
        """The label of each query image [m c h w], in the forms that `Learner.adapt` takes."""
        return [self.classes[i] for i in self._logits(q).argmax(-1).tolist()]

    def predict_proba(self, q: np.ndarray | Tensor) -> np.ndarray:
        """Probabilities [m k] in the order of `classes`; rows sum to 1. They are not calibrated."""
        return self._logits(q).double().softmax(-1).numpy()


def network_input(x: np.ndarray | Tensor, image: ImageSpec) -> Tensor:
    """Images as a network takes them, float [n c h w], from every form that the API takes.

    The forms are uint8 [n c h w] or [n h w c], and float in [0, 1] [n c h w]. Raises UsageError for other ones.
    """
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        x = (x.float() if x.is_floating_point() else x).numpy()
    x = np.asarray(x)
    c, h, w = image.shape
    if x.dtype == np.uint8 and x.ndim == 4 and x.shape[1:] != (c, h, w) and x.shape[1:] == (h, w, c):
        x = x.transpose(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1:] != (c, h, w):
        raise UsageError(
            f"images of shape {list(x.shape)}: needed are [n, {c}, {h}, {w}] (uint8 or float in [0, 1]) or "
            f"uint8 [n, {h}, {w}, {c}]; resize or convert them first"
        )
    if x.dtype == np.uint8:
        pixels = to_pixels(x)
    elif np.issubdtype(x.dtype, np.floating):
        pixels = torch.tensor(x, dtype=torch.float32)
        if not bool(((pixels >= -_SLACK) & (pixels <= 1 + _SLACK)).all()):
            raise UsageError("float images with values outside [0, 1] or NaN; divide by 255, or give uint8")
    else:
        raise UsageError(f"images of {x.dtype}; give uint8, or float in [0, 1]")
    return normalise(pixels, torch.tensor(image.mean), torch.tensor(image.std))


def is_student(file: Path) -> bool:
    """Whether a file of weights has the card of a student beside it, and not that of a learner."""
    try:
        return json.loads(file.with_suffix(".json").read_bytes()).get("kind") == "student"
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def read_card(file: Path, model: type[Card]) -> Card:
    """The card of a learner or a student. Raises UsageError if there is none, and RejectedError if it is damaged."""
    if not file.exists():
        raise UsageError(f"{file}: no such file; a learner is its .safetensors and its .json, copy both")
    try:
        text = weights_file.read_bytes(file, limits=weights_file.Limits(file_bytes=CARD_BYTES))
        return model.model_validate_json(text)
    except RejectedError as error:
        raise RejectedError(f"{file}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        fault = " ".join(f"{where}: {first['msg']}".removeprefix(": ").split())
        raise RejectedError(f"{file}: {fault}; export the learner again") from None
