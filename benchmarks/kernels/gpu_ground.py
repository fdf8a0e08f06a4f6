"""What every GPU benchmark prints and measures first: the hardware, the two ceilings, and where results go."""

import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import triton

from spillway.kernels.tuning.timing import graph_ms

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True)
class Ceilings:
    """Rates of this very device in this very run."""

    copy_gb_s: float
    matmul_tflop_s: float


@dataclass(frozen=True)
class Record:
    """One timed call.

    Attributes:
        section, case, name: what was asked of it (prefill, "16 x 1024, 32/8 heads, d128"), and who did it.
        ms: median milliseconds.
        rate: TFLOP/s or GB/s, by the section.
        share: rate over the ceiling that binds.
        error: relative error against float64, where it was checked.
        note: why there is no time.
    """

    section: str
    case: str
    name: str
    ms: float | None
    rate: float | None = None
    share: float | None = None
    error: float | None = None
    note: str = ""


@dataclass
class Report:
    """Everything of one run."""

    hardware: dict[str, str]
    ceilings: Ceilings
    records: list[Record] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Keep and print a record."""
        self.records.append(record)
        if record.ms is None:
            print(f"{record.section:9} {record.case:42} {record.name:34} -- {record.note}", flush=True)
            return
        error = "" if record.error is None else f"  error {record.error:.1e}"
        rate = "" if record.rate is None else f" {record.rate:9.1f} {100 * (record.share or 0):6.1f} %"
        print(f"{record.section:9} {record.case:42} {record.name:34} {record.ms:9.4f} ms{rate}{error}", flush=True)

    def write(self, file: Path) -> None:
        """Results as data."""
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")
        print(f"written: {file}")


def start() -> Report:
    """Say what this runs on and measure the ceilings; ends the program where there is no GPU."""
    if not torch.cuda.is_available():
        print("needs a CUDA device; none is here", file=sys.stderr)
        raise SystemExit(2)
    torch.manual_seed(0)
    properties = torch.cuda.get_device_properties(0)
    hardware = {
        "gpu": properties.name,
        "multiprocessors": str(properties.multi_processor_count),
        "memory_gib": f"{properties.total_memory / 2**30:.0f}",
        "l2_mib": f"{l2_bytes() / 2**20:.0f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    ceilings = Ceilings(copy_gb_s(), matmul_tflop_s())
    print(", ".join(f"{name} {value}" for name, value in hardware.items()))
    print(
        f"ceilings: copy {ceilings.copy_gb_s:.0f} GB/s, bf16 matmul {ceilings.matmul_tflop_s:.0f} TFLOP/s", flush=True
    )
    return Report(hardware, ceilings)


def l2_bytes() -> int:
    """Size of the last-level cache."""
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def copy_gb_s(gib: int = 4) -> float:
    """Bytes read plus bytes written by a large copy on the device, per second."""
    source = torch.empty(gib * 2**30, dtype=torch.uint8, device="cuda")
    source.random_(0, 255)
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_ms([lambda: target.copy_(source)]) / 1e6


def matmul_tflop_s(n: int = 8192) -> float:
    """Dense bf16 product of random numbers (zeros would run faster)."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / graph_ms([lambda: torch.mm(a, b, out=out)]) / 1e9


def copies_past_l2(call_bytes: int, most: int = 64) -> int:
    """How many sets of data a graph must rotate through so that none of it is still in the cache."""
    return max(1, min(most, -(-4 * l2_bytes() // call_bytes)))


def timed(report: Report, record: Record, calls: list[Callable[[], object]], rate_of_ms: Callable[[float], float],
          ceiling: float) -> None:  # fmt: skip
    """Time calls and add the record; a contender that cannot do it is named with its reason."""
    try:
        ms = graph_ms(calls)
    except Exception as error:  # noqa: BLE001 - peers fail in their own ways, and that is a result
        torch.cuda.synchronize()
        reason = str(error).strip().splitlines()[0][:90] if str(error).strip() else type(error).__name__
        report.add(Record(**{**asdict(record), "note": reason}))
        return
    rate = rate_of_ms(ms)
    report.add(Record(**{**asdict(record), "ms": ms, "rate": rate, "share": rate / ceiling}))
