"""One entry point for the FP8 block-scale MoE layer, on the backend measured fastest for each token count.

Importing this package imports no kernel library; backends load theirs when they are prepared.
"""

from __future__ import annotations

from .api import HybridMoE, fused_moe
from .candidate import BackendUnsupportedError, Choice
from .policy.schema import Policy, PolicyError, load_policy, save_policy
from .policy.select import Decision, NoBackendError
from .policy.versions import PolicyMismatchWarning
from .problem import DeviceKey, MoEInputs, MoEProblem, RoutedInputs
from .serving import metrics

__version__ = "0.1.0"

__all__ = [
    "BackendUnsupportedError",
    "Choice",
    "Decision",
    "DeviceKey",
    "HybridMoE",
    "MoEInputs",
    "MoEProblem",
    "NoBackendError",
    "Policy",
    "PolicyError",
    "PolicyMismatchWarning",
    "RoutedInputs",
    "fused_moe",
    "load_policy",
    "metrics",
    "save_policy",
]
