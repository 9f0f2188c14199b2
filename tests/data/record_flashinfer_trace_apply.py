"""Record what flashinfer.trace_apply gives to the callable registered for this layer, from an installed flashinfer.

    python tests/data/record_flashinfer_trace_apply.py

writes ``flashinfer_trace_apply.json`` beside this file.
"""

import importlib.metadata
import json
from pathlib import Path

from flashinfer.trace.templates.moe import trtllm_fp8_block_scale_moe_ds_routing_trace as template

SIZES = {
    "num_experts": 256,
    "top_k": 8,
    "n_group": 8,
    "topk_group": 4,
    "num_local_experts": 32,
    "hidden_size": 7168,
    "intermediate_size": 2048,
}


def main() -> None:
    """Write the JSON file."""
    recorded = {
        "package": "flashinfer-python",
        "version": importlib.metadata.version("flashinfer-python"),
        "definition": template.definition_name(SIZES),
        "optional": {name: bool(getattr(input, "optional", False)) for name, input in template.inputs.items()},
    }
    Path(__file__).with_name("flashinfer_trace_apply.json").write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
