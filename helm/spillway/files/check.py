"""What `helm test` runs: three lines, twice, whose answers must have one digest.

check.py FILE    prints the digest of an output file of `spillway run` or `spillway results`
check.py         asks the gateway of client.toml; MODEL, DIGEST and LINES are read from the environment
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def digest(output: bytes) -> str:
    """SHA-256 over what was answered, line by line; ids and times, which differ from job to job, left out."""
    answers = []
    for row in output.splitlines():
        result = json.loads(row)
        choices = result["response"]["body"]["choices"]
        answers.append(
            [result["custom_id"], [[each["index"], each["text"], each["finish_reason"]] for each in choices]]
        )
    return hashlib.sha256(json.dumps(answers, ensure_ascii=False).encode()).hexdigest()


def spillway(*arguments: str) -> str:
    """Its standard output; its standard error is ours. Raises CalledProcessError."""
    return subprocess.run(["spillway", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603, S607 - of this image


def answered(model: str, lines: Path, folder: Path) -> str:
    """The digest of one job over the lines."""
    job = spillway("submit", str(lines), "--model", model).strip()
    output = folder / "output.jsonl"
    spillway("results", job, "--follow", "--output", str(output))
    found = output.read_bytes()
    output.unlink()
    print(f"{job}: {len(found.splitlines())} lines answered, digest {digest(found)}", flush=True)
    if len(found.splitlines()) != len(lines.read_bytes().splitlines()):
        raise SystemExit(f"{job} did not answer every line: see `spillway results {job}`")
    return digest(found)


def main() -> None:
    """Exits with a sentence where something is not as it should be."""
    if len(sys.argv) > 1:
        print(digest(Path(sys.argv[1]).read_bytes()))
        return
    model, wanted = os.environ.get("MODEL", ""), os.environ.get("DIGEST", "")
    spillway("jobs", "--limit", "1")
    print("the gateway lets us in", flush=True)
    if not model:
        print("no model to ask: set test.model to the name of a ModelDeployment")
        return
    with tempfile.TemporaryDirectory() as folder:
        first, second = (answered(model, Path(os.environ["LINES"]), Path(folder)) for _ in range(2))
    if first != second:
        raise SystemExit("the same lines were answered differently")
    if wanted and first != wanted:
        raise SystemExit(f"the answers are not those that were wanted: digest {wanted}")


if __name__ == "__main__":
    main()
