"""Which of a rank's experts a launch is for: the busy ones, the others, or all."""

from typing import NamedTuple

from triton.experimental.gluon import language as gl

from ....problem import MoEProblem

# Rows of all busy experts together from which on they are worth a pair of launches of their own.
BUSY_ROWS = gl.constexpr(144)


class Share(NamedTuple):
    """The experts that a launch is for: the busy ones, with more than ``bound`` rows, or the others.

    None are busy where all of them together have fewer than BUSY_ROWS.

    Parameters
    ----------
    suffix
        Of the names of its counters: each pair of GEMMs has its own.
    """

    bound: int = 2**31 - 1
    busy: bool = False
    suffix: str = ""

    def counter(self, name: str) -> str:
        """The name of one of its counters."""
        return name + self.suffix


ALL = Share()
# Of so many experts each thread of a warp has two counts at most.
FEW_EXPERTS = 64


def is_shared(problem: MoEProblem, share: Share) -> bool:
    """Whether kernels tell the experts of a launch from others: among few that takes no time, and saves a binary."""
    return share != ALL or problem.num_local_experts <= FEW_EXPERTS
