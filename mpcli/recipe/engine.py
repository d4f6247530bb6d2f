"""`engine`: where and how the step is executed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mpcli.recipe.base import Count, Section, mistake


class _Engine(Section):
    """What every engine has."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="`auto`: a GPU if there is one"
    )
    compile: bool = Field(default=False, description="compile the model with torch.compile")
    activation_checkpointing: bool = Field(
        default=False, description="recompute activations in backward: less memory, more time"
    )
    data_workers: Annotated[int, Field(ge=0, le=64)] = Field(
        default=0,
        description="processes that prepare batches ahead of their steps, for each process that "
        "trains; 0: each batch is made when it is due. The batches are the same",
    )


class Local(_Engine):
    """One process, one device."""

    kind: Literal["local"]
    processes: Count | Literal["auto"] = Field(default="auto", description="1 or `auto`")

    @field_validator("processes")
    @classmethod
    def _one_process(cls, processes: int | str) -> int | str:
        if processes not in (1, "auto"):
            raise mistake(
                f"engine `local` is one process, found `{processes}`",
                "write `processes: 1`; more need `kind: ddp` or `kind: fsdp2`",
            )
        return processes


class _Distributed(_Engine):
    """What the engines of several processes have."""

    processes: Count | Literal["auto"] = Field(
        default="auto",
        description="on each machine; `auto`: one for each GPU that is visible, or 1 on a CPU",
    )
    timeout_seconds: Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)] = Field(
        default=600.0,
        description="that a process waits for the others before the run ends (exit 6)",
    )
    max_restarts: Annotated[int, Field(ge=0, le=1000)] = Field(
        default=3,
        description="times in a row that the processes are started again after one was killed, "
        "without a newer checkpoint in between",
    )


class Ddp(_Distributed):
    """A copy of the model in each process; gradients are added up (DistributedDataParallel)."""

    kind: Literal["ddp"]
    gradient_compression: Literal["none", "fp16", "bf16"] = Field(
        default="none", description="type that gradients are rounded to before they are added up"
    )
    bucket_megabytes: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=25, description="MiB of gradients that are added up together"
    )
    gradient_as_bucket_view: bool = Field(
        default=True, description="gradients lie where they are added up: less memory"
    )
    static_graph: bool = Field(
        default=False, description="every step uses the same parameters: DDP may order them better"
    )
    find_unused_parameters: bool = Field(
        default=False, description="the loss may not depend on every parameter: slower"
    )
    sync_batch_norm: bool = Field(
        default=False,
        description="BatchNorm over the samples of all processes (SyncBatchNorm; on GPUs only)",
    )


class Fsdp2(_Distributed):
    """Weights, gradients and optimizer state divided among the processes (`fully_shard`)."""

    kind: Literal["fsdp2"]
    compile: bool = Field(default=False, description="`false`: not with this engine")
    reduce_dtype: Literal["fp32", "fp16", "bf16"] = Field(
        default="fp32", description="type that gradients are added up in"
    )
    reshard_after_forward: bool = Field(
        default=True,
        description="free a block's weights between forward and backward: less memory, and they "
        "are gathered twice",
    )
    cpu_offload: bool = Field(
        default=False,
        description="weights, gradients and optimizer state live in host memory, where the "
        "optimizer steps",
    )

    @field_validator("compile")
    @classmethod
    def _not_compiled(cls, compile: bool) -> bool:
        if compile:
            raise mistake(
                "engine `fsdp2` does not compile models, found `true`",
                "write `compile: false`, or use `kind: ddp`",
            )
        return compile


class DeepSpeed(_Distributed):
    """Optimizer state, gradients and weights divided among the processes by DeepSpeed (ZeRO)."""

    kind: Literal["deepspeed"]
    compile: bool = Field(default=False, description="`false`: not with this engine")
    stage: Literal[1, 2, 3] = Field(
        default=2,
        description="what is divided: 1 optimizer state, 2 gradients too, 3 weights too",
    )
    offload: bool = Field(
        default=False,
        description="ZeRO-Offload: optimizer state and fp32 masters live and step on the CPU",
    )
    offload_parameters: bool = Field(
        default=False, description="weights wait on the CPU too; stage 3 only"
    )

    @field_validator("compile")
    @classmethod
    def _not_compiled(cls, compile: bool) -> bool:
        if compile:
            raise mistake(
                "engine `deepspeed` does not compile models, found `true`",
                "write `compile: false`, or use `kind: ddp`",
            )
        return compile

    @model_validator(mode="after")
    def _parameters_are_divided(self) -> DeepSpeed:
        if self.offload_parameters and not (self.stage == 3 and self.offload):
            raise mistake(
                "weights can wait on the CPU where they are divided and stepped there",
                "add `stage: 3` and `offload: true`, or write `offload_parameters: false`",
                "offload_parameters",
            )
        return self


Engine = Annotated[Local | Ddp | Fsdp2 | DeepSpeed, Field(discriminator="kind")]
