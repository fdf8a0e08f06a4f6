"""The checked-in stubs are what the protos say, and the protos keep to the style of resource-oriented APIs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from google.api import field_behavior_pb2, resource_pb2

from spillway.api.batch.v1 import batch_pb2
from spillway.api.worker.v1 import worker_pb2

API = Path(__file__).parents[2] / "api"
FILES = [batch_pb2.DESCRIPTOR, worker_pb2.DESCRIPTOR]
REQUESTS = [
    method.input_type for file in FILES for service in file.services_by_name.values() for method in service.methods
]


def test_the_stubs_are_current(tmp_path: Path) -> None:
    subprocess.run([sys.executable, API / "generate.py", tmp_path], check=True, capture_output=True)
    made = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*_pb2*")}
    checked_in = {path.relative_to(API): path.read_text() for path in API.rglob("*_pb2*.py*") if path.suffix != ".pyc"}
    assert len(made) == 8
    assert made == checked_in, "run api/generate.py"


@pytest.mark.parametrize("request_type", REQUESTS, ids=lambda request: request.full_name)
def test_every_field_of_a_request_says_whether_it_is_needed(request_type: object) -> None:
    for field in request_type.fields:
        assert field.GetOptions().Extensions[field_behavior_pb2.field_behavior], field.full_name


def test_a_job_is_a_resource_whose_fields_say_who_writes_them() -> None:
    job = batch_pb2.Job.DESCRIPTOR
    assert job.GetOptions().Extensions[resource_pb2.resource].pattern == ["jobs/{job}"]
    for field in job.fields:
        behaviors = field.GetOptions().Extensions[field_behavior_pb2.field_behavior]
        assert behaviors, field.name
        if field_behavior_pb2.OUTPUT_ONLY not in behaviors and field.name != "name":
            assert field_behavior_pb2.IMMUTABLE in behaviors, field.name


def test_names_of_jobs_are_references() -> None:
    for request in REQUESTS:
        for field in request.fields:
            if field.name == "name":
                reference = field.GetOptions().Extensions[resource_pb2.resource_reference]
                assert reference.type == "spillway.dev/Job"
