"""KVStore: the Redis that indexes blocks."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from spillway.api.resources.common import (
    Conditions,
    ObjectName,
    Part,
    Quantity,
    SecretKey,
    named_like_a_host,
    rule,
    rules,
)
from spillway.api.resources.kind import Column, Kind


class SecretKeyRef(Part):
    """A key of a Secret in the same namespace."""

    name: ObjectName = Field(
        description="The Secret. If it has a ca.crt too, agents trust that authority and no other for rediss://."
    )
    key: SecretKey = Field(
        default="url",
        description="Its key, which holds a redis:// or rediss:// URL, with +cluster for a Redis Cluster.",
    )


class RedisTls(Part):
    """The certificate of a managed Redis."""

    secret_name: ObjectName = Field(
        description="A Secret in the same namespace with tls.crt, tls.key and ca.crt,"
        " for the name NAME-redis.NAMESPACE.svc."
    )


class ManagedRedis(Part):
    """A Redis that the operator runs, with a password of its own."""

    model_config = rules(
        rule("!has(self.storageClassName) || has(self.storage)", "storageClassName needs storage"),
        rule(
            "has(self.storage) == has(oldSelf.storage) && (!has(self.storage) || self.storage == oldSelf.storage)",
            "storage cannot change",
        ),
        rule(
            "has(self.storageClassName) == has(oldSelf.storageClassName)"
            " && (!has(self.storageClassName) || self.storageClassName == oldSelf.storageClassName)",
            "storageClassName cannot change",
        ),
        rule("has(self.tls) == has(oldSelf.tls) && (!has(self.tls) || self.tls == oldSelf.tls)", "tls cannot change"),
    )
    memory: Quantity = Field(default="256Mi", description="What entries may take; an entry takes about 240 bytes.")
    storage: Quantity | None = Field(
        default=None, description="Persistent volume. Default: none; agents' rescans fill the index again. Fixed."
    )
    storage_class_name: str | None = Field(
        default=None, min_length=1, max_length=253, description="Of the volume. Fixed."
    )
    tls: RedisTls | None = Field(default=None, description="Speak TLS, and nothing else. Default: in the clear. Fixed.")


class ExternalRedis(Part):
    """A Redis that somebody else runs."""

    url_secret: SecretKeyRef = Field(description="Where its URL is, credentials included.")


class KVStoreSpec(Part):
    """What is wanted."""

    model_config = rules(
        rule("has(self.managed) != has(self.external)", "give either managed or external"),
        rule("has(self.managed) == has(oldSelf.managed)", "a managed KVStore stays managed, an external one external"),
    )
    managed: ManagedRedis | None = Field(default=None, description="Run a Redis.")
    external: ExternalRedis | None = Field(default=None, description="Use one.")


class KVStoreStatus(Part):
    """What was found."""

    observed_generation: int = Field(default=0, ge=0, description="The spec that this status is about.")
    endpoint: str = Field(default="", max_length=512, description="Where Redis is; without credentials.")
    url_secret: str = Field(default="", max_length=253, description="Secret that holds the URL.")
    url_secret_key: str = Field(default="", max_length=253, description="Key of that Secret.")
    conditions: Conditions = ()


class KVStore(Kind):
    """The index of KV blocks that agents share."""

    model_config = named_like_a_host()
    plural: ClassVar[str] = "kvstores"
    short_names: ClassVar[tuple[str, ...]] = ("kvs",)
    columns: ClassVar[tuple[Column, ...]] = (
        Column("Ready", "string", ".status.conditions[?(@.type=='Ready')].status"),
        Column("Endpoint", "string", ".status.endpoint"),
        Column("Message", "string", ".status.conditions[?(@.type=='Ready')].message"),
        Column("Age", "date", ".metadata.creationTimestamp"),
    )
    spec: KVStoreSpec
    status: KVStoreStatus = KVStoreStatus()
