"""The door of every command. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from spillway.api.errors import SpillwayError
from spillway.cli import job_commands
from spillway.cli.agent_command import agent
from spillway.cli.flat import flat
from spillway.cli.job_commands import duration_s
from spillway.cli.kv_commands import kv
from spillway.cli.operator import operator
from spillway.cli.options import Dtype, EngineOptions
from spillway.cli.sizes import parse_size

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"spillway {version('spillway')}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Offline LLM batch inference whose KV cache outgrows the GPU."""


@app.command()
@flat
def run(
    *,
    source: Annotated[Path, typer.Option("--input", help="OpenAI Batch file: one JSON request per line.")],
    output: Annotated[
        Path, typer.Option(help="Where results go, in input order. Progress is kept in OUTPUT.spillway/.")
    ],
    errors: Annotated[
        Path | None, typer.Option(help="Where refused lines go. Default: OUTPUT with .errors before its ending.")
    ] = None,
    engine: EngineOptions,
    report: Annotated[Path | None, typer.Option(help="Write what happened, as JSON.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an earlier run of this job left, its output included.")
    ] = False,
) -> None:
    """Run a batch file through a model on this machine.

    Results land in OUTPUT when every line has one. Stop it, kill it, pull the plug: the same command goes on where it
    was, with one result per line. A line that cannot run gets a coded error in ERRORS, and the others run.
    """
    # Cheap checks first: a typo in a path should not cost an import of torch.
    from spillway.gateway.paths import JobPaths, errors_beside

    paths = JobPaths(source, output, errors or errors_beside(output))
    paths.resolved().check()
    if report is not None:
        paths.check_report(report)
    from spillway.cli.run import RunOptions
    from spillway.cli.run import run as run_job

    raise typer.Exit(run_job(RunOptions(engine, paths, report, restart)))


@app.command()
def size(
    model: Annotated[str, typer.Argument(help="A known model (llama-3.1-8b, …), a checkpoint folder, or a hub id.")],
    gpu: Annotated[
        list[str] | None,
        typer.Option(help="A GPU (A10, H100, …) or its memory (24GiB). Repeat it; default: all known."),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Only this dtype, for weights and KV.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """How much KV a model needs and how many tokens fit on which GPU.

    KV bytes per token = 2 · layers · KV heads · head dim · bytes per element.
    """
    from spillway.cli.size import find_model, print_sizes

    print_sizes(find_model(model), gpu or [], dtype.value if dtype else None, as_json=json)


@app.command()
def serve(
    jobs_dir: Annotated[Path, typer.Option(help="Where jobs and their results are kept.")],
    agent_options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- AGENT OPTIONS]", help="With --model: options of `spillway agent`."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Also run this model here, in an agent of our own: checkpoint folder or hub id."),
    ] = None,
    served_model: Annotated[
        str | None, typer.Option(help="The name that jobs ask for. Default: what --model says.")
    ] = None,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where gRPC is served.")] = "127.0.0.1:7400",
    http: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Also serve HTTP here: OpenAI's files and batches, /metrics, a page."),
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="Who may call: a line per token, SHA256 TENANT client|agent|monitor.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="Let in only clients with a certificate of this authority, PEM.")
    ] = None,
    advertise: Annotated[
        str | None,
        typer.Option(
            metavar="HOST",
            help="How other gateways over the same JOBS_DIR reach this one. Default: the host of --listen, or this "
            "machine's name if that is any.",
        ),
    ] = None,
    gateway_ca: Annotated[
        Path | None,
        typer.Option(help="With TLS: the authority of those gateways' certificates, PEM. Default: the system's."),
    ] = None,
    gateway_name: Annotated[
        str | None, typer.Option(help="The name in those certificates. Default: the host that each advertises.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve other machines even without tokens and TLS.")
    ] = False,
    max_input: Annotated[
        int | None, typer.Option(parser=parse_size, metavar="SIZE", help="The largest input of a job. Default: 64GiB.")
    ] = None,
    limits: Annotated[
        Path | None, typer.Option(help="TOML: quotas, calls per second and weights of tenants. Default: no limits.")
    ] = None,
    input_source: Annotated[
        list[str] | None,
        typer.Option(metavar="PREFIX", help="Let clients name inputs below it: s3://bucket/batches/. May be repeated."),
    ] = None,
    retention: Annotated[
        str | None, typer.Option(metavar="TIME", help="Remove jobs so long after they ended: 12h, 30d. Default: never.")
    ] = None,
) -> None:
    """Serve batch jobs over gRPC until SIGTERM.

    Clients submit files of requests, agents lease their lines. Everything is in JOBS_DIR: killed and started again, it
    goes on where it was. Several over one JOBS_DIR: one has the jobs, the others pass calls on to it and take its place
    when it dies. With --model one of the agents is this command's own:
    spillway serve --jobs-dir jobs --model ./smollm2 -- --device-kv 2GiB
    """
    from spillway.cli.local_agent import LocalAgent
    from spillway.cli.serve import ServeOptions
    from spillway.cli.serve import serve as serve_jobs
    from spillway.gateway.service.coordinator import DEFAULT_MAX_INPUT_BYTES, Peers, ServiceConfig
    from spillway.gateway.service.fetch import InputSources
    from spillway.gateway.service.limits import Limits

    config = ServiceConfig(
        jobs_dir,
        max_input_bytes=max_input or DEFAULT_MAX_INPUT_BYTES,
        limits=Limits() if limits is None else Limits.load(limits),
        sources=InputSources(tuple(input_source or ())),
        retention_s=None if retention is None else duration_s(retention),
        peers=Peers(advertise, gateway_ca, gateway_name),
    )
    if agent_options and model is None:
        raise typer.BadParameter(f"{agent_options[0]}: options of an agent need --model")
    local = None if model is None else LocalAgent(model, served_model or model, tuple(agent_options or ()))
    serve_jobs(ServeOptions(config, listen, tokens, tls_cert, tls_key, tls_client_ca, insecure, http, local))


app.command()(agent)
app.command()(operator)
app.add_typer(kv, name="kv")
app.command()(job_commands.submit)
app.command("jobs")(job_commands.list_jobs)
app.command()(job_commands.watch)
app.command()(job_commands.results)
app.command()(job_commands.cancel)
app.command()(job_commands.pause)
app.command()(job_commands.resume)
app.command()(job_commands.delete)


def main() -> None:
    """Run the command line; errors of ours become one message and exit status 1."""
    try:
        app()
    except SpillwayError as error:
        print(f"spillway: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("spillway: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
