"""One entry point for the FP8 block-scale MoE layer, on the backend measured fastest for each token count.

Importing this package imports no kernel library; backends load theirs when they are prepared.
"""

from __future__ import annotations

from .api import HybridMoE, fused_moe
from .candidate import BackendFailedError, BackendUnsupportedError, Candidate
from .device import DeviceKey
from .inputs import MoEInputs, RoutedInputs
from .policy.schema import Policy, PolicyError
from .policy.select import Decision, NoBackendError
from .policy.store import load_policy, save_policy
from .policy.versions import PolicyMismatchWarning
from .problem import MoEProblem
from .serving import metrics
from .serving.agreement import RanksDifferError
from .serving.out_of_memory import CallOutOfMemoryError
from .serving.quarantine import Quarantined, quarantined, release_quarantine
from .serving.shadow import Breach, ShadowCheck, ShadowStatus
from .version import __version__ as __version__

__all__ = [
    "BackendFailedError",
    "BackendUnsupportedError",
    "Breach",
    "CallOutOfMemoryError",
    "Candidate",
    "Decision",
    "DeviceKey",
    "HybridMoE",
    "MoEInputs",
    "MoEProblem",
    "NoBackendError",
    "Policy",
    "PolicyError",
    "PolicyMismatchWarning",
    "Quarantined",
    "RanksDifferError",
    "RoutedInputs",
    "ShadowCheck",
    "ShadowStatus",
    "fused_moe",
    "load_policy",
    "metrics",
    "quarantined",
    "release_quarantine",
    "save_policy",
]
