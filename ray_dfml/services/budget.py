"""What a run may spend on questions to teachers."""

from pydantic import BaseModel, ConfigDict, Field


class Budget(BaseModel):
    """The most that a run may spend. Images are counted as they are sent, money by the prices of the pool.

    A teacher's own budget stands in the pool, and the smallest one that applies holds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    queries: int | None = Field(default=None, ge=1, description="Images sent to all teachers together.")
    money: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="Money for all teachers together.")
    per_teacher: int | None = Field(default=None, ge=1, description="Images sent to each teacher.")
