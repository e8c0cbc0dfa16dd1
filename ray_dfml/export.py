"""Learners and students as graphs that other programs run: `torch.export` programs, and ONNX files.

A graph takes float pixels in [0, 1] of shape [n c h w], for any n, and normalises them itself. It classifies each image
by itself, with fixed statistics in batch norm. So a learner whose batch norm is transductive is exported with the
statistics of its support, and its answers may differ from those of `AdaptedLearner` for a batch of queries.
"""

import json
import logging
from pathlib import Path

import torch
from torch import Tensor

from ray_dfml.core.images import normalise
from ray_dfml.data import weights_file
from ray_dfml.errors import ResourceError
from ray_dfml.learner import AdaptedLearner, Learner
from ray_dfml.student import Student
from ray_dfml.types import LearnerWeights

BATCH = 2
"""Images of the example batch. The size of a batch is free in the graph."""


class Graph(torch.nn.Module):
    """A network with its weights: images [n c h w] in [0, 1] -> probabilities [n k] of `classes`.

    Without `classes` the result is the features [n f] that the head reads.
    """

    def __init__(self, of: LearnerWeights, theta: Tensor, stats: Tensor, classes: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.of, self.classes = of, classes
        self.theta, self.stats = torch.nn.Buffer(theta), torch.nn.Buffer(stats)
        self.mean, self.std = torch.nn.Buffer(torch.tensor(of.image.mean)), torch.nn.Buffer(torch.tensor(of.image.std))

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities, or features."""
        x = normalise(images, self.mean, self.std)
        if not self.classes:
            return self.of.net.features(self.theta, x, self.stats)
        return self.of.net(self.theta, x, self.stats)[:, : len(self.classes)].softmax(-1)


def of_student(student: Student) -> Graph:
    """The graph of a student, which gives probabilities of its teacher's classes."""
    return Graph(student.weights, student.weights.theta, student.weights.stats, student.classes)


def of_learner(learner: Learner) -> Graph:
    """The graph of a learner that was not adapted, which gives features, with its running statistics."""
    return Graph(learner.weights, learner.weights.theta, learner.weights.stats)


def of_adapted(adapted: AdaptedLearner) -> Graph:
    """The graph of an adapted learner, which gives probabilities of the classes of its support."""
    return Graph(adapted.learner.weights, adapted.theta, adapted.stats, tuple(map(str, adapted.classes)))


def program(graph: Graph) -> torch.export.ExportedProgram:
    """The graph as a program of `torch.export`, without TorchScript."""
    example = torch.zeros(BATCH, *graph.of.image.shape)
    sizes = {"images": {0: torch.export.Dim("batch")}}
    return torch.export.export(graph.eval(), (example,), dynamic_shapes=sizes)


def write_onnx(graph: Graph, file: Path) -> None:
    """Write the graph to an ONNX file, in one step: `images` in, `probabilities` or `features` out.

    The key `classes` of its metadata holds the class names as JSON, in the order of the probabilities. Raises
    ResourceError if the packages of the extra `export` are missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise ResourceError("this needs ONNX: pip install 'ray-dfml[export]'") from None
    output = "probabilities" if graph.classes else "features"
    logging.getLogger("onnxscript.optimizer").setLevel(logging.ERROR)  # it names each constant that it leaves as it is
    made = torch.onnx.export(
        program(graph), dynamo=True, input_names=["images"], output_names=[output], verbose=False
    )  # fmt: skip
    assert made is not None
    made.model.metadata_props["classes"] = json.dumps(graph.classes)
    weights_file.write_bytes(file, made.model_proto.SerializeToString())
