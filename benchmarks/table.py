"""Print a Markdown table of benchmark records: microseconds and the ratio to the floor, for each candidate at each T.

python benchmarks/table.py benchmarks/results/nvidia_h100_80gb_hbm3/definition.jsonl

Each latency is divided by the floor of its own run; the floor shown is that of a row's first record. With several
files, the environment is printed for each.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from hybrid_moe.measure.readers import read_records
from hybrid_moe.measure.records import BenchRecord


def table(records: list[BenchRecord]) -> str:
    """One row a workload, one column a candidate; the fastest of a row in bold."""
    columns = sorted({str(r.choice) for r in records}, key=lambda name: (name.startswith("peer:"), name))
    several = len({r.routing for r in records}) > 1
    rows: dict[tuple[str, int, int], dict[str, BenchRecord]] = {}
    for record in records:
        at = (record.routing if record.routing != "uniform" else "", record.num_tokens, record.local_expert_offset)
        rows.setdefault(at, {})[str(record.choice)] = record
    lead, rule = ("| routing ", "|---") if several else ("", "")
    lines = [
        lead + "| T | local rows | active experts | floor µs | " + " | ".join(f"`{c}`" for c in columns) + " |",
        rule + "|" + "---:|" * (4 + len(columns)),
    ]
    worst = {c: 0.0 for c in columns}
    for (routing, tokens, _), found in sorted(rows.items()):
        first = next(iter(found.values()))
        best = min((r.latency_us.median for r in found.values() if r.latency_us), default=math.inf)
        cells = []
        for column in columns:
            record = found.get(column)
            if record is None or record.latency_us is None or not record.floor_us:
                cells.append(record.status if record else "")
                continue
            if record.correctness and record.correctness.relative_l2 is not None:
                worst[column] = max(worst[column], record.correctness.relative_l2)
            text = f"{record.latency_us.median:.1f} ({record.latency_us.median / record.floor_us:.2f})"
            cells.append(f"**{text}**" if record.latency_us.median == best else text)
        floor = f"{first.floor_us:.1f}" if first.floor_us else ""
        head = f"| {routing or 'uniform'} " if several else ""
        lines.append(
            f"{head}| {tokens} | {first.local_rows} | {first.active_experts} | {floor} | " + " | ".join(cells) + " |"
        )
    errors = " | ".join(f"{worst[c]:.4f}" for c in columns)
    lines.append(("| " if several else "") + f"| | | | largest relative L2 | {errors} |")
    return "\n".join(lines)


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
    print(table(records))


if __name__ == "__main__":
    main()
