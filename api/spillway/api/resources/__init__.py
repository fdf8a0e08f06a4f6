"""The custom resources of `spillway.dev/v1alpha1`: one pydantic model a kind, from which the CRDs are generated."""

from spillway.api.resources.batch_job import BatchJob, BatchJobSpec, BatchJobStatus
from spillway.api.resources.common import Condition, quantity_bytes
from spillway.api.resources.kv_store import KVStore, KVStoreSpec, KVStoreStatus
from spillway.api.resources.model_deployment import ModelDeployment, ModelDeploymentSpec, ModelDeploymentStatus

__all__ = [
    "BatchJob",
    "BatchJobSpec",
    "BatchJobStatus",
    "Condition",
    "KVStore",
    "KVStoreSpec",
    "KVStoreStatus",
    "ModelDeployment",
    "ModelDeploymentSpec",
    "ModelDeploymentStatus",
    "quantity_bytes",
]
