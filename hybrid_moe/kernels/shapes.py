"""How many rows and row tiles a call can have: functions of the shapes alone, as rows are decided on the device."""

from __future__ import annotations

from ..problem import MoEProblem

# Bound of a column chunk of GEMM2's result: T = 14107, 1.6 GB, is one chunk; seven of 256 MiB cost 10% of that call.
MAX_ROWS_BYTES = 2**31


def pow2(value: int) -> int:
    """The least power of two that is not below ``value``: Triton's vectors have such lengths."""
    return 1 << (value - 1).bit_length()


def max_local_rows(problem: MoEProblem, num_tokens: int) -> int:
    """Most rows that any routing can give."""
    return num_tokens * problem.max_local_rows_per_token


def max_row_tiles(problem: MoEProblem, num_tokens: int, block_m: int) -> int:
    """Most row tiles that any routing of ``num_tokens`` can need over the local experts."""
    rows = max_local_rows(problem, num_tokens)
    active = min(problem.num_local_experts, rows)
    # Each active expert rounds up once, and has each token once.
    return min(active + (rows - active) // block_m, problem.num_local_experts * -(-num_tokens // block_m))


def column_chunk(problem: MoEProblem, rows: int) -> int:
    """Columns of the result computed at a time: a divisor of the hidden size, in 128 blocks.

    Cutting by columns re-reads no weights; each chunk costs two more launches and re-reads the activation, which is
    small.
    """
    blocks = problem.hidden_size // problem.block
    for chunks in range(1, blocks + 1):
        if blocks % chunks == 0 and rows * (problem.hidden_size // chunks) * 2 <= MAX_ROWS_BYTES:
            return problem.hidden_size // chunks
    return problem.block
