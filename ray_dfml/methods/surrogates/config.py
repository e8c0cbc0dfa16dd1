"""Settings of the distillation of services into surrogates, for the methods that invert these."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ray_dfml.methods.students.config import DistilConfig

LEAST = 2 * DistilConfig().batch
"""The fewest queries of a surrogate: two rounds of IDEAL, of which the second tells how well the first was learned."""


class SurrogateConfig(BaseModel):
    """What is spent on services, which give no weights, and how their answers are used."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    budget: int = Field(
        default=0, ge=0, description="Images that each service is asked about for its surrogate; 0 leaves services out."
    )
    images: tuple[str, ...] = Field(
        default=("dip", "dipw"), min_length=1, description="Sources of these images, as `images` of `ideal`."
    )
    invert: bool = Field(default=False, description="Whether dark and light of these sources change places.")
    lam: float = Field(default=5.0, ge=0, description="lambda of IDEAL, for images of the source `generator`.")
    generator_steps: int = Field(default=10, ge=0, description="E_G of IDEAL, for the same images.")
    student: str = Field(
        default="teacher", description="Architecture of the surrogates; `teacher` is the service's own, if it is known."
    )
    last_steps: int = Field(
        default=800, ge=0, description="Steps of a surrogate after its last queries, with cosine decay to 0."
    )
    answers: Literal["hard", "soft"] = Field(
        default="soft", description="What is learned of an answer: its best class, or probabilities if they are given."
    )

    @model_validator(mode="after")
    def _distils(self) -> "SurrogateConfig":
        if 0 < self.budget < LEAST:
            raise ValueError(
                f"budget: a surrogate needs {LEAST} queries or more; raise it, or leave services out with 0"
            )
        assert self.distillation
        return self

    @property
    def rounds(self) -> int:
        """The rounds that distil services; none if nothing is to be spent."""
        return self.distillation.total_rounds if self.budget else 0

    @property
    def distillation(self) -> DistilConfig:
        """The settings of the distillation of a service. Raises ValueError for what it cannot take."""
        budget = max(self.budget, LEAST)
        own = self.model_dump(include=set(SurrogateConfig.model_fields))
        first = min(DistilConfig().first, budget // 2)
        return DistilConfig.model_validate(own | {"budget": budget, "first": first})
