"""Panels of a report that several methods have."""

from ray_dfml.methods.base import Panel

RECOVERED = Panel(
    "Teachers on their recovered images", "accuracy, %",
    "Share of recovered images to which the teacher gives the intended class.", {"recover/accuracy": "teacher"},
)  # fmt: skip

LABELLED = Panel(
    "Images of sources", "%", "Confidence of the teachers in the images that they label, and how many of those that a "
    "task wishes for are found.", {"recover/confidence": "confidence", "recover/filled": "found"},
)  # fmt: skip

INVERSION = Panel(
    "Inversion loss", "nats", "Mean over the round's tasks, before and after adapting to the teacher.",
    {"recover/loss_first": "first step", "recover/loss_last": "last step", "recover/ce": "last cross-entropy"},
)  # fmt: skip

LAST_UPDATE = (
    Panel(
        "Meta-loss", "nats per image", "Loss on the queries of the last update's tasks, after adaptation.",
        {"replay/loss": "last update"},
    ),
    Panel(
        "Meta-accuracy", "%", "Mean query accuracy of the last update's tasks.", {"replay/accuracy": "last update"}
    ),
)  # fmt: skip
"""Panels of methods that make a fixed number of meta-updates in a round."""

REPLAY = (
    Panel(
        "Replay loss", "nats per image", "Loss on the queries of recovered tasks, after adaptation.",
        {"replay/loss_first": "first update", "replay/loss_last": "last update"},
    ),
    Panel(
        "Replay accuracy", "%", "Best mean query accuracy of a round, on recovered images.",
        {"replay/accuracy_best": "best of the round"},
    ),
    Panel(
        "Replay updates", "updates per round", "Meta-updates until the accuracy no longer rises.",
        {"replay/updates": "updates"},
    ),
)  # fmt: skip
"""Panels of methods that replay until a plateau."""
