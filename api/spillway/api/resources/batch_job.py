"""BatchJob: a file of request lines for a model. The same job as one submitted over gRPC."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from spillway.api.resources.common import Conditions, ObjectName, Part, SecretKey, rule, rules
from spillway.api.resources.kind import Column, Kind

State = Literal[
    "Pending", "Validating", "Running", "Paused", "Finalizing", "Completed", "Cancelled", "Expired", "Failed"
]
FINAL_STATES: frozenset[State] = frozenset({"Completed", "Cancelled", "Expired", "Failed"})


class ConfigMapKey(Part):
    """A key of a ConfigMap in the same namespace."""

    name: ObjectName = Field(description="The ConfigMap.")
    key: SecretKey = Field(default="batch.jsonl", description="Its key, under `data` or `binaryData`.")


class JobInput(Part):
    """Where the request lines are. ConfigMaps end at 1 MiB; larger inputs have a URI, or are submitted over gRPC."""

    model_config = rules(
        rule(
            "[has(self.inline), has(self.configMap), has(self.uri)].filter(given, given).size() == 1",
            "give exactly one of input.inline, input.configMap and input.uri",
        ),
    )
    inline: str | None = Field(default=None, min_length=1, max_length=262144, description="The JSON lines themselves.")
    config_map: ConfigMapKey | None = Field(default=None, description="A ConfigMap that holds them.")
    uri: str | None = Field(
        default=None,
        pattern=r"^[a-z][a-z0-9+.-]*://.+$",
        max_length=2048,
        description="A file that the gateway fetches, below a place that it was told to allow: s3://bucket/batch.jsonl,"
        " or file:///… of a volume of the gateway.",
    )


class BatchJobSpec(Part):
    """What is wanted. Everything but `paused` is fixed once the job exists."""

    model_config = rules(
        rule(
            "self.model == oldSelf.model && self.input == oldSelf.input && self.priority == oldSelf.priority"
            " && has(self.deadline) == has(oldSelf.deadline)"
            " && (!has(self.deadline) || self.deadline == oldSelf.deadline)",
            "only paused can change: make another BatchJob",
        ),
    )
    model: ObjectName = Field(description="The ModelDeployment that runs the lines.")
    input: JobInput
    priority: int = Field(default=0, ge=-100, le=100, description="Among jobs of a model a higher one goes first.")
    deadline: str | None = Field(
        default=None,
        description='Lines that are not done by then get the code "expired".',
        json_schema_extra={"format": "date-time"},
    )
    paused: bool = Field(default=False, description="Hand out no further lines for now.")


class LineCountsStatus(Part):
    """Lines; total = completed + failed + pending."""

    total: int = Field(default=0, ge=0)
    completed: int = Field(default=0, ge=0)
    failed: int = Field(default=0, ge=0)
    pending: int = Field(default=0, ge=0)
    leased: int = Field(default=0, ge=0, description="Of the pending ones, those that an agent works on.")
    failed_by_code: dict[str, int] = Field(default={}, max_length=64, description="Codes of the error file.")


class BatchJobStatus(Part):
    """What was found."""

    observed_generation: int = Field(default=0, ge=0, description="The spec that this status is about.")
    job: str = Field(default="", max_length=256, description='The gateway\'s name for the job, "jobs/…".')
    state: State = Field(default="Pending", description="The gateway's state of the job.")
    progress: str = Field(default="", max_length=64, description='Lines done, "12/40".')
    lines: LineCountsStatus = LineCountsStatus()
    completion_time: str | None = Field(
        default=None, description="When the job ended.", json_schema_extra={"format": "date-time"}
    )
    conditions: Conditions = ()


class BatchJob(Kind):
    """A batch of request lines. Deleting it cancels the job; its results stay with the gateway."""

    plural: ClassVar[str] = "batchjobs"
    short_names: ClassVar[tuple[str, ...]] = ("bj",)
    columns: ClassVar[tuple[Column, ...]] = (
        Column("Model", "string", ".spec.model"),
        Column("State", "string", ".status.state"),
        Column("Done", "string", ".status.progress"),
        Column("Failed", "integer", ".status.lines.failed"),
        Column("Message", "string", ".status.conditions[?(@.type=='Complete')].message"),
        Column("Job", "string", ".status.job", priority=1),
        Column("Age", "date", ".metadata.creationTimestamp"),
    )
    spec: BatchJobSpec
    status: BatchJobStatus = BatchJobStatus()
