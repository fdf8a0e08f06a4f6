"""What an operator is told at its start: one JSON file, which the chart writes from its values."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from spillway.api.client.target import Target, Tls
from spillway.operator.errors import ConfigError

Manifest = dict[str, Any]
PullPolicy = Literal["Always", "IfNotPresent", "Never"]
OWN_VOLUMES = frozenset({"tmp", "kv", "model", "gateway", "peer-tls"})
"""Volumes that the operator itself gives agents."""


class Settings(BaseModel):
    """Base of all sections: camelCase as in YAML, unknown keys refused."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid")


class GatewaySettings(Settings):
    """Where the batch service is. Tokens are read anew whenever they are needed, so that they can be replaced.

    With `ca_file` it is spoken to over TLS. `token_file` holds a client's token, for BatchJobs; `agent_token_file` an
    agent's, which is handed to agents together with the authority.
    """

    address: str = Field(pattern=r"^[^:\s]+:[0-9]{1,5}$")
    ca_file: Path | None = None
    server_name: str | None = None
    token_file: Path | None = None
    agent_token_file: Path | None = None

    def target(self) -> Target:
        """For calls in the operator's own name."""
        tls = None if self.ca_file is None else Tls(self.ca_file)
        return Target(self.address, tls, self.token_file, self.server_name)


class AgentSettings(Settings):
    """What agents are made of. `env`, `volumes` and `volume_mounts` are Kubernetes' own, added to each agent pod;
    `args` are further arguments of `spillway agent`.

    `device`: what agents run on; by default CUDA where their ModelDeployment asks for GPUs, which may be pretended.
    Folders of nodes (a torch that is installed there, models) can only come in through these: were they part of a
    ModelDeployment, whoever may make one could read every node's disks.
    """

    image: str = Field(min_length=1)
    image_pull_policy: PullPolicy = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    device: Literal["cuda", "cpu"] | None = None
    args: tuple[str, ...] = ()
    env: tuple[Manifest, ...] = ()
    volumes: tuple[Manifest, ...] = ()
    volume_mounts: tuple[Manifest, ...] = ()

    @model_validator(mode="after")
    def _names(self) -> AgentSettings:
        taken = OWN_VOLUMES & {str(each.get("name")) for each in self.volumes}
        if taken:
            raise ValueError(f"volumes: the name {min(taken)!r} is the operator's own")
        return self


class RedisSettings(Settings):
    """The Redis of managed KVStores."""

    image: str = Field(min_length=1)
    image_pull_policy: PullPolicy = "IfNotPresent"


class OperatorConfig(Settings):
    """All of it."""

    gateway: GatewaySettings
    agents: AgentSettings
    redis: RedisSettings

    @classmethod
    def load(cls, path: Path) -> OperatorConfig:
        """Raises ConfigError with the first field at fault."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(step) for step in first["loc"])
            raise ConfigError(f"{path}: {where}: {first['msg']}") from error
