"""`engine`: where and how the step is executed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from mpcli.recipe.base import Count, Section, mistake


class Local(Section):
    """One process, one device."""

    kind: Literal["local"]
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="`auto`: a GPU if there is one"
    )
    processes: Count | Literal["auto"] = Field(default="auto", description="1 or `auto`")
    compile: bool = Field(default=False, description="compile the model with torch.compile")
    activation_checkpointing: bool = Field(
        default=False, description="recompute activations in backward: less memory, more time"
    )
    data_workers: Annotated[int, Field(ge=0, le=64)] = Field(
        default=0,
        description="processes that prepare batches ahead of their steps; 0: each is made when it "
        "is due. The batches are the same",
    )

    @field_validator("processes")
    @classmethod
    def _one_process(cls, processes: int | str) -> int | str:
        if processes not in (1, "auto"):
            raise mistake(
                f"engine `local` is one process, found `{processes}`",
                "write `processes: 1`; more need engine `ddp`; this version has only `local`",
            )
        return processes


Engine = Annotated[Local, Field(discriminator="kind")]
