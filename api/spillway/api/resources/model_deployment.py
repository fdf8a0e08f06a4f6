"""ModelDeployment: a model, held by some shard groups."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from spillway.api.resources.common import Conditions, ObjectName, Part, Quantity, named_like_a_host, rule, rules
from spillway.api.resources.kind import Column, Kind, Scale


class Parallelism(Part):
    """How one replica is cut over ranks."""

    tensor: int = Field(default=1, ge=1, le=64, description="Ranks that share every layer.")
    pipeline: int = Field(default=1, ge=1, le=64, description="Stages of consecutive layers.")


class AgentResources(Part):
    """What one agent pod asks its node for."""

    gpus: int = Field(default=0, ge=0, le=16, description="GPUs (nvidia.com/gpu) of one agent; 0 runs on the CPU.")
    cpu: str = Field(
        default="1", pattern=r"^([1-9][0-9]{0,3}|[1-9][0-9]{0,6}m)$", max_length=8, description="Requested CPU."
    )
    memory: Quantity = Field(
        default="4Gi", description="Requested memory, also the limit. Weights on the CPU and host KV must fit."
    )


class KV(Part):
    """KV cache of one agent."""

    model_config = rules(
        rule("self.dtype != 'float32' || self.blockTokens <= 128", "float32 blocks hold at most 128 tokens"),
    )
    block_tokens: Literal[8, 16, 32, 64, 128, 256] = Field(default=16, description="Tokens in one block.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Element type of weights and KV. auto: float32 on CPU, bfloat16 on GPUs."
    )
    device: Quantity | None = Field(
        default=None, description="Pool on the device. Default: a quarter of resources.memory, or what a GPU has free."
    )
    host: Quantity | None = Field(default=None, description="Host memory that KV spills to. Default: none.")
    disk: Quantity | None = Field(default=None, description="Disk space that KV spills to. Default: none.")


class Toleration(Part):
    """A taint that agents put up with."""

    model_config = rules(
        rule("self.operator != 'Exists' || !has(self.value)", "a toleration with operator Exists has no value"),
    )
    key: str = Field(min_length=1, max_length=253, description="The taint's key.")
    operator: Literal["Exists", "Equal"] = Field(default="Exists", description="How the value is compared.")
    value: str | None = Field(default=None, max_length=63, description="The taint's value, for Equal.")
    effect: Literal["NoSchedule", "NoExecute"] | None = Field(default=None, description="Default: every effect.")


class Placement(Part):
    """Which nodes agents may run on."""

    node_selector: dict[str, str] = Field(default={}, max_length=16, description="Labels a node must have.")
    tolerations: tuple[Toleration, ...] = Field(default=(), max_length=16, description="Taints that are put up with.")


class PeerTls(Part):
    """TLS when agents load blocks from each other. All agents may show the same certificate."""

    secret_name: ObjectName = Field(
        description="A Secret in the same namespace with tls.crt, tls.key and ca.crt, as cert-manager writes it."
    )
    server_name: str = Field(
        default="spillway-agents",
        min_length=1,
        max_length=253,
        description="The name in every agent's certificate.",
    )


class KVStoreRef(Part):
    """The block index to share."""

    name: ObjectName = Field(description="A KVStore in the same namespace.")
    peer_tls: PeerTls | None = Field(
        default=None, description="Default: blocks travel in the clear, between agents that have proved who they are."
    )


class ModelVolume(Part):
    """Where the model comes from, if not from the agent's image or its node."""

    claim_name: ObjectName = Field(description="A PersistentVolumeClaim in the same namespace.")


