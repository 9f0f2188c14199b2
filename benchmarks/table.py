"""Print a Markdown table of benchmark records: microseconds and the ratio to the floor, for each candidate at each T.

python benchmarks/table.py benchmarks/results/nvidia_h100_80gb_hbm3/definition.jsonl

A layer of a model has a table of its own. Each latency is divided by the floor of its own run; the floor shown is that
of a row's first record. With several files, the environment is printed for each.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from hybrid_moe.candidate import PEER_PREFIX
from hybrid_moe.measure.readers import read_records
from hybrid_moe.measure.records import BenchRecord
from hybrid_moe.measure.workloads import MODELS

OURS = "triton_fused"


def table(records: list[BenchRecord]) -> str:
    """One row a workload, one column a candidate; the fastest of a row in bold.

    Of several seeds the first is shown, as failed if any of them did. What could run at no T has no column. With peers
    there is one column more: the fastest that isn't of `triton_fused` over the fastest that is.
    """
    tried = {str(r.choice) for r in records if r.status != "unsupported"}
    columns = sorted(tried, key=lambda name: (name.startswith(PEER_PREFIX), name))
    peers = any(r.is_peer for r in records)
    several = len({r.routing for r in records}) > 1
    rows: dict[tuple[str, int, int], dict[str, BenchRecord]] = {}
    for record in sorted(records, key=lambda r: (r.status != "failed", r.seed)):
        at = (record.routing if record.routing != "uniform" else "", record.num_tokens, record.local_expert_offset)
        rows.setdefault(at, {}).setdefault(str(record.choice), record)
    lead, rule = ("| routing ", "|---") if several else ("", "")
    last = " best peer / ours |" if peers else ""
    lines = [
        lead + "| T | local rows | active experts | floor µs | " + " | ".join(f"`{c}`" for c in columns) + " |" + last,
        rule + "|" + "---:|" * (4 + len(columns) + peers),
    ]
    for (routing, tokens, _), found in sorted(rows.items()):
        first = min(found.values(), key=lambda r: r.seed)
        best = min((r.latency_us.median for r in found.values() if r.latency_us), default=math.inf)
        cells = []
        for column in columns:
            record = found.get(column)
            if record is None or record.latency_us is None or not record.floor_us:
                cells.append(record.status if record else "")
                continue
            text = f"{record.latency_us.median:.1f} ({record.latency_us.median / record.floor_us:.2f})"
            cells.append(f"**{text}**" if record.latency_us.median == best else text)
        if peers:
            ours, others = (
                min(
                    (r.latency_us.median for r in found.values() if r.latency_us and (r.backend == OURS) == own),
                    default=None,
                )
                for own in (True, False)
            )
            cells.append(f"{others / ours:.2f}" if ours and others else "")
        floor = f"{first.floor_us:.1f}" if first.floor_us else ""
        head = f"| {routing or 'uniform'} " if several else ""
        lines.append(
            f"{head}| {tokens} | {first.local_rows} | {first.active_experts} | {floor} | " + " | ".join(cells) + " |"
        )
    errors = " | ".join(f"{worst_error(records, column):.4f}" for column in columns)
    lines.append(("| " if several else "") + f"| | | | largest relative L2 | {errors} |" + (" |" if peers else ""))
    return "\n".join(lines)


def worst_error(records: list[BenchRecord], column: str) -> float:
    """The largest relative L2 of a candidate."""
    found = [r.correctness.relative_l2 or 0.0 for r in records if str(r.choice) == column and r.correctness]
    return max(found, default=0.0)


def main() -> None:
    """Print the table of the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--timing", default="cuda_graph", choices=("cuda_graph", "eager"))
    options = parser.parse_args()
    records: list[BenchRecord] = []
    for path in options.records:
        found = [r for r in read_records(path) if r.timing == options.timing]
        print(", ".join(f"{key} {value}" for key, value in found[-1].environment.items()))
        rules = sorted({r.correctness.judged_by for r in found if r.status == "passed" and r.correctness})
        print(f"Passed by {' or '.join(rules)}\n")
        records += found
    layers = dict.fromkeys((r.problem, r.num_experts) for r in records)
    for layer in layers:
        if len(layers) > 1:
            print(f"{title(*layer)}:\n")
        print(table([r for r in records if (r.problem, r.num_experts) == layer]) + "\n")


def title(definition: str, num_experts: int | None) -> str:
    """The layer's name in `MODELS`, or that of its definition."""
    names = [name for name, p in MODELS.items() if (p.definition, p.num_experts) == (definition, num_experts or 256)]
    return names[0] if names else definition


if __name__ == "__main__":
    main()
