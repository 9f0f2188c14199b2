"""One entry point for the FP8 block-scale MoE layer, on the backend measured fastest for each token count.

Importing this package imports no kernel library; backends load theirs when they are prepared.
"""

from __future__ import annotations

from . import metrics
from .api import HybridMoE, fused_moe
from .choice import BackendUnsupportedError, Choice
from .policy import Policy, PolicyError, load_policy, save_policy
from .problem import DeviceKey, MoEInputs, MoEProblem, RoutedInputs
from .select import Decision, NoBackendError
from .versions import PolicyMismatchWarning

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