class ModelDeploymentSpec(Part):
    """What is wanted."""

    model_config = rules(
        rule(
            "self.model == oldSelf.model && has(self.modelVolume) == has(oldSelf.modelVolume)"
            " && (!has(self.modelVolume) || self.modelVolume == oldSelf.modelVolume)",
            "model and modelVolume cannot change: make another ModelDeployment for another model",
        ),
        rule(
            "self.resources.gpus == 0"
            " || self.parallelism.tensor * self.parallelism.pipeline % self.resources.gpus == 0",
            "parallelism.tensor times parallelism.pipeline must be a multiple of resources.gpus",
        ),
        rule(
            "!has(self.kv.host) || quantity(self.kv.host).isLessThan(quantity(self.resources.memory))",
            "kv.host must be less than resources.memory",
        ),
        rule("!has(self.kvStore) || has(self.kv.host)", "kvStore needs kv.host: only host memory is shared with peers"),
    )
    model: str = Field(
        min_length=1, max_length=512, description="A checkpoint folder in the agent, or a Hugging Face hub id. Fixed."
    )
    model_volume: ModelVolume | None = Field(
        default=None,
        description="For a folder: mounted read-only at /models. For a hub id: where downloads are kept. Fixed.",
    )
    replicas: int = Field(default=1, ge=0, le=256, description="Shard groups that each hold the whole model.")
    parallelism: Parallelism = Field(default=Parallelism(), description="How one replica is cut over ranks.")
    resources: AgentResources = Field(default=AgentResources(), description="What one agent pod asks its node for.")
    kv: KV = Field(default=KV(), description="KV cache of one agent.")
    kv_store: KVStoreRef | None = Field(default=None, description="Default: blocks are found on their own host only.")
    placement: Placement = Field(default=Placement(), description="Which nodes agents may run on.")
    grace_period_seconds: int = Field(
        default=60, ge=10, le=3600, description="Time that an agent gets to hand back its lines when it must stop."
    )


class GroupStatus(Part):
    """One shard group. Its generation is written before its pods are made, and never used twice."""

    index: int = Field(ge=0, description="Counts replicas from 0.")
    generation: int = Field(ge=0, description="Counts starts of this group.")
    phase: Literal["Waiting", "Placed", "Ready", "Restarting", "Stopping"] = Field(description="Where it stands.")
    node: str | None = Field(default=None, max_length=253, description="Where it was placed.")
    failures: int = Field(default=0, ge=0, description="Starts in a row that ended before the group was ready.")
    not_before: str | None = Field(
        default=None, description="When the next start may be.", json_schema_extra={"format": "date-time"}
    )
    message: str = Field(default="", max_length=512, description="One sentence on why it is not ready.")


class ModelDeploymentStatus(Part):
    """What was found."""

    observed_generation: int = Field(default=0, ge=0, description="The spec that this status is about.")
    replicas: int = Field(default=0, ge=0, description="Groups that exist.")
    ready_replicas: int = Field(default=0, ge=0, description="Groups that answered a probe and lease lines.")
    selector: str = Field(default="", max_length=512, description="Label selector of the agents, for autoscalers.")
    groups: tuple[GroupStatus, ...] = Field(
        default=(),
        max_length=256,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["index"]},
    )
    conditions: Conditions = ()


class ModelDeployment(Kind):
    """A model and the shard groups that hold it. Jobs name it; agents of its groups lease their lines."""

    model_config = named_like_a_host()
    plural: ClassVar[str] = "modeldeployments"
    short_names: ClassVar[tuple[str, ...]] = ("mdep",)
    scale: ClassVar[Scale | None] = Scale(".spec.replicas", ".status.replicas", ".status.selector")
    columns: ClassVar[tuple[Column, ...]] = (
        Column("Model", "string", ".spec.model"),
        Column("Ready", "integer", ".status.readyReplicas"),
        Column("Replicas", "integer", ".spec.replicas"),
        Column("Message", "string", ".status.conditions[?(@.type=='Ready')].message"),
        Column("Age", "date", ".metadata.creationTimestamp"),
    )
    spec: ModelDeploymentSpec
    status: ModelDeploymentStatus = ModelDeploymentStatus()
