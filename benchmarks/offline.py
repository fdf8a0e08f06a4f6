#!/usr/bin/env python3
"""Offline batches beside every peer, in one run: tokens a second, CPU seconds, peak memory, equal tokens.

    python benchmarks/offline.py                              # random Llama 206M, float32, all workloads, all peers
    python benchmarks/offline.py compare --workloads mixed --peers spillway,openvino --dtype bfloat16
    python benchmarks/offline.py compare --device cuda --dtype bfloat16   # on a GPU: vLLM, transformers
    python benchmarks/offline.py setup                        # only install the peers and convert the models
    python benchmarks/offline.py spill                        # what spilling costs: host and disk against neither
    python benchmarks/offline.py plan --workloads panels       # KV kept by the plan against recency and recomputing
    python benchmarks/offline.py pool                         # KV bytes of device pool against tokens/s, with a plot
    python benchmarks/offline.py memory                       # peak memory of 100 and of 100,000 lines
    python benchmarks/offline.py table                        # every figure quoted in the documentation
    python benchmarks/offline.py docs                         # write the kept figures into the documentation

Every peer runs as a process of its own in a virtual environment of its own under `.bench/`, made by the first run and
kept. A peer that does not install or does not finish is reported as such. Figures are of the batch: loading, compiling
and a short warm-up are apart, in "whole process". Results are kept in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import docs, modes, results
from harness.environments import PEERS as SCRIPTS
from harness.environments import Environments, InstallError
from harness.measure import measured
from harness.models import CHECKOUT, MODELS, RANDOM_MODEL, checkpoint, shape_of
from harness.peers import (
    DEVICES,
    NAMES,
    PEERS,
    SPILLWAY,
    Outcome,
    PeerError,
    Place,
    Setting,
    environment,
    export,
    names_on,
    run_peer,
    write_task,
)
from harness.workloads import PANELS, WORKLOADS, make

REFERENCES = {"cpu": "transformers", "cuda": "transformers-cuda"}
"""Whose float32 tokens all others on a device are compared with."""


def main() -> int:
    """Run one of the modes."""
    arguments = parse()
    place = Place(arguments.work, Environments(arguments.work / "envs"), arguments.limit_s)
    if arguments.mode == "table":
        print_tables()
    elif arguments.mode == "docs":
        for page in docs.PAGES:
            page.write_text(docs.filled(page.read_text()))
    elif arguments.mode == "setup":
        return set_up(arguments, place)
    elif arguments.mode == "compare":
        for workload in arguments.workloads:
            compare(setting_of(arguments, place, workload), arguments, place)
    else:
        run_mode = {"spill": modes.spill, "plan": modes.plan, "pool": modes.pool, "memory": modes.memory}
        run_mode[arguments.mode](setting_of(arguments, place, arguments.workloads[0]), place)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""

    def names(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
        def split(text: str) -> list[str]:
            chosen = text.split(",")
            if unknown := set(chosen) - set(allowed):
                raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose from {', '.join(allowed)}")
            return chosen

        return split

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ("compare", "setup", "spill", "plan", "pool", "memory", "table", "docs")
    parser.add_argument("mode", nargs="?", choices=choices, default="compare")
    parser.add_argument("--model", choices=MODELS, default=RANDOM_MODEL)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--workloads", type=names((*WORKLOADS, PANELS)), default=list(WORKLOADS), help=", ".join(WORKLOADS)
    )
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--peers", type=names(NAMES), help=f"{', '.join(NAMES)}; default: all of the device")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=900, help="seconds that one peer may take")
    parser.add_argument("--work", type=Path, default=CHECKOUT / ".bench", help="environments, models and logs")
    arguments = parser.parse_args()
    available = names_on(arguments.device)
    if others := set(arguments.peers or ()) - set(available):
        parser.error(f"not on {arguments.device}: {', '.join(sorted(others))}")
    arguments.peers = arguments.peers or list(available)
    return arguments


def setting_of(arguments: argparse.Namespace, place: Place, workload: str) -> Setting:
    """The comparison that the command line asks for."""
    folder = checkpoint(arguments.model, place.path("models", ""))
    shape = shape_of(folder)
    return Setting(
        model=arguments.model,
        checkpoint=folder,
        shape=shape,
        workload=make(workload, shape.vocabulary, arguments.seed),
        dtype=arguments.dtype,
        threads=arguments.threads,
        device=arguments.device,
    )


def set_up(arguments: argparse.Namespace, place: Place) -> int:
    """Install every peer and convert the model for it; returns 1 if any failed."""
    setting, failed = setting_of(arguments, place, arguments.workloads[0]), 0
    for name in arguments.peers:
        if name == SPILLWAY:
            continue
        try:
            place.environments.python(PEERS[name].environment)
            kind = PEERS[name].export
            if kind:
                export(kind, setting, place)
            print(f"{name}: ready")
        except (InstallError, PeerError) as error:
            failed = 1
            print(f"{name}: {error}")
    return failed


def packed_rate(setting: Setting, place: Place) -> results.Rate:
    """The packed matmul rate of this machine at this moment."""
    python = place.environments.python("transformers")
    task, target = write_task(setting, place, "rate", {}), place.path("results", "rate.json")
    target.unlink(missing_ok=True)
    command = [str(python), str(SCRIPTS / "matmul_rate.py"), str(task), str(target)]
    log = place.path("logs", "rate.txt")
    done = measured(command, environment(setting.threads), log, place.limit_s)
    if done.return_code != 0:
        raise SystemExit(f"the matmul rate could not be measured; see {log}")
    return results.Rate(**json.loads(target.read_text()))


def compare(setting: Setting, arguments: argparse.Namespace, place: Place) -> None:
    """Run the chosen peers on one setting, print the table, keep the result.

    The packed rate is measured before and after, and the better one counts: a machine that was busy for a moment would
    make everybody look good.
    """
    say(f"{setting.model}, {setting.workload.name}, {setting.dtype}: measuring the matmul rate …")
    rate, reference = packed_rate(setting, place), REFERENCES[setting.device]
    where = f"{setting.threads}" if setting.device == "cpu" else setting.device
    reference_file = place.path("references", f"{setting.model}-{setting.workload.name}-{arguments.seed}-{where}.json")
    outcomes: dict[str, Outcome | str] = {}
    for name in sorted(arguments.peers, key=lambda name: name != reference):
        say(f"  {name} …")
        try:
            outcome = run_peer(name, setting, place)
        except (InstallError, PeerError) as error:
            outcomes[name] = str(error)
            say(f"    {error}")
            continue
        outcomes[name] = outcome
        say(f"    {outcome.batch_s:.1f} s, {setting.workload.output_tokens / outcome.batch_s:.0f} tokens/s")
        if name == reference and setting.dtype == "float32":
            reference_file.write_text(json.dumps(outcome.outputs))
    rate = max(rate, packed_rate(setting, place), key=lambda each: each.gflop_s)
    say(f"  matmuls: {rate.gflop_s:.0f} GFLOP/s in {rate.dtype}")
    peers = {
        name: {"error": each}
        if isinstance(each, str)
        else results.record(setting, each, match_of(each, reference_file, setting), rate)
        for name, each in outcomes.items()
    }
    path = results.save(setting, peers, arguments.seed, ["python", "benchmarks/offline.py", *sys.argv[1:]])
    print("\n" + results.table(json.loads(path.read_text())), flush=True)


def match_of(outcome: Outcome, reference_file: Path, setting: Setting) -> float | None:
    """Share of tokens equal to the float32 reference's, or None before there is one."""
    if not reference_file.exists():
        return None
    reference = json.loads(reference_file.read_text())
    if isinstance(outcome.outputs[0], str):
        return results.match_share_of_texts(outcome.outputs, reference, setting.checkpoint)
    return results.match_share(outcome.outputs, reference)


def print_tables() -> None:
    """All kept comparisons, as the documentation quotes them."""
    for path in sorted(results.RESULTS.glob("offline-*.json")):
        print(docs.table_of(path.stem))


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
